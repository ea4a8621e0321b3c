"""Tensors of a checkpoint, described but not yet loaded.

A conversion renames, splits, joins and casts tensors. Done on these descriptions, it needs the
memory of one shard, not of two models: nothing is read before it is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samara.errors import CheckpointError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor: what it will be, and how to get it.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        load: Reads it; each call reads anew.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in memory and on disk."""
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredTensor:
        """The tensor after a function that keeps its shape and type."""
        return StoredTensor(
            shape=self.shape, dtype=self.dtype, load=lambda: function(self.load()).contiguous()
        )


Tensors = Mapping[str, StoredTensor]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and so on."""
    return str(dtype).removeprefix("torch.")


def in_memory(tensor: Tensor) -> StoredTensor:
    """Describe a tensor that is there already."""
    return StoredTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, load=lambda: tensor)


def cast(name: str, tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """The tensor in another type; values that float16 cannot hold are refused when it is loaded."""
    if tensor.dtype == dtype:
        return tensor

    def load() -> Tensor:
        value = tensor.load()
        result = value.to(dtype)
        if bool((value.isfinite() & ~result.isfinite()).any()):
            largest = value.abs().max().item()
            raise CheckpointError(
                f"{name}: holds {largest:.4g}, more than {dtype_name(dtype)} can; use bfloat16"
            )
        return result

    return StoredTensor(shape=tensor.shape, dtype=dtype, load=load)


def join_rows(name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
    """Matrices one below the other, as one.

    Raises:
        CheckpointError: If they are of several types.
    """
    dtypes = sorted({dtype_name(part.dtype) for part in parts})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{name}: its parts are of several types ({', '.join(dtypes)}); give one with dtype"
        )
    return StoredTensor(
        shape=(sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        dtype=parts[0].dtype,
        load=lambda: torch.cat([part.load() for part in parts]),
    )


def split_rows(tensor: StoredTensor, counts: Sequence[int]) -> list[StoredTensor]:
    """The inverse of :func:`join_rows`: blocks of so many rows."""
    assert sum(counts) == tensor.shape[0]
    ends = list(itertools.accumulate(counts))

    def block(start: int, end: int) -> StoredTensor:
        return StoredTensor(
            shape=(end - start, *tensor.shape[1:]),
            dtype=tensor.dtype,
            load=lambda: tensor.load()[start:end].contiguous(),
        )

    return [block(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def check_fit(folder: Path, *, found: Tensors, expected: Tensors) -> None:
    """Compare names and shapes with what the configuration asks for.

    Raises:
        CheckpointError: At the first difference.
    """
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("holds unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            raise CheckpointError(
                f"{folder}: {problem} {len(names)} tensor(s) for its config.json, such as "
                f"{names[0]}; the weights and config.json are of different models"
            )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(found[name].shape)}, config.json asks for "
                f"{list(tensor.shape)}; the weights and config.json are of different models"
            )
