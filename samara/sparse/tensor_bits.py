"""Weights as bit patterns: read and written at flat positions, hashed, named as a checkpoint does.

A tensor is known by its name in the checkpoint; one that is stored once and used under two names
(tied embeddings) counts once. Positions are row-major whatever the strides of the live tensor.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from samara.errors import ShapeMismatch, TiedTensorDuplicate
from samara.runs import hash_json
from samara.sparse.delta_codec import Bits, Indices, Shape
from samara.sparse.delta_data import WORDS

CODES: Mapping[torch.dtype, str] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types by safetensors' names, which are those of the checkpoint."""
DTYPES = {code: dtype for dtype, code in CODES.items()}
_SIGNED = {2: torch.int16, 4: torch.int32}
COMPILED = "_orig_mod"


@dataclass(frozen=True, kw_only=True)
class TensorDigest:
    """What identifies a tensor's content."""

    dtype: str
    shape: Shape
    sha256: str


class TensorSource(Protocol):
    """A set of weights, wherever they are: in a model, in a mapping, in a folder."""

    def shape(self, name: str) -> Shape:
        """Shape of a tensor; ShapeMismatch if there is none."""

    def dtype(self, name: str) -> str:
        """Its type by safetensors' name."""

    def read(self, name: str, indices: Indices) -> Bits:
        """Its bits at flat positions."""


# --- bits -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entries:
    """Entries of a live tensor: a flat window on its storage, and where in it they lie.

    On the CPU numpy writes them, on one thread: where other programs keep a core busy, torch's
    threads wait for each other longer than the writing takes (a model of 1.2 B weights: 0.3 s of
    the processor instead of 0.06 s).
    """

    window: Tensor
    positions: Tensor

    def read(self) -> Bits:
        """The bits now, on the host."""
        found = self.window.index_select(0, self.positions).cpu().numpy()
        bits: Bits = found.view(np.dtype(f"<u{found.dtype.itemsize}"))
        return bits

    def write(self, bits: Bits) -> None:
        """Set the bits; the storage stays where it is."""
        signed = bits.view(np.dtype(f"<i{bits.dtype.itemsize}"))
        if self.window.device.type == "cpu":
            self.window.numpy()[self.positions.numpy()] = signed
        else:
            values = torch.from_numpy(signed).to(self.window.device)
            self.window.index_copy_(0, self.positions, values)


def entries(tensor: Tensor, indices: Indices) -> Entries:
    """Entries of a floating-point tensor at row-major positions, whatever its strides."""
    tensor = tensor.detach()
    positions = torch.from_numpy(indices)
    if tensor.is_contiguous():
        window = tensor.view(-1)
    else:
        reach = sum(
            (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        window = tensor.as_strided((reach + 1,), (1,), tensor.storage_offset())
        places = torch.unravel_index(positions, tensor.shape)
        positions = sum(
            (place * step for place, step in zip(places, tensor.stride(), strict=True)),
            torch.zeros_like(positions),
        )
    return Entries(
        window=window.view(_SIGNED[tensor.dtype.itemsize]), positions=positions.to(tensor.device)
    )


def to_float32(bits: Bits, dtype: str) -> Tensor:
    """Bit patterns of a type as numbers, exactly; float32 (nnz,) on the host."""
    signed = torch.from_numpy(bits.view(np.dtype(f"<i{bits.dtype.itemsize}")))
    return signed.view(DTYPES[dtype]).to(torch.float32)


def from_float32(values: Tensor, dtype: str) -> Bits:
    """Numbers as bit patterns of a type, rounded to nearest even."""
    signed = values.to(DTYPES[dtype]).view(_SIGNED[DTYPES[dtype].itemsize]).numpy()
    return signed.view(WORDS[dtype])


# --- identity ---------------------------------------------------------------------------------


def sha256_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, TensorDigest]:
    """Content hashes of all tensors; reads every byte, on several threads."""

    def digest(tensor: Tensor) -> TensorDigest:
        code = CODES[tensor.dtype]
        return TensorDigest(dtype=code, shape=tuple(tensor.shape), sha256=sha256_tensor(tensor))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(tensors, threads.map(digest, tensors.values()), strict=True))


def tensors_root(found: Mapping[str, TensorDigest]) -> str:
    """SHA-256 over name, type, shape and content hash of every tensor, in the order of names."""
    return hash_json(
        [[name, d.dtype, list(d.shape), d.sha256] for name, d in sorted(found.items())]
    )


