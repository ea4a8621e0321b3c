"""What is refused, what is only warned of, and which label a growth gets."""

from __future__ import annotations

from typing import Any

import pytest

from samara.errors import ConfigError
from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import check_growth, copied_design, deeper_design
from samara.model.config import ModelConfig


def design(**update: Any) -> ModelConfig:
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "head_dim": 4,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "ffn_dim": 32,
        "vocab_size": 50,
    }
    return ModelConfig.model_validate(fields | update)


def openelm(num_layers: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=1280,
        num_hidden_layers=num_layers,
        head_dim=64,
        gqa_group_size=4,
        layerwise_scaling={"alpha": (0.5, 1.0), "beta": (0.5, 4.0)},
        vocab_size=50,
    )


def operator(**fields: Any) -> OperatorConfig:
    return OperatorConfig.model_validate(fields)


COLA = {"rank": 4}


@pytest.mark.parametrize(
    ("source", "target", "fields", "message"),
    [
        ({}, {"head_dim": 8}, {}, "target.head_dim: is 8, the source has 4; growth cannot change"),
        ({}, {"rope_theta": 5e5}, {}, "target.rope_theta: is 500000.0, the source has 10000.0"),
        ({}, {"qk_norm": False}, {}, "target.qk_norm: is False, the source has True"),
        ({}, {"rms_norm_eps": 1e-5}, {}, "target.rms_norm_eps: is 1e-05"),
        ({}, {"tie_word_embeddings": False}, {}, "target.tie_word_embeddings: is False"),
        ({}, {"hidden_size": 12}, {}, "target.hidden_size: is 12, less than the source's 16"),
        ({}, {"num_hidden_layers": 3}, {}, "target.num_hidden_layers: is 3, less than"),
        ({}, {"vocab_size": 49}, {}, "target.vocab_size: is 49, less than the source's 50"),
        ({}, {"max_position_embeddings": 1}, {}, "target.max_position_embeddings: is 1, less"),
        ({}, {"hidden_size": 24}, {}, "24 is no multiple of the source's 16, and uneven dupl"),
        ({}, {"ffn_dim": 31}, {}, "target layer 0: source layer 0 does not fit: FFN width would"),
        ({}, {"num_kv_heads": 1}, {}, "key-value heads would shrink from 2 to 1"),
        ({}, {"num_kv_heads": 4}, {}, "query heads per key-value head would shrink from 2 to 1"),
        ({}, {"cola": COLA}, {}, "q_proj is dense and would be low-rank: no weights of one make"),
        ({"cola": COLA}, {"cola": None}, {}, "q_proj is low-rank and would be dense"),
        ({"cola": COLA}, {"cola": {"rank": 3}}, {}, "the rank of q_proj would shrink from 4 to 3"),
        (
            {"cola": COLA},
            {"cola": {"rank": 4, "activation": "both"}},
            {},
            "target.cola.activation: is both, the source has low_rank_only",
        ),
        (
            {},
            {"num_hidden_layers": 6},
            {"depth": {"kind": "last", "length": 1}},
            "target.num_hidden_layers: is 6, but the depth map gives 5 layers",
        ),
        (
            {},
            {"ffn_dim": 40},
            {"depth": {"kind": "middle", "length": 2}},
            "target.num_hidden_layers: is 4, but the depth map gives 6 layers",
        ),
        (
            {},
            {},
            {"depth": {"kind": "map", "layers": [0, 1, 2, 4]}},
            "entry 3 is 4, but the source has layers 0 to 3",
        ),
        (
            {},
            {"num_hidden_layers": 7},
            {"depth": {"kind": "solar"}},
            "solar cannot lay two copies of 4 layers over each other by 3",
        ),
        (
            {"ffn_dim": (32, 33, 32, 32)},
            {"num_hidden_layers": 5, "ffn_dim": 40},
            {"depth": {"kind": "map", "layers": [0, "0+1", 1, 2, 3]}},
            "target layer 1 is the mean of layers 0\\+1, whose widths differ",
        ),
        (
            {},
            {"ffn_dim": (31, 32, 32, 32)},
            {"depth": {"kind": "fit"}},
            "no source layer up to 0 fits into target layer 0",
        ),
    ],
)
def test_what_cannot_grow_is_refused(source, target, fields, message):
    with pytest.raises(ConfigError, match=message):
        check_growth(design(**source), design(**source | target), operator(**fields))


def test_plain_stacking_of_layerwise_widths_is_refused_and_fit_is_not():
    for kind in ("stack", "interpose"):
        with pytest.raises(ConfigError, match=r"does not fit: .* shrink .*; .* or take depth: fit"):
            check_growth(openelm(16), openelm(32), operator(depth={"kind": kind}))
    plan = check_growth(openelm(16), openelm(32), operator(depth={"kind": "fit"}))
    assert plan.layer_map.unused == ()
    assert plan.exactness == "changes"


