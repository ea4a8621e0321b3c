"""The parts of a block: RMSNorm, rotary positions, attention, SwiGLU. Dense or low-rank.

OpenELM (arXiv 2404.14619, section 2.1): pre-norm, QK-norm before RoPE, grouped queries, SwiGLU, no
biases, each layer with its own widths. CoLA (arXiv 2502.10940) replaces any of the linears; see
:mod:`samara.model.cola`.

Shapes: b batch, t query positions, s key positions, d hidden, h query heads, g key-value heads,
e head width, f FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.cache_utils import Cache

from samara.model.attention import AttentionMask, attend
from samara.model.autocast import compute_dtype
from samara.model.cola import LowRankLinear
from samara.model.configuration import SamaraConfig

FEW_ELEMENTS = 2**14
"""Up to here PyTorch's own RMSNorm is the faster one on CPU. It is fused on CUDA; on CPU it is many
passes over memory, started by one call: what counts for the few elements of one new token."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Statistics in float32 (float64 for float64 input); the normalised value goes back to the input's
    dtype before the multiplication by the weight, so a float32 weight lifts a bfloat16 input to
    float32 (OpenELM's order).
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., dim)."""
        if not x.is_cuda and torch.is_grad_enabled():
            normed: Tensor = _Normalize.apply(x, self.eps)  # type: ignore[no-untyped-call]
            return normed * self.weight
        if x.is_cuda:
            return self._in_one_kernel(x)
        wide = x if x.dtype == torch.float64 else x.float()
        if x.numel() <= FEW_ELEMENTS:
            wide = functional.rms_norm(wide, self.weight.shape, eps=self.eps)
        else:
            wide = wide * _inverse_root_mean_square(wide, self.eps)
        return wide.to(x.dtype) * self.weight

    def _in_one_kernel(self, x: Tensor) -> Tensor:
        """CUDA's kernel has float32 inside, and takes the weight along where the dtypes agree."""
        shape = self.weight.shape
        if self.weight.dtype == x.dtype:
            return functional.rms_norm(x, shape, self.weight, eps=self.eps).to(x.dtype)
        return functional.rms_norm(x, shape, eps=self.eps).to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        """Width and eps, for ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def _inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, in one pass over memory."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


class _Normalize(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) with its derivative in closed form, for few passes over memory.

    With z = x s the result and g its gradient, dx = s (g - z mean(g z)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = _inverse_root_mean_square(wide, eps)
        normed = wide * scale
        result = normed.to(x.dtype)
        # Where the result was rounded, the exact one is made again from x.
        ctx.save_for_backward(result if result is normed else x, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        saved, scale = ctx.saved_tensors
        normed = saved if saved.dtype == scale.dtype else saved * scale
        wide = grad.to(scale.dtype)
        mean = (wide * normed).sum(dim=-1, keepdim=True) / normed.shape[-1]
        return (torch.addcmul(wide, normed, mean, value=-1) * scale).to(grad.dtype), None


@dataclass(frozen=True, kw_only=True)
class RotaryTables:
    """Cosine and signed sine of each component's angle, (b or 1, t, 1, e) each.

    The first half of ``sin`` is negated, as :func:`apply_rotary` wants it.
    """

    cos: Tensor
    sin: Tensor


def rotary_tables(
    position_ids: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> RotaryTables:
    """Return the rotary tables of some positions (RoPE, arXiv 2104.09864).

    The frequencies theta^(-2i / head_dim) are computed here from numbers, never stored in a
    module: casting, moving or building the model on the meta device cannot damage them.

    Args:
        position_ids: Positions (b, t) or (1, t), int64.
        head_dim: Width of one head, even.
        theta: Base of the frequencies.
        dtype: float32 or float64.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim
    angles = position_ids[:, :, None, None].to(dtype) * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return RotaryTables(cos=torch.cat((cos, cos), dim=-1), sin=torch.cat((-sin, sin), dim=-1))


