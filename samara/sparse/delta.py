"""The public face of delta files: make one, load one, use one.

delta = samara.Delta.load("summaries.sdelta")
with delta.applied_to(model):
    model.generate(...)
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from samara.errors import DeltaError, ShapeMismatch, TiedTensorDuplicate
from samara.sparse.delta_apply import delta_stack
from samara.sparse.delta_codec import Bits, Indices
from samara.sparse.delta_data import (
    FLOAT_BITS,
    WORDS,
    DeltaData,
    TensorDelta,
    delta_id,
    hash_bits,
    values_between,
)
from samara.sparse.delta_file import delta_bytes, parse_delta, read_delta, write_delta
from samara.sparse.delta_records import Base, Dtype, Mode, Producer, Provenance, Record
from samara.sparse.tensor_bits import (
    CODES,
    NamedTensors,
    TensorDigest,
    check_entry_shape,
    digests,
    entries,
    named_tensors,
    num_entries,
    tensors_root,
    to_float32,
)

Support = Mapping[str, Tensor]
"""Per tensor, by its name in the checkpoint: int64 ascending flat row-major positions."""


class Delta(DeltaData):
    """A sparse, exactly reversible change of a model's weights."""

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a delta file, and check all of it.

        Raises:
            CorruptDelta: If it is missing, cut short or changed.
        """
        return cls.of(read_delta(Path(path)))

    @classmethod
    def of(cls, data: DeltaData) -> Self:
        """The same delta, with these methods."""
        return cls(record=data.record, tensors=data.tensors)

    def save(self, path: Path | str) -> None:
        """Write a delta file, whole or not at all."""
        write_delta(self, Path(path))

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Apply the delta to a loaded model for the length of a ``with`` block.

        The weights change in place and come back bit for bit. See
        :meth:`samara.sparse.delta_apply.DeltaStack.apply` for what is refused.
        """
        with delta_stack(model).applied(self):
            yield model


@dataclass(frozen=True, kw_only=True)
class SelectedEntries:
    """A trained support without dense copies.

    Attributes:
        indices: int64 (k,), ascending flat row-major positions.
        original: (k,), the base's values there, in the base's type.
        new: (k,), the trained values, in the base's type.
    """

    indices: Tensor
    original: Tensor
    new: Tensor


def make_delta(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    support: Support | None = None,
    parent: DeltaData | None = None,
    records: Provenance | None = None,
    mode: Mode = "ulp",
) -> Delta:
    """The delta between two sets of dense weights: every entry whose bits differ.

    Args:
        base: All tensors of the base, by their names in the checkpoint; with ``parent`` applied,
            where there is one.
        tuned: The same after training; a tensor that is left out did not change.
        support: Positions that were free to change, per tensor; others that did are refused.
        parent: The delta that must be applied first.
        records: Origin, evaluation, audit, licence.
        mode: How values are stored.

    Raises:
        ShapeMismatch: If a tensor is of another shape or type in ``tuned``, or not in the base.
        TiedTensorDuplicate: If a tied tensor was changed under two names.
        DeltaError: If an entry outside ``support`` changed.
    """
    known = named_tensors(base)
    _check_tied(known, tuned, support or {})
    unknown = sorted({*tuned, *(support or {})} - base.keys())
    if unknown:
        raise ShapeMismatch(
            f"{unknown[0]}: the base has no such tensor; name it as the checkpoint does"
        )
    selected, dense = {}, {}
    for name in sorted(known.tensors):
        if name not in tuned:
            continue
        indices = _changed(known, name, tuned[name])
        if support is not None:
            _check_inside(name, indices, support.get(name))
        if len(indices):
            dense[name] = tuned[name]
            selected[name] = SelectedEntries(
                indices=torch.from_numpy(indices),
                original=_values_at(base[name], indices),
                new=_values_at(tuned[name], indices),
            )
    return delta_from_entries(
        selected,
        base=digests(known.tensors),
        parent=parent,
        records=records,
        mode=mode,
        tuned=digests(dense),
    )


def delta_from_entries(
    selected: Mapping[str, SelectedEntries],
    *,
    base: Mapping[str, TensorDigest],
    parent: DeltaData | None = None,
    records: Provenance | None = None,
    mode: Mode = "ulp",
    tuned: Mapping[str, TensorDigest] | None = None,
    keep_original: bool = True,
) -> Delta:
    """The delta of trained entries; no tensor is copied. Entries that did not change are left out.

    Args:
        selected: Per tensor, by its name in the checkpoint.
        base: Content hashes of all tensors of the base, with ``parent`` applied where there is one
            (:func:`samara.sparse.tensor_bits.digests`, or those of a folder).
        parent: The delta that must be applied first.
        records: Origin, evaluation, audit, licence.
        mode: How values are stored.
        tuned: Content hashes of the touched tensors with the new values in them, to be recorded.
        keep_original: In ``overwrite`` mode, store the base's bits as well.

    Raises:
        ShapeMismatch: If a tensor is not in ``base``, or of another type there.
        DeltaError: If positions do not ascend, or values are not of one length with them.
    """
    tensors = []
    for name in sorted(selected):
        tensor = _tensor_delta(name, selected[name], base, mode=mode, keep_original=keep_original)
        if tensor.nnz:
            post = tuned[name].sha256 if tuned and name in tuned else None
            tensors.append(replace(tensor, post_sha256=post))
    root = parent.record.base.tensors_root if parent else tensors_root(base)
    return assemble(
        tensors,
        root=root,
        parent=parent.id if parent else None,
        records=records or Provenance(),
        mode=mode,
    )