@pytest.mark.parametrize(
    ("target", "fields", "exactness"),
    [
        ({}, {}, "exact"),
        ({"num_hidden_layers": 8}, {}, "changes"),
        ({"num_hidden_layers": 8}, {"new_layers": "zero"}, "exact"),
        ({"num_hidden_layers": 6}, {"depth": {"kind": "llama_pro"}}, "exact"),
        ({"num_hidden_layers": 6}, {"depth": {"kind": "solar"}, "new_layers": "zero"}, "exact"),
        ({"num_hidden_layers": 5}, {"depth": {"kind": "random_top"}}, "changes"),
        ({"ffn_dim": 40}, {}, "tolerance"),
        ({"ffn_dim": 40}, {"width": "zero_pad"}, "tolerance"),
        ({"ffn_dim": 40}, {"width": "random"}, "changes"),
        ({"hidden_size": 32, "num_hidden_layers": 8}, {"new_layers": "zero"}, "tolerance"),
        ({"vocab_size": 51}, {}, "changes"),
        (
            {"num_hidden_layers": 5, "ffn_dim": (32, 40, 32, 32, 32)},
            {"depth": {"kind": "map", "layers": [0, "0*", 1, 2, 3]}},
            "exact",
        ),
    ],
)
def test_the_label_of_a_growth(target, fields, exactness):
    assert check_growth(design(), design(**target), operator(**fields)).exactness == exactness


@pytest.mark.parametrize(
    ("target", "fields", "warning"),
    [
        (
            {"num_hidden_layers": 6},
            {},
            "6 layers are no multiple of 4, so the last copy of the model lacks its top 2 layers",
        ),
        (
            {"num_hidden_layers": 4},
            {"depth": {"kind": "map", "layers": [0, 0, 1, 1]}},
            "no target layer starts from source layers 2, 3",
        ),
        ({"ffn_dim": 64}, {}, "duplicates without noise get equal gradients and stay equal"),
        ({"vocab_size": 60}, {}, "the new tokens start at random"),
    ],
)
def test_what_is_allowed_with_a_warning(target, fields, warning):
    (found,) = check_growth(design(), design(**target), operator(**fields)).warnings
    assert warning in found


def test_what_breaks_the_symmetry_of_duplicates_needs_no_warning():
    for fields in ({"noise": 0.1}, {"moments": "zero"}, {"width": "zero_pad"}):
        assert check_growth(design(), design(ffn_dim=64), operator(**fields)).warnings == ()


def test_zero_padding_the_residual_stream_scales_eps():
    target = design(hidden_size=20)
    plan = check_growth(design(), target, operator(width="zero_pad"))
    assert plan.design.rms_norm_eps == 1e-6 * 16 / 20
    assert plan.design.model_copy(update={"rms_norm_eps": 1e-6}) == target.expand()


def test_the_target_may_leave_its_vocabulary_out():
    target = design(vocab_size=None, num_hidden_layers=8)
    assert check_growth(design(), target, operator()).design.vocab_size == 50


def test_a_deeper_design_has_the_lists_of_the_layers_copied():
    source = design(num_query_heads=(2, 2, 4, 4), num_kv_heads=(1, 2, 2, 4), ffn_dim=(8, 9, 10, 11))
    wanted = operator(depth={"kind": "map", "layers": ["new", 3, 0, "new", 1]})
    deeper = deeper_design(source, wanted, num_hidden_layers=5)
    assert deeper.num_query_heads == (2, 4, 2, 2, 2)
    assert deeper.num_kv_heads == (1, 4, 1, 1, 2)
    assert deeper.ffn_dim == (8, 11, 8, 8, 9)
    plan = check_growth(source, deeper, wanted)
    assert plan.design == deeper == copied_design(source, plan.layer_map)


def test_a_deeper_design_is_not_the_schedule_of_more_layers():
    deeper = deeper_design(openelm(4), operator(), num_hidden_layers=8)
    assert deeper.layerwise_scaling is None
    assert deeper.ffn_dim == openelm(4).expand().ffn_dim * 2
    assert deeper.ffn_dim != openelm(8).expand().ffn_dim


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": {"kind": "fit"}}, "fit chooses layers by the widths of a target; give one"),
        ({"depth": {"kind": "first", "length": 1}}, "is 8, but the depth map gives 5 layers"),
    ],
)
def test_a_deeper_design_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        deeper_design(design(), operator(**fields), num_hidden_layers=8)