# --- names ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NamedTensors:
    """Tensors under the names of the checkpoint, each storage once; a :class:`TensorSource`.

    Attributes:
        tensors: By name.
        aliases: Other names of theirs, to the name they stand under.
        copied: Names that the model holds in another layout (experts fused into one tensor): what
            is here is a copy to read.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    copied: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Tensor:
        if name in self.aliases:
            raise TiedTensorDuplicate(
                f"{name}: is the same tensor as {self.aliases[name]}, which the checkpoint stores "
                f"it by; change it under that name alone"
            )
        if name not in self.tensors:
            raise ShapeMismatch(f"{name}: the model has no such tensor; it is another model")
        return self.tensors[name]

    def live(self, name: str) -> Tensor:
        """A tensor to write to.

        Raises:
            ShapeMismatch: If the model does not hold it as the checkpoint stores it.
        """
        if name in self.copied:
            raise ShapeMismatch(
                f"{name}: the loaded model holds it fused with others, so it cannot be changed in "
                "place; change the model's folder instead (`samara delta apply`) and load it again"
            )
        return self[name]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return tuple(self[name].shape)

    def dtype(self, name: str) -> str:
        """Its type by safetensors' name."""
        return CODES[self[name].dtype]

    def read(self, name: str, indices: Indices) -> Bits:
        """Its bits at flat positions."""
        return entries(self[name], indices).read()


def named_tensors(tensors: Mapping[str, Tensor], *, tied: Iterable[str] = ()) -> NamedTensors:
    """Keep every storage once.

    Args:
        tensors: By name, tied ones under all of theirs.
        tied: Names that the checkpoint does not store; of a storage with several other names the
            first one stays.
    """
    never_stored = set(tied)
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
        # Tensors without a storage of their own (empty, meta) share address 0 and nothing else.
        groups.setdefault(place if tensor.data_ptr() else name, []).append(name)
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for names in groups.values():
        first = next((name for name in names if name not in never_stored), names[0])
        kept[first] = tensors[first]
        aliases |= {name: first for name in names if name != first}
    return NamedTensors(tensors=kept, aliases=aliases)


def model_tensors(model: nn.Module) -> NamedTensors:
    """The live tensors of a model, as its checkpoint names them.

    Some of transformers' models hold their weights under other names, or fused, and undo that when
    they are saved; the same is done here, on views where that is possible.
    """
    from transformers import PreTrainedModel  # seconds, for those who only read files
    from transformers.core_model_loading import revert_weight_conversion

    # What torch.compile returns is a wrapper, which prefixes every name.
    original = getattr(model, COMPILED, model)
    state = {name: tensor.detach() for name, tensor in original.state_dict(keep_vars=True).items()}
    if not isinstance(original, PreTrainedModel):
        return named_tensors(state)
    known = named_tensors(state, tied=original.all_tied_weights_keys)
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    stored = revert_weight_conversion(original, dict(known.tensors))
    copied = (
        name
        for name, tensor in stored.items()
        if tensor.untyped_storage().data_ptr() not in storages
    )
    return NamedTensors(tensors=stored, aliases=known.aliases, copied=frozenset(copied))


def check_entry_shape(source: TensorSource, name: str, shape: Shape, dtype: str | None) -> None:
    """Refuse a tensor that is not the one a delta was made for.

    Args:
        source: The weights.
        name: Of the tensor.
        shape: What it must have.
        dtype: What it must be; None: any floating-point type.

    Raises:
        ShapeMismatch: If there is no such tensor, or of another shape or type.
    """
    found = source.shape(name)
    if found != shape:
        raise ShapeMismatch(
            f"{name}: has shape {list(found)}, the delta was made for {list(shape)}; it is another "
            "model"
        )
    kind = source.dtype(name)
    if dtype is None and kind not in WORDS:
        raise ShapeMismatch(
            f"{name}: is {kind}, which no delta can change; load the model in {', '.join(WORDS)}"
        )
    if dtype is not None and kind != dtype:
        raise ShapeMismatch(
            f"{name}: is {kind}, the delta was made for {dtype}; load the model in that type"
        )


def num_entries(shape: Shape) -> int:
    """Number of values in a tensor of a shape."""
    return math.prod(shape)
