"""A delta in memory: per tensor the touched positions and what happens to the bits there.

Four modes say how the stored value v turns base bits b into new bits n, all modulo the width:

* ``ulp`` (the default): n = b + s, where v is the step s in zigzag form (0, -1, 1, -2, … become
  0, 1, 2, 3, …). For weights of one sign, s counts the representable numbers passed.
* ``xor``: n = b XOR v. Its own inverse, so the stack of applied deltas must know what is applied.
* ``overwrite``: n = v, optionally with b stored as well.
* ``additive``: n = round(b + v), v in float32; for a base in another type or quantised. Inexact
  by nature, and still revertible from the undo log.

All but the last are bijections of bit patterns: NaN payloads, infinities and -0.0 come back as they
were. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from samara.errors import LicenseDenied
from samara.registry.records import License
from samara.sparse.delta_codec import Bits, Indices, Shape
from samara.sparse.delta_records import Dtype, Mode, Record

WORDS: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}
"""Unsigned integer as wide as each type of weight."""
FLOAT_BITS = np.dtype("<u4")
"""Type of ``additive`` values: the bits of a float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorDelta:
    """One tensor's changes.

    Attributes:
        name: In the checkpoint.
        shape: Of the whole tensor.
        dtype: ``BF16``, ``F16`` or ``F32``.
        indices: int64 (nnz,), ascending flat row-major positions.
        values: Unsigned (nnz,), what the mode makes of them; in ``additive`` mode float32 bits.
        original: Unsigned (nnz,), the base's bits, where an ``overwrite`` delta keeps them.
        sel_pre: xxh128 over the touched entries' bits before; None in ``additive`` mode.
        sel_post: The same after.
        pre_sha256: SHA-256 of the whole tensor before, if known.
        post_sha256: The same after.
    """

    name: str
    shape: Shape
    dtype: Dtype
    indices: Indices
    values: Bits
    original: Bits | None = None
    sel_pre: str | None = None
    sel_post: str | None = None
    pre_sha256: str | None = None
    post_sha256: str | None = None

    @property
    def nnz(self) -> int:
        """Number of touched entries."""
        return len(self.indices)


@dataclass(frozen=True, kw_only=True, eq=False)
class DeltaData:
    """A whole delta: its record, and its tensors in the order of their names."""

    record: Record
    tensors: Sequence[TensorDelta]

    @property
    def id(self) -> str:
        """SHA-256 over what the delta does: mode, base, parent, positions, values."""
        return self.record.delta_id

    @property
    def mode(self) -> Mode:
        """How values turn base bits into new bits."""
        return self.record.mode

    @property
    def nnz(self) -> int:
        """Touched entries, all tensors together."""
        return sum(tensor.nnz for tensor in self.tensors)


def new_bits(base: Bits, tensor: TensorDelta, mode: Mode) -> Bits:
    """The bits that touched entries get.

    Args:
        base: Unsigned (nnz,), the entries' bits now.
        tensor: Whose values to use; of a mode other than ``additive``.
        mode: The delta's.
    """
    assert mode != "additive"
    if mode == "overwrite":
        return tensor.values
    if mode == "xor":
        return base ^ tensor.values
    return base + _unzigzag(tensor.values)


def values_between(base: Bits, new: Bits, mode: Mode) -> Bits:
    """The inverse of :func:`new_bits`: what to store so that ``base`` becomes ``new``."""
    assert mode != "additive"
    if mode == "overwrite":
        return new
    if mode == "xor":
        return base ^ new
    return _zigzag(new - base)


def _zigzag(step: Bits) -> Bits:
    """Small steps of either sign become small numbers; unsigned arithmetic wraps as it should."""
    sign = step >> (8 * step.dtype.itemsize - 1)
    coded: Bits = (step << 1) ^ np.negative(sign)
    return coded


def _unzigzag(value: Bits) -> Bits:
    step: Bits = (value >> 1) ^ np.negative(value & 1)
    return step


def hash_bits(bits: Bits) -> str:
    """xxh128 of bit patterns, little endian. It finds accidents, not attackers."""
    little = np.ascontiguousarray(bits.astype(bits.dtype.newbyteorder("<"), copy=False))
    return xxhash.xxh3_128_hexdigest(little.view(np.uint8).data)


def delta_id(
    *, mode: Mode, tensors_root: str, parent: str | None, tensors: Iterable[TensorDelta]
) -> str:
    """SHA-256 over what a delta does; codecs, compression and dates do not change it."""
    digest = hashlib.sha256()
    head = {"mode": mode, "tensors_root": tensors_root, "parent": parent}
    digest.update(_canonical(head))
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        known = {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "nnz": tensor.nnz,
        }
        digest.update(_canonical(known))
        digest.update(tensor.indices.astype("<u8").data)
        digest.update(np.ascontiguousarray(tensor.values).data)
    return digest.hexdigest()


def _canonical(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# --- licence ----------------------------------------------------------------------------------


def check_usable(delta: DeltaData) -> None:
    """Refuse to apply a delta whose licence record forbids its use.

    Raises:
        LicenseDenied: If it does.
    """
    if delta.record.license.use == "forbidden":
        raise LicenseDenied(
            f"delta {delta.id[:12]}: its licence record says use: forbidden"
            f"{_notice(delta.record.license)}; ask its makers"
        )


def check_publishable(delta: DeltaData) -> str | None:
    """Refuse to give away a delta whose licence record forbids it.

    Returns:
        A warning to show where the record permits it only inside a house, or does not say.

    Raises:
        LicenseDenied: If the record says ``redistribution: forbidden``.
    """
    license_ = delta.record.license
    subject = f"delta {delta.id[:12]}: its licence record says redistribution: "
    if license_.redistribution == "forbidden":
        raise LicenseDenied(f"{subject}forbidden{_notice(license_)}; it may not be published")
    if license_.redistribution == "internal":
        return f"{subject}internal; do not give it to others"
    if license_.redistribution == "unknown":
        return f"{subject}unknown; find out before you give it to others"
    return None


def _notice(license_: License) -> str:
    return f" ({license_.notice})" if license_.notice else ""