def apply_rotary(x_bthe: Tensor, tables: RotaryTables) -> Tensor:
    """Turn each pair (i, i + e / 2) of each head by its angle, in the tables' precision.

    (a, b) becomes (a cos - b sin, b cos + a sin); the roll puts b under a and a under b.
    """
    swapped = x_bthe.roll(x_bthe.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_bthe * tables.cos, swapped, tables.sin)


def to_compute_dtype(x: Tensor) -> Tensor:
    """Cast to autocast's dtype once, ahead of the projections that would each do so."""
    return x.to(compute_dtype(x))


def linear(in_features: int, out_features: int, rank: int) -> nn.Linear | LowRankLinear:
    """A bias-free projection: dense for rank 0, else CoLA's low-rank one."""
    if rank == 0:
        return nn.Linear(in_features, out_features, bias=False)
    return LowRankLinear(in_features, out_features, rank)


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What all layers of one forward pass share."""

    rotary: RotaryTables
    mask: AttentionMask
    cache: Cache | None
    causal: bool = True
    """What the mask None means (:func:`~samara.model.attention.attend`)."""


class Attention(nn.Module):
    """Grouped-query attention with QK-norm and rotary positions."""

    def __init__(self, config: SamaraConfig, layer: int) -> None:
        super().__init__()
        assert config.num_query_heads is not None
        assert config.num_kv_heads is not None
        self.layer = layer
        self.head_dim = config.head_dim
        d, ranks = config.hidden_size, config.layer_ranks(layer)
        q_dim = config.num_query_heads[layer] * config.head_dim
        kv_dim = config.num_kv_heads[layer] * config.head_dim
        self.q_proj = linear(d, q_dim, ranks["q_proj"])
        self.k_proj = linear(d, kv_dim, ranks["k_proj"])
        self.v_proj = linear(d, kv_dim, ranks["v_proj"])
        self.o_proj = linear(q_dim, d, ranks["o_proj"])
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x_btd: Tensor, context: LayerContext) -> Tensor:
        """Attend from each position to those that it sees."""
        x_btd = to_compute_dtype(x_btd)
        heads = (*x_btd.shape[:2], -1, self.head_dim)
        q_bthe = self.q_proj(x_btd).view(heads)
        k_btge = self.k_proj(x_btd).view(heads)
        v_btge = self.v_proj(x_btd).view(heads)
        if self.qk_norm:
            q_bthe, k_btge = self.q_norm(q_bthe), self.k_norm(k_btge)
        # The rotation runs in the tables' precision; attention in that of the values.
        q_bhte = apply_rotary(q_bthe, context.rotary).to(v_btge.dtype).transpose(1, 2)
        k_bgse = apply_rotary(k_btge, context.rotary).to(v_btge.dtype).transpose(1, 2)
        v_bgse = v_btge.transpose(1, 2)
        if context.cache is not None:
            k_bgse, v_bgse = context.cache.update(k_bgse, v_bgse, self.layer)
        mixed_bhte = attend(q_bhte, k_bgse, v_bgse, mask=context.mask, causal=context.causal)
        return self.o_proj(mixed_bhte.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    With low-rank projections, CoLA's ``low_rank_only`` leaves out this SiLU, as each projection
    already holds one; ``both`` keeps it. A dense gate always keeps it.
    """

    def __init__(self, config: SamaraConfig, layer: int) -> None:
        super().__init__()
        assert config.ffn_dims is not None
        d, f, ranks = config.hidden_size, config.ffn_dims[layer], config.layer_ranks(layer)
        self.gate_proj = linear(d, f, ranks["gate_proj"])
        self.up_proj = linear(d, f, ranks["up_proj"])
        self.down_proj = linear(f, d, ranks["down_proj"])
        self.gate_silu = ranks["gate_proj"] == 0 or config.cola_activation == "both"

    def forward(self, x_btd: Tensor) -> Tensor:
        """Apply to each position on its own."""
        x_btd = to_compute_dtype(x_btd)
        gate_btf = self.gate_proj(x_btd)
        if self.gate_silu:
            gate_btf = functional.silu(gate_btf)
        return self.down_proj(gate_btf * self.up_proj(x_btd))  # type: ignore[no-any-return]
