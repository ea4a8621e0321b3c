"""Supports: which entries of which tensors are trained.

The coordinate of an entry is its flat row-major position in the tensor as the checkpoint stores it,
under the tensor's name there. Delta files and training share this form; what training adds (slices,
tiles, blocks) is derived from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samara.errors import CheckpointError
from samara.runs import write_bytes

SCHEMA = "1"


@dataclass(frozen=True, kw_only=True)
class TensorSupport:
    """The selected entries of one tensor.

    Attributes:
        shape: Of the tensor.
        index: Flat row-major positions, int64 on the CPU, strictly ascending.
        block: Side of the square blocks that the entries form; 1: none in particular.
    """

    shape: tuple[int, ...]
    index: Tensor
    block: int = 1

    @property
    def density(self) -> float:
        """Share of the tensor's entries."""
        return self.index.numel() / max(1, torch.Size(self.shape).numel())


@dataclass(frozen=True, kw_only=True)
class Support:
    """The selected entries of a model, by tensor name; tensors without any are left out."""

    tensors: Mapping[str, TensorSupport]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def indices(self) -> dict[str, Tensor]:
        """Flat ascending positions by tensor name: what a delta file stores."""
        return {name: tensor.index for name, tensor in self.tensors.items()}

    @property
    def num_entries(self) -> int:
        """Selected entries of all tensors."""
        return sum(tensor.index.numel() for tensor in self.tensors.values())

    @property
    def support_id(self) -> str:
        """SHA-256 over names, shapes and positions: equal supports, equal ids."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            head = json.dumps([name, list(tensor.shape), tensor.index.numel()])
            digest.update(head.encode("utf-8") + b"\n")
            digest.update(tensor.index.numpy().astype("<u8").tobytes())
        return digest.hexdigest()

    def including(self, other: Support) -> Support:
        """The union of both; blocks are kept where both have the same."""
        merged = dict(self.tensors)
        for name, theirs in other.tensors.items():
            ours = merged.get(name)
            if ours is not None:
                index = torch.unique(torch.cat([ours.index, theirs.index]))
                block = ours.block if ours.block == theirs.block else 1
                theirs = TensorSupport(shape=ours.shape, index=index, block=block)
            merged[name] = theirs
        return Support(tensors=merged)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        shapes = {
            name: {"shape": list(tensor.shape), "block": tensor.block}
            for name, tensor in self.tensors.items()
        }
        metadata = {"schema": SCHEMA, "support_id": self.support_id, "tensors": json.dumps(shapes)}
        write_bytes(path, save(self.indices, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Support:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, damaged, or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("schema") != SCHEMA:
                    raise CheckpointError(
                        f"{path}: schema {metadata.get('schema')!r} is not {SCHEMA}, the one of "
                        "supports that this version reads"
                    )
                fields = json.loads(metadata["tensors"])
                support = cls(
                    tensors={
                        name: TensorSupport(
                            shape=tuple(fields[name]["shape"]),
                            index=file.get_tensor(name),
                            block=fields[name]["block"],
                        )
                        for name in file.keys()  # noqa: SIM118 - not a mapping
                    }
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as a support: {error}") from error
        if support.support_id != metadata["support_id"]:
            raise CheckpointError(f"{path}: was altered, its support_id is not the recorded one")
        return support


def whole(shape: tuple[int, ...]) -> TensorSupport:
    """All entries of a tensor."""
    return TensorSupport(shape=shape, index=torch.arange(torch.Size(shape).numel()))
