"""How a delta file writes positions and values: a few bits each, and back without loss.

Positions are ascending flat row-major indices; what is coded is the gap to the one before,
``gap_0 = index_0`` and ``gap_j = index_j - index_{j-1} - 1``:

* ``gap_u16z``: 16-bit codes, 65535 meaning "65535 more, and go on"; all low bytes, then all high
  bytes, then zstd.
* ``rice``: parameter b; ``gap >> b`` in unary (ones, then a zero), then the b low bits. The unary
  parts of all gaps come first, the low bits after them, each run padded to whole bytes, so that
  both decode without a loop over entries. The size is that of the usual interleaved form.
* ``block``: a union of whole s x s blocks, as the gaps of their numbers in the grid of blocks.
* ``cols``, ``rows``: a union of whole columns or rows, as 32-bit numbers.
* ``range``: one run, as its start and length.

Values are bit patterns, split into byte planes (all lowest bytes first) and compressed. What they
mean depends on the delta's mode (:mod:`samara.sparse.delta_data`); where a weight moved little,
XOR with the base, and even more so the difference to it, leave the high bytes almost all zero.
Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from samara.errors import CorruptDelta
from samara.sparse.delta_records import Compression, IndexCodec

Indices = npt.NDArray[np.int64]
Bits = npt.NDArray[np.unsignedinteger[Any]]
Shape = tuple[int, ...]

ESCAPE = 65535
"""Code of ``gap_u16z`` that adds its value and ends no gap."""
BLOCK_SIZES = (16, 4)
ZSTD_LEVEL = 3
_MAX_RICE_PARAMETER = 48


@dataclass(frozen=True, kw_only=True)
class CodedIndices:
    """Positions as a file holds them."""

    codec: IndexCodec
    params: dict[str, Any]
    data: bytes


@dataclass(frozen=True, kw_only=True)
class CodedValues:
    """Bit patterns as a file holds them."""

    comp: Compression
    data: bytes


# --- positions --------------------------------------------------------------------------------


def encode_indices(indices: Indices, shape: Shape) -> CodedIndices:
    """Write positions in the smallest of the codecs that can express them.

    Args:
        indices: Ascending, without repeats, each below the number of entries of ``shape``.
        shape: Of the tensor.
    """
    if len(indices) and len(indices) == indices[-1] - indices[0] + 1:
        params = {"start": int(indices[0]), "count": len(indices)}
        return CodedIndices(codec="range", params=params, data=b"")
    choices = [_encode_scattered(indices)]
    rows, cols = _matrix(shape)
    if len(indices) and rows > 1 and cols > 1:
        choices += _encode_structured(indices, rows, cols)
    return min(choices, key=lambda coded: len(coded.data))


def decode_indices(coded: CodedIndices, *, nnz: int, shape: Shape) -> Indices:
    """Read positions back.

    Raises:
        CorruptDelta: If they are not ``nnz`` ascending positions inside ``shape``.
    """
    size = math.prod(shape)
    if not 0 <= nnz <= size:
        raise CorruptDelta(f"{nnz} entries do not fit a tensor of shape {list(shape)}")
    try:
        indices = _DECODERS[coded.codec](coded, nnz, shape)
    except (KeyError, TypeError, ValueError, OverflowError, zstandard.ZstdError) as error:
        raise CorruptDelta(f"positions cannot be read ({error})") from None
    ascending = len(indices) < 2 or bool((np.diff(indices) > 0).all())
    inside = len(indices) == 0 or (indices[0] >= 0 and indices[-1] < size)
    if len(indices) != nnz or not ascending or not inside:
        raise CorruptDelta(f"positions are not {nnz} ascending numbers below {size}")
    return indices


def _encode_scattered(indices: Indices) -> CodedIndices:
    gaps = np.diff(indices, prepend=np.int64(-1)) - 1
    rice_parameter = _rice_parameter(gaps)
    rice = CodedIndices(
        codec="rice", params={"b": rice_parameter}, data=_encode_rice(gaps, rice_parameter)
    )
    plain = CodedIndices(codec="gap_u16z", params={}, data=_encode_u16(gaps))
    return rice if len(rice.data) <= len(plain.data) else plain


def _encode_structured(indices: Indices, rows: int, cols: int) -> list[CodedIndices]:
    """The codecs of whole rows, columns or blocks, where the positions are a union of such."""
    row, col = indices // cols, indices % cols
    found = []
    row_ids, col_ids = _present(row, rows), _present(col, cols)
    if len(indices) == len(row_ids) * cols:
        found.append(CodedIndices(codec="rows", params={}, data=row_ids.astype("<u4").tobytes()))
    if len(indices) == len(col_ids) * rows:
        found.append(CodedIndices(codec="cols", params={}, data=col_ids.astype("<u4").tobytes()))
    for size in BLOCK_SIZES:
        height, width = -(-rows // size), -(-cols // size)
        blocks = _present(row // size * width + col // size, height * width)
        # The blocks hold all positions; where they hold no more, they are the positions.
        heights = np.minimum(size, rows - blocks // width * size)
        widths = np.minimum(size, cols - blocks % width * size)
        if int(heights @ widths) == len(indices):
            inner = _encode_scattered(blocks)
            params = {"size": size, "nnz": len(blocks), "ids": inner.codec, **inner.params}
            found.append(CodedIndices(codec="block", params=params, data=inner.data))
            break
    return found


def _present(numbers: Indices, count: int) -> Indices:
    """The distinct ones of many numbers below ``count``, ascending; no sorting."""
    mask = np.zeros(count, bool)
    mask[numbers] = True
    return np.flatnonzero(mask)


def _matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: the first axis against all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _block_entries(blocks: Indices, size: int, rows: int, cols: int) -> Indices:
    """Ascending flat positions of the entries of ``size`` x ``size`` blocks; edges may be cut."""
    width = -(-cols // size)
    offsets = np.arange(size)
    row = (blocks // width * size)[:, None, None] + offsets[None, :, None]
    col = (blocks % width * size)[:, None, None] + offsets[None, None, :]
    inside = (row < rows) & (col < cols)
    return np.sort((row * cols + col)[inside])


def _rice_parameter(gaps: Indices) -> int:
    mean = float(gaps.mean()) if len(gaps) else 0.0
    return max(0, round(math.log2(math.log(2) * mean))) if mean > 0 else 0


def _encode_rice(gaps: Indices, b: int) -> bytes:
    ends = np.cumsum((gaps >> b) + 1)
    unary = np.ones(int(ends[-1]) if len(gaps) else 0, np.uint8)
    unary[ends - 1] = 0
    low = ((gaps[:, None] >> np.arange(b)) & 1).astype(np.uint8)
    return (
        np.packbits(unary, bitorder="little").tobytes()
        + np.packbits(low, bitorder="little").tobytes()
    )


def _decode_rice(data: bytes, b: int, nnz: int) -> Indices:
    if not 0 <= b <= _MAX_RICE_PARAMETER:
        raise ValueError(f"Rice parameter {b}")
    low_bytes = -(-nnz * b // 8)
    split = len(data) - low_bytes
    if split < 0:
        raise ValueError("cut short")
    raw = np.frombuffer(data, np.uint8)
    unary = np.unpackbits(raw[:split], bitorder="little")
    ends = np.flatnonzero(unary == 0)[:nnz]
    if len(ends) < nnz:
        raise ValueError("cut short")
    low = np.unpackbits(raw[split:], bitorder="little", count=nnz * b).reshape(nnz, b)
    high = np.diff(ends, prepend=-1) - 1
    # Bit by bit: one column of 0 and 1 at a time keeps the memory at a few numbers an entry.
    gaps = high.astype(np.int64) << b
    for bit in range(b):
        gaps |= low[:, bit].astype(np.int64) << bit
    return gaps


def _encode_u16(gaps: Indices) -> bytes:
    ends = np.cumsum(gaps // ESCAPE + 1)
    codes = np.full(int(ends[-1]) if len(gaps) else 0, ESCAPE, "<u2")
    codes[ends - 1] = gaps % ESCAPE
    return _compress(_planes(codes))


def _decode_u16(data: bytes, nnz: int, size: int) -> Indices:
    # Each gap has one code that ends it, and `size` bounds the sum of those that do not.
    longest = 2 * (nnz + size // ESCAPE)
    plain = _decompress(data, longest)
    codes = _join_planes(plain, np.dtype("<u2")).astype(np.int64)
    ends = np.flatnonzero(codes != ESCAPE)
    if len(ends) != nnz or (nnz and ends[-1] != len(codes) - 1):
        raise ValueError("wrong number of gaps")
    return np.diff(np.cumsum(codes)[ends], prepend=np.int64(0))


def _from_gaps(gaps: Indices) -> Indices:
    return np.cumsum(gaps + 1) - 1


def _decode_scattered(
    codec: str, params: Mapping[str, Any], data: bytes, nnz: int, size: int
) -> Indices:
    if codec == "rice":
        return _from_gaps(_decode_rice(data, int(params["b"]), nnz))
    if codec == "gap_u16z":
        return _from_gaps(_decode_u16(data, nnz, size))
    raise ValueError(f"codec {codec}")


def _scattered(coded: CodedIndices, nnz: int, shape: Shape) -> Indices:
    return _decode_scattered(coded.codec, coded.params, coded.data, nnz, math.prod(shape))


def _blocks(coded: CodedIndices, nnz: int, shape: Shape) -> Indices:
    rows, cols = _matrix(shape)
    size, count = int(coded.params["size"]), int(coded.params["nnz"])
    if size < 1 or not 0 <= count <= nnz:
        raise ValueError(f"{count} blocks of size {size}")
    grid = -(-rows // size) * -(-cols // size)
    blocks = _decode_scattered(coded.params["ids"], coded.params, coded.data, count, grid)
    if len(blocks) and not (blocks[0] >= 0 and blocks[-1] < grid):
        raise ValueError("block outside the tensor")
    return _block_entries(blocks, size, rows, cols)


def _lines(coded: CodedIndices, nnz: int, shape: Shape) -> Indices:
    del nnz
    rows, cols = _matrix(shape)
    ids = np.frombuffer(coded.data, "<u4").astype(np.int64)
    if coded.codec == "rows":
        return (ids[:, None] * cols + np.arange(cols)).ravel()
    if len(ids) and ids.max() >= cols:
        raise ValueError("column outside the tensor")
    return (np.arange(rows)[:, None] * cols + ids).ravel()


def _range(coded: CodedIndices, nnz: int, shape: Shape) -> Indices:
    start, count = int(coded.params["start"]), int(coded.params["count"])
    if count != nnz or not 0 <= start <= math.prod(shape) - count or coded.data:
        raise ValueError(f"range {start}, {count}")
    return np.arange(start, start + count, dtype=np.int64)


_DECODERS: dict[str, Callable[[CodedIndices, int, Shape], Indices]] = {
    "gap_u16z": _scattered,
    "rice": _scattered,
    "block": _blocks,
    "cols": _lines,
    "rows": _lines,
    "range": _range,
}


# --- values -----------------------------------------------------------------------------------


def encode_values(bits: Bits, *, comp: Compression | None = None) -> CodedValues:
    """Write bit patterns as byte planes; ``comp`` None: compressed where that is smaller."""
    planes = _planes(bits)
    packed = _compress(planes)
    if comp == "zstd" or (comp is None and len(packed) < len(planes)):
        return CodedValues(comp="zstd", data=packed)
    return CodedValues(comp="stored", data=planes)


def decode_values(coded: CodedValues, *, nnz: int, dtype: np.dtype[Any]) -> Bits:
    """Read bit patterns back.

    Raises:
        CorruptDelta: If they are not ``nnz`` patterns of ``dtype``.
    """
    size = nnz * dtype.itemsize
    try:
        planes = _decompress(coded.data, size) if coded.comp == "zstd" else coded.data
    except (ValueError, zstandard.ZstdError) as error:
        raise CorruptDelta(f"values cannot be read ({error})") from None
    if len(planes) != size:
        raise CorruptDelta(f"values take {len(planes)} bytes, {nnz} entries take {size}")
    return _join_planes(planes, dtype)


def _planes(bits: Bits) -> bytes:
    little = np.ascontiguousarray(bits.astype(bits.dtype.newbyteorder("<"), copy=False))
    return little.view(np.uint8).reshape(-1, little.dtype.itemsize).T.tobytes()


def _join_planes(data: bytes, dtype: np.dtype[Any]) -> Bits:
    if len(data) % dtype.itemsize:
        raise ValueError("cut short")
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    joined: Bits = np.array(planes.T, order="C").reshape(-1).view(dtype.newbyteorder("<"))
    return joined


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data)


def _decompress(data: bytes, longest: int) -> bytes:
    """Decompress at most ``longest`` bytes: a damaged size field must not fill the memory."""
    if zstandard.get_frame_parameters(data).content_size > longest:
        raise ValueError("longer than it can be")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=longest)
