"""How weights start: OpenELM's rule, the normal rule, CoLA's factors; one seed, one result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from samara.model.cola import LowRankLinear
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM

D, F, LAYERS = 256, 384, 2


def make_model(seed: int = 0, **fields: Any) -> SamaraForCausalLM:
    torch.manual_seed(seed)
    design: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "head_dim": 64,
        "num_query_heads": [2] * LAYERS,
        "num_kv_heads": [2] * LAYERS,
        "ffn_dims": [F] * LAYERS,
        "tie_word_embeddings": False,
    }
    return SamaraForCausalLM(SamaraConfig(**(design | fields)))


def assert_normal(weight: torch.Tensor, std: float) -> None:
    """Mean and standard deviation within four standard errors."""
    n = weight.numel()
    assert abs(weight.mean().item()) < 4 * std / math.sqrt(n)
    assert abs(weight.std().item() / std - 1) < 4 / math.sqrt(2 * n)


def test_openelm_rule() -> None:
    model = make_model()
    assert_normal(model.model.embed_tokens.weight, D**-0.5)
    assert_normal(model.lm_head.weight, D**-0.5)
    last = (2 * LAYERS * D) ** -0.5  # uses d, not the fan-in
    for layer in model.model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert_normal(projection.weight, D**-0.5)
        for projection in (ffn.gate_proj, ffn.up_proj):
            assert_normal(projection.weight, D**-0.5)
        assert_normal(attention.o_proj.weight, last)
        assert_normal(ffn.down_proj.weight, last)
        for norm in (layer.input_layernorm, attention.q_norm, attention.k_norm):
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_normal_rule() -> None:
    model = make_model(initializer="normal", initializer_range=0.03)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert_normal(weight, 0.03), name


@pytest.mark.parametrize("initializer", ["openelm", "normal"])
def test_low_rank_factors_start_as_colas_do(initializer: str) -> None:
    model = make_model(initializer=initializer, ranks=[64] * LAYERS)
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            std = 64**-0.25 * (module.in_features + module.out_features) ** -0.25
            assert_normal(module.cola_a, std)
            assert_normal(module.cola_b, std)
            product = module.cola_a @ module.cola_b
            expected = (module.in_features + module.out_features) ** -0.5
            assert abs(product.std().item() / expected - 1) < 0.1
    embedding = D**-0.5 if initializer == "openelm" else 0.02
    assert_normal(model.model.embed_tokens.weight, embedding)


def test_same_seed_same_weights() -> None:
    first, again, other = make_model(3), make_model(3), make_model(4)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


def test_standalone_layer_is_initialised() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(128, 128, 32)
    assert_normal(layer.cola_a, layer.init_std)
    assert_normal(layer.cola_b, layer.init_std)


def test_missing_tensors_are_drawn_by_the_same_rule(tmp_path: Path) -> None:
    """transformers' own loader fills gaps through the meta device; ours refuses them."""
    make_model(ranks=[64, 0]).model.save_pretrained(tmp_path)  # no lm_head in the file
    torch.manual_seed(9)
    loaded = SamaraForCausalLM.from_pretrained(tmp_path)
    assert_normal(loaded.lm_head.weight, D**-0.5)
    original = make_model(ranks=[64, 0])
    assert torch.equal(
        loaded.model.layers[0].mlp.down_proj.cola_b, original.model.layers[0].mlp.down_proj.cola_b
    )
    assert torch.equal(
        loaded.model.layers[1].self_attn.o_proj.weight,
        original.model.layers[1].self_attn.o_proj.weight,
    )
