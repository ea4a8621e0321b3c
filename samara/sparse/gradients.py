"""The gradient of selected weights alone, tapped from a layer's input and output.

The layer's own forward runs untouched on its frozen weight W, which already holds the trained
values. A tap is an identity on the layer's output y. In backward it sees dL/dy and the layer's
input x, forms the selected entries of dL/dW = (dL/dy)^T x, and hands dL/dy on. The values that are
trained enter the tap as an argument; autograd therefore accumulates their gradient like that of any
parameter: over micro-batches, over several uses of one weight, under checkpointing and compilation.
Where nothing is selected there is no tap, and frozen layers below the lowest tap get no graph.

A weight of r x c entries (as stored) has the gradient L^T R with L (n, r), R (n, c) over n tokens.
``nn.Linear`` stores (out, in): L = dL/dy, R = x. Conv1D and CoLA's factors store (in, out): L = x,
R = dL/dy. How the selected entries are had, by the support:

    slice    rows and columns that hold no entry are left out of L and R first. If x is what
             shrinks, only the slice of it is kept for backward. A support of whole rows or columns
             is then the product itself.
    tiles    L^T R in tiles of rows into a bounded workspace; each tile's entries are gathered.
    blocks   s x s blocks: a batched product of gathered strips, no dense tile at all.

The reference is the dense path (:mod:`samara.sparse.attach`): autograd's whole gradient, gathered
and freed at once; it serves every other module.

Shapes: n tokens, r rows and c columns of the weight as stored, k entries, s side of a block.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from samara.sparse.support import TensorSupport

WORKSPACE_BYTES = 128 * 2**20
"""The most that a tile of the dense gradient, or the strips of a batch of blocks, may take."""
SLICE_SHARE = 0.75
"""Leave rows or columns out if at most this share of them holds entries: gathering costs too."""
MAX_BLOCK_READS = 4.0
"""Use the batched product over blocks while its strips are at most this many times L and R.
Estimated: a batched product of gathered strips is bound by memory, a dense one by arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the selected gradient of one weight is computed; tensors live on the weight's device.

    Attributes:
        input_dim: The dimension of the stored weight that faces the layer's input.
        rows: Rows that hold entries, int32; None: all are used.
        columns: Columns that hold entries, int32; None: all are used.
        index: Positions of the entries (k,) in the sliced matrix, int32; empty if the entries are
            the whole of it. For blocks: where each entry stands among the blocks' entries.
        bounds: Entries before each tile of rows, int64 on the CPU; for blocks empty.
        tile_rows: Rows of a tile.
        block: Side of the blocks; 1: tiles.
        block_rows: Row of each block in the grid of blocks, int32 (blocks only).
        block_columns: Its column, int32 (blocks only).
    """

    input_dim: int
    rows: Tensor | None
    columns: Tensor | None
    index: Tensor
    bounds: Tensor
    tile_rows: int
    block: int = 1
    block_rows: Tensor | None = None
    block_columns: Tensor | None = None

    @property
    def inputs(self) -> Tensor | None:
        """Features of the layer's input that are kept for backward; None: all."""
        return self.columns if self.input_dim == 1 else self.rows

    @property
    def outputs(self) -> Tensor | None:
        """Features of the layer's output whose gradient is used; None: all."""
        return self.rows if self.input_dim == 1 else self.columns


