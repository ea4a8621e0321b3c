"""The gradient of selected entries of an embedding, tapped from the ids and the embedded tokens.

As :mod:`samara.sparse.gradients` does for matrices of linear maps: an identity on the output, which
in backward sums the gradients of the tokens that chose a row with entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samara.sparse.gradients import as_int32
from samara.sparse.support import TensorSupport


@dataclass(frozen=True, kw_only=True)
class EmbeddingPlan:
    """How the selected gradient of an embedding is computed.

    Attributes:
        rows: Vocabulary rows that hold entries, ascending, int64.
        index: Positions of the entries in the matrix of these rows, int32.
        padding_idx: The row that gets no gradient; None: there is none.
    """

    rows: Tensor
    index: Tensor
    padding_idx: int | None


def make_embedding_plan(
    support: TensorSupport, *, padding_idx: int | None, device: torch.device
) -> EmbeddingPlan:
    """The plan of an embedding (v, d)."""
    width = support.shape[1]
    rows, place = torch.unique(support.index // width, return_inverse=True)
    return EmbeddingPlan(
        rows=rows.to(device),
        index=as_int32(place * width + support.index % width, device),
        padding_idx=padding_idx,
    )


def tap_embedding(output: Tensor, ids: Tensor, values: Tensor, plan: EmbeddingPlan) -> Tensor:
    """:func:`tap` of an embedding: ``ids`` (...) chose the rows of ``output`` (..., d)."""
    result: Tensor = _EmbeddingTap.apply(  # type: ignore[no-untyped-call]
        output, ids, values, plan.rows, plan.index, plan.padding_idx
    )
    return result


class _EmbeddingTap(torch.autograd.Function):
    """Identity on the embedded tokens; in backward the gradient of the selected rows' entries."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        ids: Tensor,
        values: Tensor,
        rows: Tensor,
        index: Tensor,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, rows, index)
        ctx.padding_idx, ctx.dtype = padding_idx, values.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        ids, rows, index = ctx.saved_tensors
        none = rows.numel()  # the place of rows without entries, which the sum leaves out
        place = torch.searchsorted(rows, ids.contiguous()).clamp(max=none - 1)
        is_used = rows[place] == ids
        if ctx.padding_idx is not None:
            is_used &= ids != ctx.padding_idx
        place = torch.where(is_used, place, none)
        dense = torch.ops.aten.embedding_dense_backward(grad_output, place, none + 1, none, False)
        grad_values = dense.flatten().index_select(0, index).to(ctx.dtype)
        passed = grad_output if ctx.needs_input_grad[0] else None
        return passed, None, grad_values, None, None, None
