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
    dots     few entries on a CPU: of each the product of a column of L and one of R.
    blocks   s x s blocks: a batched product of gathered strips, no dense tile at all.

On a GPU dots lose: gathered columns are written and read again, which takes longer than the whole
product above a density of about 0.08 % (estimated: 600 TFLOP/s, 3 TB/s). A kernel that gathers
into registers would move that to 0.2 to 0.4 %, below the usual half a percent; there is none.

The reference is the dense path (:mod:`samara.sparse.attach`): autograd's whole gradient, gathered
and freed at once; it serves every other module.

Shapes: n tokens, r rows and c columns of the weight as stored, k entries, s side of a block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import TensorWeakRef

from samara.model.autocast import compute_dtype
from samara.sparse.support import TensorSupport

WORKSPACE_BYTES = 128 * 2**20
"""The most that a tile of the dense gradient, or the strips of a batch of blocks, may take."""
SLICE_SHARE = 0.75
"""Leave rows or columns out if at most this share of them holds entries: gathering costs too."""
MAX_BLOCK_READS = 4.0
"""Use the batched product over blocks while its strips are at most this many times L and R.
Estimated: a batched product of gathered strips is bound by memory, a dense one by arithmetic."""
LEAST_TILE = {"cuda": 64}
"""By device: side of the smallest tile that a product is computed in; smaller blocks cost as
much."""
ALIGNMENT = {"cuda": 8}
"""By device: slices are filled up to a multiple of so many features. A bfloat16 matrix whose rows
do not begin at multiples of 16 bytes takes cuBLAS's slow kernels."""
TILE_STEP = 64
"""Tiles have a multiple of so many rows, for the same reason."""
DOTS_SHARE = {torch.bfloat16: 0.003, torch.float32: 0.008, torch.float64: 0.008}
"""On a CPU: take dots up to this share of the entries of L^T R, by dtype. Measured on one core of
an AMD EPYC (512 to 2048 rows and columns, 256 to 2048 tokens): at 0.5 % in float32 dots take 0.4 to
0.6 of the time of tiles, and as long at 0.9 %; a bfloat16 product takes half of a float32 one."""
DOTS_BYTES = 2 * 2**20
"""What dots gather at once, so that it is still in the cache when it is multiplied."""


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
        width: Columns of the sliced matrix that are not there to fill it up.
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
    width: int = 0
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
    rows, row = _used(row, num_rows, device)
    columns, column = _used(column, num_columns, device)
    height = int(row.max()) + 1 if rows is not None else num_rows
    width = int(column.max()) + 1 if columns is not None else num_columns
    stride = num_columns if columns is None else columns.numel()
    is_whole = index.numel() == height * width
    inner = row * (width if is_whole else stride) + column
    tile_rows = _tile_rows(height, stride)
    edges = torch.arange(0, height + tile_rows, tile_rows) * (width if is_whole else stride)
    if is_whole:
        places = positions[:0]
    elif rows is None and columns is None:
        places = positions
    else:
        places = as_int32(inner, device)
    return Plan(
        input_dim=input_dim,
        rows=as_int32(rows, device),
        columns=as_int32(columns, device),
        index=places,
        bounds=torch.searchsorted(inner, edges),
        tile_rows=tile_rows,
        width=width,
    )