def make_plan(support: TensorSupport, *, input_dim: int, positions: Tensor) -> Plan:
    """Choose the path for a two-dimensional weight.

    Args:
        support: Its selected entries.
        input_dim: 1 for ``nn.Linear``; 0 for weights stored (in, out).
        positions: The entries' positions, int32, on the weight's device: used as they are where
            nothing is left out.
    """
    num_rows, num_columns = support.shape
    index, device = support.index, positions.device
    block = _block_plan(support, input_dim=input_dim, device=device)
    if block is not None:
        return block
    row, column = index // num_columns, index % num_columns
    rows, row = _used(row, num_rows)
    columns, column = _used(column, num_columns)
    height = num_rows if rows is None else rows.numel()
    width = num_columns if columns is None else columns.numel()
    inner = row * width + column
    tile_rows = max(1, min(height, WORKSPACE_BYTES // (4 * width)))
    edges = torch.arange(0, height + tile_rows, tile_rows) * width
    if index.numel() == height * width:
        places = positions[:0]
    elif rows is None and columns is None:
        places = positions
    else:
        places = _int32(inner, device)
    return Plan(
        input_dim=input_dim,
        rows=_int32(rows, device),
        columns=_int32(columns, device),
        index=places,
        bounds=torch.searchsorted(inner, edges),
        tile_rows=tile_rows,
    )


def _used(coordinate: Tensor, size: int) -> tuple[Tensor | None, Tensor]:
    """The distinct coordinates and each entry's place among them; None if most are used."""
    distinct, place = torch.unique(coordinate, return_inverse=True)
    if distinct.numel() > SLICE_SHARE * size:
        return None, coordinate
    return distinct, place


def _int32(tensor: Tensor | None, device: torch.device) -> Any:
    return None if tensor is None else tensor.to(device=device, dtype=torch.int32)


def _block_plan(support: TensorSupport, *, input_dim: int, device: torch.device) -> Plan | None:
    side, (num_rows, num_columns) = support.block, support.shape
    if side == 1 or num_rows % side or num_columns % side:
        return None
    row, column = support.index // num_columns, support.index % num_columns
    grid_columns = num_columns // side
    block_of = (row // side) * grid_columns + column // side
    blocks, place = torch.unique(block_of, return_inverse=True)
    assert blocks.numel() * side * side == support.index.numel(), "entries form whole blocks"
    if 2 * blocks.numel() * side > MAX_BLOCK_READS * (num_rows + num_columns):
        return None
    return Plan(
        input_dim=input_dim,
        rows=None,
        columns=None,
        index=_int32(place * side * side + (row % side) * side + column % side, device),
        bounds=torch.empty(0, dtype=torch.int64),
        tile_rows=0,
        block=side,
        block_rows=_int32(blocks // grid_columns, device),
        block_columns=_int32(blocks % grid_columns, device),
    )


class InputSlice:
    """The columns of a layer's input that are kept for backward.

    Layers that read the same tensor and keep the same columns share one slice of it.
    """

    def __init__(self, inputs: Tensor) -> None:
        self._inputs = inputs
        self._source: weakref.ref[Tensor] | None = None
        self._slice: Tensor | None = None

    def take(self, source: Tensor) -> Tensor:
        """The slice (..., j) of ``source`` (..., in)."""
        if torch.compiler.is_compiling():  # the compiler finds equal slices by itself
            return source.index_select(-1, self._inputs)
        if self._slice is None or self._source is None or self._source() is not source:
            self._slice = source.detach().index_select(-1, self._inputs)
            self._source = weakref.ref(source)
        return self._slice


def tap(
    output: Tensor, source: Tensor, values: Tensor, plan: Plan, kept: InputSlice | None = None
) -> Tensor:
    """Return ``output``, through which ``values`` get the gradient of their weight's entries.

    Args:
        output: The layer's output (..., out).
        source: Its input (..., in).
        values: The trained values (k,), float32; not read, they are in the weight.
        plan: From :func:`make_plan`.
        kept: Takes the slice of the input, where the plan has one; left out: a slice of its own.
    """
    if plan.inputs is not None:
        source = (kept or InputSlice(plan.inputs)).take(source)
    result: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
        output,
        source.detach(),
        values,
        plan.outputs,
        plan.index,
        plan.bounds,
        plan.tile_rows,
        plan.block,
        plan.block_rows,
        plan.block_columns,
        plan.input_dim,
    )
    return result


class _Tap(torch.autograd.Function):
    """Identity on the output; in backward also the gradient of the values."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        source: Tensor,
        values: Tensor,
        outputs: Tensor | None,
        index: Tensor,
        bounds: Tensor,
        tile_rows: int,
        block: int,
        block_rows: Tensor | None,
        block_columns: Tensor | None,
        input_dim: int,
    ) -> Tensor:
        ctx.save_for_backward(source, outputs, index, bounds, block_rows, block_columns)
        ctx.settings = tile_rows, block, input_dim
        ctx.num_values, ctx.dtype = values.numel(), values.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        source, outputs, index, bounds, block_rows, block_columns = ctx.saved_tensors
        tile_rows, block, input_dim = ctx.settings
        used = grad_output if outputs is None else grad_output.index_select(-1, outputs)
        inner = source.flatten(0, -2).to(used.dtype), used.flatten(0, -2)
        left, right = inner if input_dim == 0 else inner[::-1]
        if block > 1:
            grad = selected_blocks(left, right, index, block_rows, block_columns, block)
        else:
            grad = selected_entries(left, right, index, bounds, tile_rows, ctx.num_values)
        grad_values = grad.to(ctx.dtype)
        passed = grad_output if ctx.needs_input_grad[0] else None
        return passed, None, grad_values, *([None] * 8)


@torch.library.custom_op("samara::selected_entries", mutates_args=())
def selected_entries(
    left: Tensor, right: Tensor, index: Tensor, bounds: Tensor, tile_rows: int, num_values: int
) -> Tensor:
    """Entries of L^T R by tiles of rows: (k,) float32, or float64 for float64.

    Args:
        left: L (n, r).
        right: R (n, c).
        index: Positions in L^T R (k,), int32, ascending; empty: all of them.
        bounds: Entries before each tile.
        tile_rows: Rows of a tile.
        num_values: k.
    """
    exact = _exact(left)
    width = right.shape[1]
    out = torch.empty(num_values, dtype=exact, device=left.device)
    edges = bounds.tolist()
    for tile, (low, high) in enumerate(itertools.pairwise(edges)):
        if low == high:
            continue
        first = tile * tile_rows
        dense = (left[:, first : first + tile_rows].T @ right).flatten()
        if index.numel():
            dense = dense.index_select(0, index[low:high] - first * width)
            out[low:high] = dense
        else:
            out[first * width : first * width + dense.numel()] = dense
    return out


@selected_entries.register_fake
def _(
    left: Tensor, right: Tensor, index: Tensor, bounds: Tensor, tile_rows: int, num_values: int
) -> Tensor:
    del right, index, bounds, tile_rows
    return left.new_empty(num_values, dtype=_exact(left))


@torch.library.custom_op("samara::selected_blocks", mutates_args=())
def selected_blocks(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    block_rows: Tensor,
    block_columns: Tensor,
    side: int,
) -> Tensor:
    """Entries of L^T R that form blocks: (k,) float32, or float64 for float64.

    Args:
        left: L (n, r).
        right: R (n, c).
        index: Where each entry stands among those of all blocks (k,), int32.
        block_rows: Rows of the blocks in the grid (m,), int32.
        block_columns: Their columns (m,), int32.
        side: s.
    """
    strips_l = left.reshape(left.shape[0], -1, side)
    strips_r = right.reshape(right.shape[0], -1, side)
    out = torch.empty(index.numel(), dtype=_exact(left), device=left.device)
    blocks = out.view(-1, side, side)
    strip_bytes = 2 * left.shape[0] * side * left.element_size()
    batch = max(1, WORKSPACE_BYTES // max(1, strip_bytes))
    for first in range(0, block_rows.numel(), batch):
        span = slice(first, first + batch)
        l_msn = strips_l.index_select(1, block_rows[span]).permute(1, 2, 0)
        r_mns = strips_r.index_select(1, block_columns[span]).permute(1, 0, 2)
        blocks[span] = torch.bmm(l_msn, r_mns)
    return out.index_select(0, index)


@selected_blocks.register_fake
def _(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    block_rows: Tensor,
    block_columns: Tensor,
    side: int,
) -> Tensor:
    del right, block_rows, block_columns, side
    return left.new_empty(index.numel(), dtype=_exact(left))


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@register_flop_formula(torch.ops.samara.selected_entries)
def _flops(left_shape: torch.Size, right_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left_shape.numel() * right_shape[1]


@register_flop_formula(torch.ops.samara.selected_blocks)
def _block_flops(
    left_shape: torch.Size, right_shape: torch.Size, index_shape: torch.Size, *_: Any, **__: Any
) -> int:
    del right_shape
    return 2 * left_shape[0] * index_shape[0]


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
        index=_int32(place * width + support.index % width, device),
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
