"""The ``model:`` section: expansion to lists, and every message."""

from __future__ import annotations

from typing import Any

import pytest

from samara.config import validate
from samara.errors import ConfigError
from samara.model.config import ColaConfig, LayerwiseScaling, ModelConfig


def parse(**fields: Any) -> ModelConfig:
    return validate(
        ModelConfig, {"hidden_size": 128, "num_hidden_layers": 3} | fields, path="model"
    )


def test_expand_derives_uniform_widths() -> None:
    design = parse(vocab_size=100).expand()
    assert design.num_query_heads == (2, 2, 2)
    assert design.num_kv_heads == (2, 2, 2)
    assert design.ffn_dim == (512, 512, 512)  # 8/3 of 128 is 341, up to the next 256


def test_expand_takes_what_is_given() -> None:
    design = parse(num_query_heads=[2, 4, 8], gqa_group_size=2, ffn_dim=96, cola={"rank": 16})
    design = design.expand(vocab_size=7)
    assert design.num_query_heads == (2, 4, 8)
    assert design.num_kv_heads == (1, 2, 4)
    assert design.ffn_dim == (96, 96, 96)
    assert design.cola is not None
    assert design.cola.rank == (16, 16, 16)
    assert design.vocab_size == 7


def test_expand_is_idempotent_and_forgets_shorthands() -> None:
    short = parse(
        hidden_size=256, gqa_group_size=2, ffn_dim_divisor=64, layerwise_scaling={}, vocab_size=9
    )
    design = short.expand()
    assert design.layerwise_scaling is None
    assert (design.gqa_group_size, design.ffn_dim_divisor) == (1, 256)
    assert design.expand() == design
    assert ModelConfig.model_validate(design.model_dump()) == design
    explicit = parse(
        hidden_size=256,
        vocab_size=9,
        num_query_heads=design.num_query_heads,
        num_kv_heads=design.num_kv_heads,
        ffn_dim=design.ffn_dim,
    )
    assert explicit.expand() == design


def test_layerwise_scaling_defaults_are_openelms() -> None:
    assert LayerwiseScaling() == LayerwiseScaling(alpha=(0.5, 1.0), beta=(0.5, 4.0))


def test_ranks_per_layer_and_projection() -> None:
    cola = ColaConfig(rank=(8, 0, {"q_proj": 4, "down_proj": 0}))
    design = parse(cola=cola, vocab_size=9).expand()
    assert design.cola is not None
    assert design.cola.rank == (8, 0, {"q_proj": 4, "down_proj": 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 5}, "model: head_dim 5 is odd; RoPE turns pairs, make it even"),
        ({"hidden_size": 100}, "model: hidden_size 100 is not divisible by head_dim 64"),
        (
            {"layerwise_scaling": {}, "ffn_dim": 5},
            "model: ffn_dim and layerwise_scaling both set the widths",
        ),
        ({"ffn_dim": [1, 2]}, "model: ffn_dim lists 2 layers, num_hidden_layers is 3"),
        ({"num_query_heads": [1]}, "model: num_query_heads lists 1 layers, num_hidden_layers is 3"),
        ({"num_kv_heads": [1]}, "model: num_kv_heads lists 1 layers, num_hidden_layers is 3"),
        ({"cola": {"rank": [4]}}, "model: cola.rank lists 1 layers, num_hidden_layers is 3"),
        (
            {"num_query_heads": [4, 6, 4], "num_kv_heads": 4},
            "model: layer 1 has 6 query heads, not divisible into 4 key-value heads",
        ),
        (
            {"num_query_heads": 6, "gqa_group_size": 4},
            "model: layer 0 has 6 query heads, not divisible into 4 per key-value head",
        ),
        ({"cola": {"rank": 0}}, "model.cola.rank: input should be greater than 0, got 0"),
        (
            {"cola": {"rank": [4, -1, 4]}},
            "model.cola.rank.1: input should be greater than or equal",
        ),
        (
            {"cola": {"rank": 8, "activation": "none"}},
            "model.cola.activation: unknown value 'none'",
        ),
        (
            {"num_hidden_layers": 0},
            "model.num_hidden_layers: input should be greater than 0, got 0",
        ),
        ({"hiden_size": 4}, "model.hiden_size: unknown key (did you mean 'hidden_size'?)"),
        ({"initializer": {"kind": "xavier"}}, "model.initializer.kind: unknown value 'xavier'"),
    ],
)
def test_messages(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(**fields)
    assert message in str(error.value)


def test_vocabulary_must_come_from_somewhere() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is required"):
        parse().expand()


def test_vocabulary_must_hold_the_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 10 is less than the tokenizer's 11"):
        parse(vocab_size=10).expand(vocab_size=11)
