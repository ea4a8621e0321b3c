"""transformers' post-norm BERT: what is exact there is, and identity growth is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
)

from samara.errors import ConfigError
from samara.growth.hf_bert import grow_bert
from samara.growth.operator_config import OperatorConfig
from samara.train.config import AdamW
from samara.train.optim import Optimizer

SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.arange(10).view(2, 5)


def config(**update: Any) -> BertConfig:
    return BertConfig(**SIZES | update)


def operator(**fields: Any) -> OperatorConfig:
    return OperatorConfig.model_validate(fields)


def bert(model_class=BertForPreTraining, **update: Any):
    torch.manual_seed(0)
    model = model_class(config(**update)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def outputs(model):
    with torch.no_grad():
        result = model.eval()(IDS)
    if isinstance(model, BertForMaskedLM):
        return [result.logits]
    return [result.prediction_logits, result.seq_relationship_logits]


def gather_moments(model) -> dict[str, torch.Tensor]:
    optimizer = Optimizer(model, AdamW(lr=1e-3, betas=(0.9, 0.999)))
    optimizer.set_lr(0.0)
    for shift in range(3):
        optimizer.zero_grad()
        result = model(IDS + shift)
        loss = result.prediction_logits.logsumexp(-1).sum() - result.prediction_logits[..., 3].sum()
        (loss + result.seq_relationship_logits[:, 0].square().sum()).backward()
        optimizer.step()
    return optimizer.state_dict()


WIDER = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 29}


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("update", "fields", "exactness"),
    [
        ({}, {}, "exact"),
        (WIDER, {}, "tolerance"),
        (WIDER, {"noise": 0.2}, "tolerance"),
        ({"intermediate_size": 20}, {"width": "zero_pad"}, "tolerance"),
        (WIDER, {"width": "random"}, "changes"),
        ({"num_hidden_layers": 4}, {"depth": {"kind": "interpose"}}, "changes"),
        ({"num_hidden_layers": 3}, {"depth": {"kind": "average"}}, "changes"),
    ],
)
def test_the_label_is_true(model_class, tied, update, fields, exactness):
    model = bert(model_class, tie_word_embeddings=tied)
    target = config(tie_word_embeddings=tied, **update)
    grown = grow_bert(model, target=target, operator=operator(**fields), seed=0)
    assert grown.exactness == exactness
    assert type(grown.model) is model_class
    for after, before in zip(outputs(grown.model), outputs(model), strict=True):
        match exactness:
            case "exact":
                assert torch.equal(after, before)
            case "tolerance":
                torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)
            case "changes":
                assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)


def test_layers_are_copied_by_the_map():
    model = bert()
    wanted = operator(depth={"kind": "map", "layers": [1, "new", 0, "0+1"]})
    grown = grow_bert(model, target=config(num_hidden_layers=4), operator=wanted, seed=0)
    new, old = grown.model.state_dict(), model.state_dict()
    for name in [n.split("layer.0.")[1] for n in old if "layer.0." in n]:
        first, second = (old[f"bert.encoder.layer.{i}.{name}"] for i in (0, 1))
        for position, expected in ((0, second), (2, first), (3, (first + second) / 2)):
            torch.testing.assert_close(new[f"bert.encoder.layer.{position}.{name}"], expected)


def test_mapped_moments_are_those_the_larger_model_would_have():
    model = bert()
    grown = grow_bert(
        model,
        target=config(**WIDER),
        operator=operator(),
        seed=0,
        optimizer=gather_moments(model),
    )
    oracle = gather_moments(grown.model)
    assert grown.optimizer is not None
    assert grown.optimizer.keys() == oracle.keys()
    for key, value in grown.optimizer.items():
        torch.testing.assert_close(value, oracle[key], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    "fields",
    [
        {"new_layers": "zero"},
        {"depth": {"kind": "llama_pro"}},
        {"depth": {"kind": "map", "layers": [0, "0*", 1, "1*"]}},
    ],
)
def test_identity_growth_is_refused_after_a_norm(fields):
    with pytest.raises(ConfigError, match="normalises after each block, so a layer whose output"):
        grow_bert(bert(), target=config(num_hidden_layers=4), operator=operator(**fields), seed=0)


def test_a_layer_of_zero_output_would_not_be_the_identity():
    model = bert()
    stacked = operator(depth={"kind": "last", "length": 1})
    grown = grow_bert(model, target=config(num_hidden_layers=3), operator=stacked, seed=0).model
    with torch.no_grad():
        for linear in (
            grown.bert.encoder.layer[2].attention.output.dense,
            grown.bert.encoder.layer[2].output.dense,
        ):
            linear.weight.zero_()
            linear.bias.zero_()
    assert (outputs(grown)[0] - outputs(model)[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("update", "fields", "message"),
    [
        ({"vocab_size": 24}, {}, "target.vocab_size: is 24, the source has 23"),
        ({"intermediate_size": 11}, {}, "target.intermediate_size: is 11, less than the source's"),
        ({"hidden_size": 16}, {}, "target.num_attention_heads: 2 heads of 16 would change"),
        (
            {"hidden_size": 12, "num_attention_heads": 3},
            {},
            "12 is no multiple of the source's 8, and uneven duplicates",
        ),
        (WIDER, {"width": "zero_pad"}, "zero_pad changes the mean and variance of LayerNorm"),
        (
            {"num_hidden_layers": 4},
            {"depth": {"kind": "first", "length": 1}},
            "target.num_hidden_layers: is 4, but the depth map gives 3 layers",
        ),
    ],
)
def test_what_cannot_grow_is_refused(update, fields, message):
    with pytest.raises(ConfigError, match=message):
        grow_bert(bert(), target=config(**update), operator=operator(**fields), seed=0)


def test_other_heads_are_refused():
    with pytest.raises(ConfigError, match="classifier: is no part of a BERT with pretraining"):
        grow_bert(bert(BertForSequenceClassification), target=config(), operator=operator(), seed=0)
