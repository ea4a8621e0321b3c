"""The closed forms against the real model: its tensors, and torch's FLOP counter."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samara.errors import ConfigError
from samara.measure.budget import budget
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.modeling import SamaraForCausalLM, set_activation_checkpointing

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 100}
MIXED_RANKS = ({"q_proj": 8, "down_proj": 16}, 12, {"gate_proj": 4, "up_proj": 0, "o_proj": 20})
DESIGNS = {
    "dense": {},
    "untied": {"tie_word_embeddings": False},
    "no_qk_norm": {"qk_norm": False},
    "grouped": {"gqa_group_size": 4},
    "multi_query": {"num_query_heads": 4, "num_kv_heads": 1},
    "layer_wise": {"layerwise_scaling": {}, "gqa_group_size": 2, "ffn_dim_divisor": 16},
    "wide_heads": {"num_query_heads": (6, 2, 8), "num_kv_heads": (3, 2, 1)},
    "cola": {"cola": {"rank": 16}},
    "cola_both": {"cola": {"rank": 24, "activation": "both"}, "tie_word_embeddings": False},
    "cola_layer_wise": {
        "cola": {"rank": (8, 16, 24)},
        "layerwise_scaling": {},
        "ffn_dim_divisor": 16,
    },
    "mixed_ranks": {"cola": {"rank": MIXED_RANKS}, "ffn_dim": (48, 100, 130)},
}


def make_design(name: str) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, **DESIGNS[name]})


def make_model(design: ModelConfig, device: str = "meta") -> SamaraForCausalLM:
    with torch.device(device):
        return SamaraForCausalLM(SamaraConfig.from_design(design))


def low_rank_down_flops(x_shape, a_shape, *, out_shape):
    """Of CoLA-M's own operator for x A, which the counter does not know."""
    return 2 * math.prod(x_shape) * a_shape[1]


def flop_counter() -> FlopCounterMode:
    own = {torch.ops.samara.low_rank_down: low_rank_down_flops}
    return FlopCounterMode(display=False, custom_mapping=own)


def counted_flops(model: SamaraForCausalLM, *, batch: int, length: int) -> tuple[int, int]:
    """Forward and forward-plus-backward FLOPs as torch counts them, attention by plain products."""
    ids = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
    with sdpa_kernel(SDPBackend.MATH):
        with flop_counter() as forward, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        with flop_counter() as training:
            hidden = model.model(input_ids=ids).last_hidden_state
            loss = linear_cross_entropy(hidden, model.lm_head.weight, ids)
            loss.loss_sum.backward()
    return forward.get_total_flops(), training.get_total_flops()


@pytest.mark.parametrize("name", DESIGNS)
def test_parameters_are_the_sum_of_the_tensors(name):
    design = make_design(name)
    model, result = make_model(design), budget(design)
    assert result.parameters.total == sum(p.numel() for p in model.parameters())
    vocabulary = {id(p): p.numel() for p in (model.lm_head.weight, model.model.embed_tokens.weight)}
    assert result.parameters.embedding == sum(vocabulary.values())
    for layer, module in zip(result.layers, model.model.layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", DESIGNS)
def test_flops_are_those_of_the_flop_counter(name):
    design = make_design(name)
    batch, length = 2, 24
    forward, training = counted_flops(make_model(design, "cpu"), batch=batch, length=length)
    flops = budget(design).flops_per_token(length)
    assert batch * length * flops.forward == forward
    assert batch * length * flops.training == training
    assert flops.backward == 2 * flops.forward


LAYER = [(name, "layer") for name in ("dense", "layer_wise", "cola", "mixed_ranks")]
COLA_M = [(name, "cola_m") for name in ("cola", "cola_both", "cola_layer_wise", "mixed_ranks")]


@pytest.mark.parametrize(("name", "mode"), LAYER + COLA_M)
def test_recomputed_flops_are_those_of_the_flop_counter(name, mode):
    design = make_design(name)
    model, batch, length = make_model(design, "cpu"), 2, 24
    _, plain = counted_flops(model, batch=batch, length=length)
    set_activation_checkpointing(model, mode)
    _, checkpointed = counted_flops(model, batch=batch, length=length)
    expected = budget(design).recompute_flops_per_token(length, mode)
    assert checkpointed - plain == batch * length * expected


def test_nothing_is_recomputed_without_checkpointing():
    assert budget(make_design("cola")).recompute_flops_per_token(24, "none") == 0


def test_the_causal_count_is_the_lower_triangle():
    layer, length = budget(make_design("grouped")).layers[0], 24
    pairs = sum(query + 1 for query in range(length))
    assert length * layer.attention_flops(length, "causal") == 4 * 4 * 16 * pairs
    assert length * layer.attention_flops(length) == 4 * 4 * 16 * length**2


def test_mfu_by_hand():
    result = budget(make_design("dense"))
    flops = result.flops_per_token(24, "causal").training
    mfu = result.model_flops_utilization(
        tokens_per_second=1000.0, sequence_length=24, peak_flops=4000.0 * flops
    )
    assert mfu == pytest.approx(0.25)


def test_layers_say_what_they_are():
    layers = budget(make_design("mixed_ranks")).layers
    assert [layer.rank for layer in layers] == list(MIXED_RANKS)
    assert [layer.ffn_dim for layer in layers] == [48, 100, 130]
    assert [layer.linears["k_proj"].rank for layer in layers] == [0, 12, 0]


def test_a_design_without_vocabulary_is_refused():
    design = ModelConfig.model_validate({**SMALL, "vocab_size": None})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is required"):
        budget(design)
