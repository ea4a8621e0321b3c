"""Order of casts in RMSNorm; rotary tables that nothing can damage; sigma modes."""

from __future__ import annotations

import pytest
import torch

from samara.model.cola import LowRankLinear
from samara.model.configuration import SamaraConfig
from samara.model.layers import FEW_ELEMENTS, FeedForward, RMSNorm, linear, rotary_tables
from samara.model.modeling import SamaraForCausalLM


def test_norm_rounds_before_the_weight() -> None:
    norm = RMSNorm(8, eps=1e-6)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    exact = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    out = norm(x)
    assert out.dtype == torch.float32  # a float32 weight lifts the rounded value
    torch.testing.assert_close(out, exact.bfloat16() * norm.weight, rtol=1e-6, atol=0)
    assert not torch.equal(out, exact * norm.weight)
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_norm_statistics_in_float32_survive_what_bfloat16_cannot() -> None:
    norm = RMSNorm(4096, eps=1e-6).bfloat16()
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)  # 300^2 * 4096 saturates a bf16 sum
    torch.testing.assert_close(norm(x), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, FEW_ELEMENTS])
def test_norm_is_the_same_without_gradients(dtype: torch.dtype, num_rows: int) -> None:
    norm = RMSNorm(16, eps=1e-6).to(dtype)
    x = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = norm(x).detach()
    with torch.no_grad():
        out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)


def test_norm_gradient_of_rounded_input() -> None:
    norm = RMSNorm(16, eps=1e-6)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    probe = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    rounded = x.clone().requires_grad_()
    (norm(rounded) * probe).sum().backward()
    exact = x.double().requires_grad_()
    (exact / torch.sqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * probe).sum().backward()
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)


def test_norm_of_zeros_has_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm(4, eps=1e-6)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_positions_exact(dtype: torch.dtype) -> None:
    """bfloat16 frequencies would be 0.9 radians off at position 2047 (head_dim 64)."""
    config = SamaraConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, ffn_dims=[8])
    model = SamaraForCausalLM(config).to(dtype)
    positions = torch.tensor([[0, 2047, 5000]])
    context = model.model._context(model.model.embed_tokens(positions % 9), None, positions, None)
    exact = rotary_tables(positions, head_dim=64, theta=10000.0, dtype=torch.float64)
    assert context.rotary.cos.dtype == torch.float32
    torch.testing.assert_close(context.rotary.cos.double(), exact.cos, rtol=0, atol=1e-3)
    torch.testing.assert_close(context.rotary.sin.double(), exact.sin, rtol=0, atol=1e-3)


def test_no_positional_state_to_damage() -> None:
    config = SamaraConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, ffn_dims=[8])
    with torch.device("meta"):
        model = SamaraForCausalLM(config)
    assert not list(model.buffers())


def test_linear_of_rank_zero_is_dense() -> None:
    assert isinstance(linear(4, 6, 0), torch.nn.Linear)
    low_rank = linear(4, 6, 2)
    assert isinstance(low_rank, LowRankLinear)
    assert low_rank.cola_a.shape == (4, 2)
    assert low_rank.cola_b.shape == (2, 6)
    assert "in_features=4, out_features=6, rank=2" in repr(low_rank)


@pytest.mark.parametrize(
    ("ranks", "activation", "silu_on_gate"),
    [
        (None, "low_rank_only", True),
        ([3], "low_rank_only", False),
        ([3], "both", True),
        ([{"up_proj": 3}], "low_rank_only", True),  # a dense gate keeps SwiGLU's SiLU
        ([{"gate_proj": 3}], "low_rank_only", False),
    ],
)
def test_which_gate_keeps_its_silu(ranks: object, activation: str, silu_on_gate: bool) -> None:
    torch.manual_seed(0)
    config = SamaraConfig(
        hidden_size=64, num_hidden_layers=1, ffn_dims=[8], ranks=ranks, cola_activation=activation
    )
    ffn = FeedForward(config, 0)
    x = torch.randn(2, 3, 64)
    gate = ffn.gate_proj(x)
    expected = ffn.down_proj((gate * gate.sigmoid() if silu_on_gate else gate) * ffn.up_proj(x))
    torch.testing.assert_close(ffn(x), expected)