def _tile_rows(height: int, width: int) -> int:
    """Rows of a tile that fits the workspace, in float32 or less."""
    fitting = max(1, min(height, WORKSPACE_BYTES // (4 * width)))
    is_one_tile_or_tiny = fitting == height or fitting < TILE_STEP
    return fitting if is_one_tile_or_tiny else fitting // TILE_STEP * TILE_STEP


def _used(coordinate: Tensor, size: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The distinct coordinates and each entry's place among them; None if most are used.

    The last one is repeated to fill the slice up; no entry has its place there.
    """
    distinct, place = torch.unique(coordinate, return_inverse=True)
    if distinct.numel() > SLICE_SHARE * size:
        return None, coordinate
    missing = -distinct.numel() % ALIGNMENT.get(device.type, 1)
    return torch.cat([distinct, distinct[-1:].expand(missing)]), place


def as_int32(tensor: Tensor | None, device: torch.device) -> Any:
    """Positions as plans keep them: half the bytes of int64."""
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
    if 2 * blocks.numel() * max(side, LEAST_TILE.get(device.type, 1)) ** 2 > num_rows * num_columns:
        return None  # no less arithmetic than half of the whole product: gathering eats that up
    return Plan(
        input_dim=input_dim,
        rows=None,
        columns=None,
        index=as_int32(place * side * side + (row % side) * side + column % side, device),
        bounds=torch.empty(0, dtype=torch.int64),
        tile_rows=0,
        block=side,
        block_rows=as_int32(blocks // grid_columns, device),
        block_columns=as_int32(blocks % grid_columns, device),
    )


class KeptInput:
    """What is kept of a layer's input for backward: its columns with entries, as it is multiplied.

    Under autocast a float32 input is kept in bfloat16, as the layer's own product reads it. Layers
    that read the same tensor and keep the same columns share one copy. It is autograd's: held here
    it would outlive backward, and under checkpointing be all layers' at once.
    """

    def __init__(self, inputs: Tensor | None) -> None:
        self._inputs = inputs
        self._source: TensorWeakRef | None = None
        self._copy: TensorWeakRef | None = None

    def take(self, source: Tensor) -> Tensor:
        """The part (..., j) of ``source`` (..., in), detached."""
        dtype = compute_dtype(source) if source.dtype == torch.float32 else source.dtype
        if self._inputs is None and source.dtype == dtype:
            return source.detach()
        if torch.compiler.is_compiling():  # the compiler finds equal copies by itself
            return self._make(source, dtype)
        if self._source is not None and self._copy is not None and self._source() is source:
            copy: Tensor | None = self._copy()
            if copy is not None and copy.dtype == dtype:
                return copy
        made = self._make(source, dtype)
        self._source, self._copy = TensorWeakRef(source), TensorWeakRef(made)
        return made

    def _make(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        part = source.detach()
        if self._inputs is not None:
            part = part.index_select(-1, self._inputs)
        return part.to(dtype)


def tap(
    output: Tensor, source: Tensor, values: Tensor, plan: Plan, kept: KeptInput | None = None
) -> Tensor:
    """Return ``output``, through which ``values`` get the gradient of their weight's entries.

    Args:
        output: The layer's output (..., out).
        source: Its input (..., in).
        values: The trained values (k,), float32; not read, they are in the weight.
        plan: From :func:`make_plan`.
        kept: Takes what is kept of the input; left out: by itself.
    """
    result: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
        output,
        (kept or KeptInput(plan.inputs)).take(source),
        values,
        plan.outputs,
        plan.index,
        plan.bounds,
        plan.tile_rows,
        plan.width,
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
        width: int,
        block: int,
        block_rows: Tensor | None,
        block_columns: Tensor | None,
        input_dim: int,
    ) -> Tensor:
        ctx.save_for_backward(source, outputs, index, bounds, block_rows, block_columns)
        ctx.settings = tile_rows, width, block, input_dim
        ctx.num_values, ctx.dtype = values.numel(), values.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        source, outputs, index, bounds, block_rows, block_columns = ctx.saved_tensors
        tile_rows, width, block, input_dim = ctx.settings
        used = grad_output if outputs is None else grad_output.index_select(-1, outputs)
        inner = source.flatten(0, -2).to(used.dtype), used.flatten(0, -2)
        left, right = inner if input_dim == 0 else inner[::-1]
        if block > 1:
            grad = selected_blocks(left, right, index, block_rows, block_columns, block)
        else:
            grad = selected_entries(left, right, index, bounds, tile_rows, width, ctx.num_values)
        grad_values = grad.to(ctx.dtype)
        passed = grad_output if ctx.needs_input_grad[0] else None
        return passed, None, grad_values, *([None] * 9)


@torch.library.custom_op("samara::selected_entries", mutates_args=())
def selected_entries(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    bounds: Tensor,
    tile_rows: int,
    width: int,
    num_values: int,
) -> Tensor:
    """Entries of L^T R, by dots or by tiles of rows: (k,) float32, or float64 for float64.

    Args:
        left: L (n, r).
        right: R (n, c).
        index: Positions in L^T R (k,), int32, ascending; empty: all of its first columns.
        bounds: Entries before each tile.
        tile_rows: Rows of a tile.
        width: How many columns these are; what follows fills R up.
        num_values: k.
    """
    if takes_dots(left, right, index):
        return _dots(left, right, index)
    stride = right.shape[1]
    out = torch.empty(num_values, dtype=_exact(left), device=left.device)
    edges = bounds.tolist()
    for tile, (low, high) in enumerate(itertools.pairwise(edges)):
        if low == high:
            continue
        first = tile * tile_rows
        dense = left[:, first : first + tile_rows].T @ right
        if index.numel():
            places = index[low:high] - first * stride if first else index[low:high]
            out[low:high] = dense.flatten().index_select(0, places)
        else:
            out[low:high].view(-1, width).copy_(dense[: (high - low) // width, :width])
    return out


@selected_entries.register_fake
def _(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    bounds: Tensor,
    tile_rows: int,
    width: int,
    num_values: int,
) -> Tensor:
    del right, index, bounds, tile_rows, width
    return left.new_empty(num_values, dtype=_exact(left))


def takes_dots(left: Tensor, right: Tensor, index: Tensor) -> bool:
    """Whether so few entries are asked for that their own products are less work than all."""
    tokens, rows, columns = left.shape[0], left.shape[1], right.shape[1]
    exact = _exact(left).itemsize
    return (
        left.device.type == "cpu"
        and 0 < index.numel() <= DOTS_SHARE.get(left.dtype, 0.0) * rows * columns
        and exact * tokens * (rows + columns) <= WORKSPACE_BYTES  # L and R are turned around
    )


def _dots(left: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """Entries of L^T R, each by itself, in float32 or better."""
    exact, columns = _exact(left), right.shape[1]
    # A column of L or R is then a row, which is read at once.
    left_rn, right_cn = (side.T.to(exact).contiguous() for side in (left, right))
    out = torch.empty(index.numel(), dtype=exact, device=left.device)
    size = max(1, DOTS_BYTES // (2 * exact.itemsize * max(1, left.shape[0])))
    for span in (slice(first, first + size) for first in range(0, index.numel(), size)):
        l_k1n = left_rn.index_select(0, index[span] // columns)[:, None, :]
        r_kn1 = right_cn.index_select(0, index[span] % columns)[:, :, None]
        out[span] = torch.bmm(l_k1n, r_kn1).flatten()
    return out


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


@register_flop_formula(torch.ops.samara.selected_entries, get_raw=True)
def _flops(left: Tensor, right: Tensor, index: Tensor, *_: Any, **__: Any) -> int:
    if takes_dots(left, right, index):
        return 2 * left.shape[0] * index.numel()
    return 2 * left.numel() * right.shape[1]


@register_flop_formula(torch.ops.samara.selected_blocks)
def _block_flops(
    left_shape: torch.Size, right_shape: torch.Size, index_shape: torch.Size, *_: Any, **__: Any
) -> int:
    del right_shape
    return 2 * left_shape[0] * index_shape[0]