def assemble(
    tensors: Sequence[TensorDelta],
    *,
    root: str,
    parent: str | None,
    records: Provenance,
    mode: Mode,
) -> Delta:
    """A delta from its tensors and what is known about it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = Record(
        delta_id=delta_id(mode=mode, tensors_root=root, parent=parent, tensors=tensors),
        created=records.created or now,
        producer=Producer(version=importlib.metadata.version("samara")),
        parent=parent,
        base=Base(
            model_id=records.model_id,
            revision_commit=records.revision_commit,
            config_sha256=records.config_sha256,
            tensors_root=root,
        ),
        mode=mode,
        selector=records.selector,
        train=records.train,
        eval=records.eval,
        audit=records.audit,
        license=records.license,
        composition=records.composition,
        tensors=[],
        payload_sha256="",
    )
    # Through the file format: what is in memory is then what would be read back, record and all.
    return Delta.of(parse_delta(delta_bytes(DeltaData(record=record, tensors=tuple(tensors)))))


# --- parts ------------------------------------------------------------------------------------


def _tensor_delta(
    name: str,
    entries_: SelectedEntries,
    base: Mapping[str, TensorDigest],
    *,
    mode: Mode,
    keep_original: bool,
) -> TensorDelta:
    if name not in base:
        raise ShapeMismatch(f"{name}: the base has no such tensor; name it as the checkpoint does")
    digest = base[name]
    shape = digest.shape
    indices = _positions(name, entries_, num_entries(shape))
    before = _bits(name, entries_.original, digest.dtype)
    after = _bits(name, entries_.new, digest.dtype)
    changed = before != after
    indices, before, after = indices[changed], before[changed], after[changed]
    if mode == "additive":
        change = to_float32(after, digest.dtype) - to_float32(before, digest.dtype)
        values = change.numpy().view(FLOAT_BITS)
    else:
        values = values_between(before, after, mode)
    exact = mode != "additive"
    return TensorDelta(
        name=name,
        shape=shape,
        dtype=cast(Dtype, digest.dtype),
        indices=indices,
        values=values,
        original=before if mode == "overwrite" and keep_original else None,
        sel_pre=hash_bits(before) if exact else None,
        sel_post=hash_bits(after) if exact else None,
        pre_sha256=digest.sha256,
    )


def _positions(name: str, given: SelectedEntries, size: int) -> Indices:
    indices: Indices = given.indices.detach().cpu().to(torch.int64).numpy()
    if not len(indices) == len(given.original) == len(given.new):
        raise DeltaError(
            f"{name}: {len(indices)} positions, {len(given.original)} original and "
            f"{len(given.new)} new values; give as many of each"
        )
    if len(indices) and not (indices[0] >= 0 and indices[-1] < size):
        raise DeltaError(f"{name}: positions {indices[0]} to {indices[-1]}, it has {size} entries")
    if len(indices) > 1 and not (np.diff(indices) > 0).all():
        raise DeltaError(f"{name}: positions must ascend without repeats; sort them")
    return indices


def _bits(name: str, values: Tensor, dtype: str) -> Bits:
    if CODES[values.dtype] != dtype or dtype not in WORDS:
        raise ShapeMismatch(
            f"{name}: values are {CODES[values.dtype]}, the base stores {dtype}; a delta holds "
            f"values of the base's type ({', '.join(WORDS)})"
        )
    return entries(values, np.arange(len(values))).read()


def _values_at(tensor: Tensor, indices: Indices) -> Tensor:
    return tensor.detach().reshape(-1)[torch.from_numpy(indices).to(tensor.device)]


def _changed(known: NamedTensors, name: str, tuned: Tensor) -> Indices:
    """Flat positions at which the bits differ."""
    base = known[name]
    kind = CODES[tuned.dtype]
    if kind == CODES[base.dtype] and kind not in WORDS:
        if not torch.equal(base, tuned):
            raise ShapeMismatch(f"{name}: is {kind} and changed; a delta holds {', '.join(WORDS)}")
        return np.empty(0, np.int64)
    check_entry_shape(known, name, tuple(tuned.shape), kind)
    word = {2: torch.int16, 4: torch.int32}[base.dtype.itemsize]
    flat, other = (t.detach().contiguous().view(-1).view(word) for t in (base, tuned))
    found: Indices = torch.nonzero(flat != other.to(flat.device)).view(-1).cpu().numpy()
    return found


def _check_tied(known: NamedTensors, tuned: Mapping[str, Tensor], support: Support) -> None:
    for alias, name in known.aliases.items():
        both = alias in support and name in support
        apart = alias in tuned and (name not in tuned or not _equal(tuned[alias], tuned[name]))
        if both or apart:
            raise TiedTensorDuplicate(
                f"{alias}: is the same tensor as {name} in the base; change that name alone"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _check_inside(name: str, changed: Indices, support: Tensor | None) -> None:
    allowed = np.empty(0, np.int64) if support is None else support.cpu().numpy()
    lost = np.setdiff1d(changed, allowed)
    if len(lost):
        raise DeltaError(
            f"{name}: {len(lost)} weights outside the support changed, such as number {lost[0]}; "
            "freeze them while training, or leave the support out"
        )
