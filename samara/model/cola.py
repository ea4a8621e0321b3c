"""CoLA: every linear becomes y = silu(x A) B (arXiv 2502.10940, sections 3 and 4).

A is (in, r) and B is (r, out), no bias, r below the smaller side. Activations of trained language
models are close to low rank; CoLA trains the two thin factors from the start, with a nonlinearity
between them, for about half of the parameters and FLOPs.

Shapes: x (..., in), A (in, r), u = x A (..., r), B (r, out), y (..., out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from samara.model.autocast import compute_dtype


class LowRankLinear(nn.Module):
    """y = silu(x A) B.

    Attributes:
        cola_a: A, (in_features, rank).
        cola_b: B, (rank, out_features).
        keep_pre_activation: Compute x A by an operator that CoLA-M recognises and keeps.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.cola_a = nn.Parameter(torch.empty(in_features, rank))
        self.cola_b = nn.Parameter(torch.empty(rank, out_features))
        self.keep_pre_activation = False
        nn.init.normal_(self.cola_a, std=self.init_std)
        nn.init.normal_(self.cola_b, std=self.init_std)

    @property
    def init_std(self) -> float:
        """r^(-1/4) * (in + out)^(-1/4), of both factors, so that A B has (in + out)^(-1/2)."""
        return float((self.rank * (self.in_features + self.out_features)) ** -0.25)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.up(functional.silu(self.down(x)))

    def down(self, x: Tensor) -> Tensor:
        """The pre-activation u = x A, (..., r)."""
        return _kept_product(x, self.cola_a) if self.keep_pre_activation else x @ self.cola_a

    def up(self, h: Tensor) -> Tensor:
        """The output h B, (..., out_features), of h = silu(u)."""
        return h @ self.cola_b

    def extra_repr(self) -> str:
        """Widths, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


@torch.library.custom_op("samara::low_rank_down", mutates_args=())
def low_rank_down(x: Tensor, a: Tensor) -> Tensor:
    """The product x A as an operator of its own name."""
    return x @ a


@low_rank_down.register_fake
def _(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _low_rank_down_backward(ctx: Any, grad_u: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, a = ctx.saved_tensors
    needs_x, needs_a = ctx.needs_input_grad
    grad_rows = grad_u.flatten(0, -2)
    grad_x = (grad_rows @ a.T).view(x.shape) if needs_x else None
    grad_a = x.flatten(0, -2).T @ grad_rows if needs_a else None
    return grad_x, grad_a


low_rank_down.register_autograd(_low_rank_down_backward, setup_context=_save_inputs)


@register_flop_formula(torch.ops.samara.low_rank_down)
def _flops(x_shape: torch.Size, a_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x_shape.numel() * a_shape[1]


def _kept_product(x: Tensor, a: Tensor) -> Tensor:
    # Autocast does not reach into operators it does not know.
    dtype = compute_dtype(x)
    result: Tensor = low_rank_down(x.to(dtype), a.to(dtype))
    return result
