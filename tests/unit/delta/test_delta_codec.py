"""Positions and values come back as they went in, in the codec that suits them."""

from __future__ import annotations

import numpy as np
import pytest

from samara.errors import CorruptDelta
from samara.sparse.delta_codec import (
    CodedIndices,
    CodedValues,
    decode_indices,
    decode_values,
    encode_indices,
    encode_values,
)

SHAPE = (64, 96)
GRID = np.arange(64 * 96).reshape(SHAPE)


def scattered(count: int, size: int = 64 * 96) -> np.ndarray:
    return np.sort(np.random.default_rng(0).choice(size, count, replace=False)).astype(np.int64)


@pytest.mark.parametrize(
    ("indices", "codec"),
    [
        (np.arange(17, 60), "range"),
        (GRID[[3, 9, 40]].ravel(), "rows"),
        (np.sort(GRID[:, [1, 50]].ravel()), "cols"),
        (np.sort(GRID[32:48, 16:32].ravel()), "block"),
        (np.sort(np.r_[GRID[4:8, 8:12].ravel(), GRID[40:44, 4:8].ravel()]), "block"),
        (scattered(500), "rice"),
        (np.empty(0, np.int64), "rice"),
        (np.arange(0, 6000, 100), "gap_u16z"),  # equal gaps: zstd sees the pattern
    ],
)
def test_positions_come_back_in_the_codec_that_suits_them(indices, codec):
    indices = indices.astype(np.int64)
    coded = encode_indices(indices, SHAPE)
    assert coded.codec == codec
    assert np.array_equal(decode_indices(coded, nnz=len(indices), shape=SHAPE), indices)


def test_blocks_at_the_edge_are_cut():
    shape = (10, 13)
    grid = np.arange(130).reshape(shape)
    indices = np.sort(np.r_[grid[8:10, 12:13].ravel(), grid[0:4, 0:4].ravel()])
    coded = encode_indices(indices, shape)
    assert coded.params["size"] == 4
    assert np.array_equal(decode_indices(coded, nnz=len(indices), shape=shape), indices)


@pytest.mark.parametrize("gap", [0, 1, 65534, 65535, 65536, 131070, 200000])
@pytest.mark.parametrize("codec", ["gap_u16z", "rice"])
def test_gaps_around_the_escape_code_come_back(gap, codec):
    from samara.sparse import delta_codec

    indices = np.cumsum(np.array([gap, gap, 5, gap]) + 1) - 1
    gaps = np.diff(indices, prepend=-1) - 1
    data = (
        delta_codec._encode_u16(gaps) if codec == "gap_u16z" else delta_codec._encode_rice(gaps, 3)
    )
    coded = CodedIndices(codec=codec, params={"b": 3}, data=data)
    assert np.array_equal(decode_indices(coded, nnz=4, shape=(10**6,)), indices)


def test_scattered_positions_take_the_bytes_of_the_entropy_bound():
    indices = scattered(83886, 4096 * 4096)
    coded = encode_indices(indices, (4096, 4096))
    assert len(coded.data) / len(indices) < 1.145  # the bound at 0.5 % is 1.135


@pytest.mark.parametrize(
    "coded",
    [
        CodedIndices(codec="rice", params={"b": 3}, data=b"\xff\xff"),
        CodedIndices(codec="rice", params={"b": 99}, data=b"\x00" * 40),
        CodedIndices(codec="rice", params={}, data=b"\x00" * 40),
        CodedIndices(codec="rice", params={"b": "x"}, data=b"\x00" * 40),
        CodedIndices(codec="gap_u16z", params={}, data=b"no zstd frame"),
        CodedIndices(codec="range", params={"start": 6140, "count": 10}, data=b""),
        CodedIndices(codec="rows", params={}, data=b"\x40\x00\x00\x00"),
        CodedIndices(codec="cols", params={}, data=b"\x60\x00\x00\x00"),
        CodedIndices(codec="cols", params={}, data=b"\x60\x00"),
        CodedIndices(
            codec="block", params={"size": 0, "nnz": 1, "ids": "rice", "b": 0}, data=b"\x00"
        ),
        CodedIndices(codec="block", params={"size": 4, "nnz": 1, "ids": "rows"}, data=b"\x00"),
    ],
    ids=lambda coded: f"{coded.codec}-{coded.params}",
)
def test_damaged_positions_are_refused(coded):
    with pytest.raises(CorruptDelta):
        decode_indices(coded, nnz=10, shape=SHAPE)


def test_more_entries_than_the_tensor_has_are_refused():
    with pytest.raises(CorruptDelta, match="do not fit"):
        decode_indices(CodedIndices(codec="rice", params={"b": 0}, data=b""), nnz=7, shape=(2, 3))


def test_a_frame_that_says_it_is_huge_is_not_opened():
    import zstandard

    data = zstandard.ZstdCompressor().compress(b"\x00" * 10**7)
    with pytest.raises(CorruptDelta, match="longer than it can be"):
        decode_values(CodedValues(comp="zstd", data=data), nnz=4, dtype=np.dtype("<u2"))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("largest", [3, 2**16 - 1])
def test_values_come_back(dtype, largest):
    values = np.random.default_rng(0).integers(0, largest, 1000).astype(dtype)
    coded = encode_values(values)
    found = decode_values(coded, nnz=1000, dtype=np.dtype(dtype))
    assert np.array_equal(found, values)
    assert found.dtype == values.dtype


def test_values_that_do_not_compress_are_stored():
    values = np.random.default_rng(0).integers(0, 2**16, 1000).astype("<u2")
    assert encode_values(values).comp == "stored"
    with pytest.raises(CorruptDelta, match="1000 entries take 2000"):
        decode_values(CodedValues(comp="stored", data=b"123"), nnz=1000, dtype=np.dtype("<u2"))
