"""Llama both ways against transformers' own LlamaForCausalLM."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from samara.errors import CheckpointError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.convert import convert
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM

TOLERANCE = 1e-5
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def save_llama(folder, *, max_shard_size="5GB", **overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_config(folder, *, drop=(), **changes):
    path = folder / "config.json"
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(fields | changes))


def logits(model):
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    "design",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.04},
        {"head_dim": 8, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_transformers_checkpoints_give_equal_logits_and_come_back(tmp_path, design, max_shard_size):
    theirs = save_llama(tmp_path / "llama", max_shard_size=max_shard_size, **design)
    shards = len(list((tmp_path / "llama").glob("*.safetensors")))
    assert (shards > 1) is (max_shard_size == "60KB")
    convert(tmp_path / "llama", tmp_path / "ours", to="samara")
    ours = load_model(tmp_path / "ours")
    assert (logits(ours) - logits(theirs)).abs().max() < TOLERANCE
    convert(tmp_path / "ours", tmp_path / "back", to="llama", max_shard_size=max_shard_size)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is LlamaForCausalLM
    assert torch.equal(logits(back), logits(theirs))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


OLD = {"drop": ("rope_parameters",), "rope_theta": 1000.0}


@pytest.mark.parametrize(
    "changes",
    [
        OLD,
        {**OLD, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "float32"},
        {**OLD, "rope_scaling": {"type": "default"}, "head_dim": None},
        {"rope_theta": 1000.0},  # both keys, as we write them
        {"drop": ("rope_parameters",), "rope_scaling": {"rope_type": "default", "rope_theta": 1e3}},
    ],
    ids=str,
)
def test_configs_of_transformers_4_and_5_mean_the_same(tmp_path, changes):
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    theirs = save_llama(tmp_path / "llama", rope_parameters=rope)
    edit_config(tmp_path / "llama", **changes)
    convert(tmp_path / "llama", tmp_path / "ours", to="samara")
    assert (logits(load_model(tmp_path / "ours")) - logits(theirs)).abs().max() < TOLERANCE


def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(tmp_path):
    save_llama(tmp_path / "llama")
    drop = (
        "num_key_value_heads", "head_dim", "rope_parameters", "hidden_act", "rms_norm_eps",
        "bos_token_id", "eos_token_id", "attention_bias", "tie_word_embeddings", "mlp_bias",
    )  # fmt: skip
    edit_config(tmp_path / "llama", drop=drop)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "ours", to="samara")
    ours = load_model(tmp_path / "ours")
    assert (logits(ours) - logits(theirs)).abs().max() < TOLERANCE
    assert (ours.config.bos_token_id, ours.config.eos_token_id) == (1, 2)


def test_special_tokens_travel_also_where_there_are_several_or_none(tmp_path):
    save_llama(tmp_path / "llama", bos_token_id=None, eos_token_id=[4, 5], pad_token_id=0)
    convert(tmp_path / "llama", tmp_path / "ours", to="samara")
    convert(tmp_path / "ours", tmp_path / "back", to="llama")
    config = LlamaConfig.from_pretrained(tmp_path / "back")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, [4, 5], 0)


def test_stored_rotary_frequencies_are_left_out(tmp_path):
    """TinyLlama's generation of checkpoints holds them."""
    theirs = save_llama(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    save_file(load_file(path) | extra, path)
    convert(tmp_path / "llama", tmp_path / "ours", to="samara")
    assert (logits(load_model(tmp_path / "ours")) - logits(theirs)).abs().max() < TOLERANCE


def test_our_own_uniform_model_runs_as_a_plain_llama(tmp_path):
    design = ModelConfig(
        hidden_size=48, num_hidden_layers=2, head_dim=16, num_query_heads=6, gqa_group_size=3,
        ffn_dim=72, qk_norm=False, rope_theta=500.0, vocab_size=96, rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = SamaraForCausalLM(SamaraConfig.from_design(design, bos_token_id=1, eos_token_id=2))
    save_model(ours, tmp_path)
    convert(tmp_path, tmp_path / "llama", to="llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(theirs) is LlamaForCausalLM
    assert (logits(theirs) - logits(ours)).abs().max() < TOLERANCE
    ids = torch.arange(3, 13)[None]
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(theirs.generate(ids, **options), ours.eval().generate(ids, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_asked_for_is_the_type_written(tmp_path, dtype):
    theirs = save_llama(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "cast", to="llama", dtype=dtype)
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "cast", dtype="auto")
    assert cast.dtype == getattr(torch, dtype)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(cast.state_dict()[name], tensor.to(cast.dtype)), name
    convert(tmp_path / "cast", tmp_path / "kept", to="samara")
    assert load_model(tmp_path / "kept").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, r"attention_bias is True; Samara's linears have no bias"),
        ({"mlp_bias": True}, r"mlp_bias is True; Samara's linears have no bias"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; Samara's FFN is SwiGLU"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_scaling is .*llama3.*unscaled",
        ),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, r"rope_parameters is .*unscaled"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters is .*whole heads"),
        ({"rope_theta": 7.0}, r"rope_theta is 7.0, and not one value, config.json gives"),
        ({"rope_scaling": 3}, r"rope_scaling is 3, and not a mapping"),
        ({"num_attention_heads": 5}, r"head_dim is missing, and it must be given, as 5 heads"),
        ({"hidden_size": "48"}, r"hidden_size is '48', and not a positive whole number"),
        ({"intermediate_size": None}, r"intermediate_size is missing"),
        ({"num_key_value_heads": 3}, r"config.json: .*3 key-value heads"),
        ({"eos_token_id": "</s>"}, r"eos_token_id is '</s>', and not a token id"),
        ({"quantization_config": {"bits": 4}}, r"quantized; convert from the original weights"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings is 1, and not true or false"),
    ],
    ids=str,
)
def test_what_samara_cannot_express_is_refused_by_name(tmp_path, changes, message):
    save_llama(tmp_path / "llama")
    drop = ("head_dim",) if "num_attention_heads" in changes else ()
    edit_config(tmp_path / "llama", drop=drop, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "llama", tmp_path / "ours", to="samara")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]
