"""Int8 for CPUs: the arithmetic of the dequantised weights, what is quantised, what is refused."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samara.errors import ConfigError, ResourceError
from samara.model.cola import LowRankLinear
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.model.quantization import (
    Int8Linear,
    Int8LowRankLinear,
    quantize_int8,
    weight_bytes,
)

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="int8 needs torchao"
)

DESIGNS = {
    "dense": {},
    "layer-wise": {"num_query_heads": [2, 4], "num_kv_heads": [1, 2], "ffn_dim": [48, 88]},
    "cola": {"cola": {"rank": 16}},
    "some layers": {"cola": {"rank": [8, 0]}},
}


def make_model(name: str, **more) -> SamaraForCausalLM:
    torch.manual_seed(2)
    design = ModelConfig.model_validate(
        {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 96}
        | DESIGNS[name]
        | more
    )
    return SamaraForCausalLM(SamaraConfig.from_design(design)).train(False)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits.float()


def check_rounding(layer: Int8Linear, weight: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) that a layer stands for: off by half a step of its row at most."""
    half_steps = weight.detach().abs().amax(dim=1, keepdim=True) / 255
    error = (layer.dequantized() - weight.detach()).abs()
    assert float((error / half_steps).max()) < 1.001
    assert float(error.max()) > 0
    assert layer.integers.dtype == torch.int8
    return layer.dequantized()


@needs_torchao
@pytest.mark.parametrize("name", DESIGNS)
def test_logits_are_those_of_the_dequantised_weights(name):
    model = make_model(name)
    reference, exact = copy.deepcopy(model), logits_of(model)
    quantize_int8(model)
    found = dict(model.named_modules())
    with torch.no_grad():
        for path, module in reference.model.named_modules(prefix="model"):
            if isinstance(module, LowRankLinear):
                down, up = found[path].down, found[path].up
                module.cola_a.copy_(check_rounding(down, module.cola_a.T).T)
                module.cola_b.copy_(check_rounding(up, module.cola_b.T).T)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(check_rounding(found[path], module.weight))
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(model), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize(
    ("kind", "bound"), [("bfloat16", 0.15), pytest.param("int8", 0.3, marks=needs_torchao)]
)
def test_tokens_are_those_of_float32_unless_they_are_close(name, kind, bound):
    """No logit moves by more than ``bound`` standard deviations; clear choices stay."""
    model = make_model(name)
    exact = logits_of(model)
    model.to(torch.bfloat16)
    if kind == "int8":
        quantize_int8(model)
    found = logits_of(model)
    deviation = exact.std(dim=-1, keepdim=True)
    assert float(((found - exact) / deviation).abs().max()) < bound
    best = (exact / deviation).topk(2).values
    is_clear = best[..., 0] - best[..., 1] > 2 * bound
    assert is_clear.any()
    assert torch.equal(found.argmax(-1)[is_clear], exact.argmax(-1)[is_clear])


@needs_torchao
@pytest.mark.parametrize("tied", [True, False])
def test_projections_are_quantised_and_nothing_else(tied):
    model = make_model("some layers", tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_int8(model)
    kinds = {type(layer.mlp.down_proj) for layer in model.model.layers}
    assert kinds == {Int8LowRankLinear, Int8Linear}
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    left = dict(model.named_parameters())
    assert all("norm" in name or "embed" in name or "lm_head" in name for name in left)
    assert any("norm" in name for name in left)
    for name, parameter in left.items():
        assert torch.equal(parameter, before[name])
    num_factors = 7 * 2 + 7
    integers = [name for name in model.state_dict() if name.endswith(".integers")]
    assert len(integers) == num_factors
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@needs_torchao
def test_weight_bytes_count_tied_weights_once_and_a_byte_per_integer():
    model = make_model("cola")
    parameters = sum(p.numel() for p in model.parameters())
    rotary = sum(b.numel() * b.element_size() for b in model.buffers())
    assert weight_bytes(model) == 4 * parameters + rotary
    factors = [p for m in model.modules() if isinstance(m, LowRankLinear) for p in m.parameters()]
    num_integers = sum(p.numel() for p in factors)
    num_scales = sum(p.shape[1] for p in factors)
    quantize_int8(model)
    expected = 4 * (parameters - num_integers) + num_integers + 4 * num_scales
    assert weight_bytes(model) == expected + rotary


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 130), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99)
)
def test_products_are_right_at_any_width(num_inputs, num_outputs, rows, exact, seed):
    """The kernel reads past the end at some widths; those must not reach it."""
    torch.manual_seed(seed)
    dtype = torch.float32 if exact else torch.bfloat16
    integers = torch.randint(-127, 128, (num_outputs, num_inputs), dtype=torch.int8)
    layer = Int8Linear(integers, torch.rand(num_outputs).add(0.1).to(dtype))
    x = torch.randn(rows, 2, num_inputs).to(dtype)[:, 1:]  # not contiguous
    expected = x.double() @ layer.dequantized().double().T
    products = x.double() @ integers.double().T * layer.scales.double()
    # A sum in bfloat16 is rounded once, its dequantised weights are too.
    torch.testing.assert_close(
        layer(x).double(), products, rtol=1e-5 if exact else 0.012, atol=1e-3 if exact else 0.5
    )
    scale = float(expected.abs().max()) + 1
    assert float((expected - products).abs().max()) < (1e-5 if exact else 0.02) * scale


@needs_torchao
def test_a_bias_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    x, weight, bias = torch.randn(3, 32), model[0].weight, model[0].bias
    quantize_int8(model)
    expected = nn.functional.linear(x, check_rounding(model[0].product, weight), bias)
    torch.testing.assert_close(model(x), expected)


@needs_torchao
def test_the_step_is_captured_whole_and_computes_the_same():
    """By the compiler's front end, with the shapes that operators promise it."""
    model = make_model("cola", num_hidden_layers=1).to(torch.bfloat16)
    quantize_int8(model)
    ids = torch.tensor([[5]])
    with torch.no_grad():
        captured = torch.compile(model, fullgraph=True, backend="aot_eager")(
            input_ids=ids, use_cache=False
        ).logits
        plain = model(input_ids=ids, use_cache=False).logits
    deviation = float(plain.float().std())
    torch.testing.assert_close(captured, plain, rtol=0, atol=0.05 * deviation)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ResourceError, match=r"quantize: int8 needs the package torchao; .*\[quant"):
        quantize_int8(make_model("dense"))


@needs_torchao
def test_what_cannot_be_quantised_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="int8 decodes on CPUs, the model is on meta; add"):
        quantize_int8(model)
    with pytest.raises(ConfigError, match="quantize: the model has no linear layer"):
        quantize_int8(nn.Sequential(nn.LayerNorm(4)))
