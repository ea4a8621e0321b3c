"""Tiny models of every kind that sparse training claims, and batches for them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.objective import CausalLM, MaskedLMByLogits

VOCABULARY = 29
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
}


def _decoder(**more):
    return {**ENCODER, "num_key_value_heads": 1, **more}


def _samara(**more):
    design = ModelConfig(
        hidden_size=16,
        num_hidden_layers=2,
        head_dim=8,
        num_query_heads=2,
        num_kv_heads=1,
        ffn_dim=20,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        **more,
    )
    return SamaraForCausalLM(SamaraConfig.from_design(design.expand(vocab_size=VOCABULARY)))


BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_decoder())),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**_decoder(tie_word_embeddings=True))),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**ENCODER)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**ENCODER, pad_token_id=1)),
    "deberta": lambda: DebertaV2ForMaskedLM(
        DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "samara": lambda: _samara(),
    "samara_cola": lambda: _samara(cola={"rank": 4}),
}
ENCODERS = ("bert", "roberta", "deberta")


def build(kind, *, dtype=torch.float32, seed=0):
    """A tiny model without dropout."""
    torch.manual_seed(seed)
    model = BUILDERS[kind]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "StableDropout":
            module.drop_prob = 0.0
    for name in ("attention_dropout", "attn_dropout", "attention_probs_dropout_prob"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    with torch.no_grad():  # weights that matter: initialised ones give nearly no gradient
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model.to(dtype).train()


def make_objective(kind):
    return MaskedLMByLogits() if kind in ENCODERS else CausalLM()


def make_batch(kind, *, rows=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    targets = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    targets[:, -2:] = -100
    batch = {
        "input_ids": ids,
        "targets": targets,
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
    }
    if kind in ENCODERS:
        batch["attention_mask"] = torch.ones_like(ids)
    return batch


@pytest.fixture
def models():
    """Builders of models, objectives and batches."""

    class Models:
        kinds = tuple(BUILDERS)
        build = staticmethod(build)
        objective = staticmethod(make_objective)
        batch = staticmethod(make_batch)

    return Models
