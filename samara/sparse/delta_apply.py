"""Deltas on a loaded model: applied, reverted and swapped in place, all or nothing.

A model carries a stack of deltas, the last on top. Before anything is written, licence, order, base
and every touched bit are checked and the new bits are worked out and hashed; then originals go to
an undo log, the entries are written and read back. If any of it fails, what was written is put
back. The tensors' storage never moves, so compiled graphs and CUDA graphs stay valid.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import nn

from samara.errors import AlreadyApplied, CorruptDelta, OutOfOrder, WrongBase
from samara.sparse.delta_codec import Bits, Indices
from samara.sparse.delta_data import DeltaData, TensorDelta, check_usable, hash_bits, new_bits
from samara.sparse.tensor_bits import (
    Entries,
    NamedTensors,
    TensorSource,
    check_entry_shape,
    digests,
    entries,
    from_float32,
    model_tensors,
    tensors_root,
    to_float32,
)

Undo = Mapping[str, Bits]


class Place(Protocol):
    """Some entries of a tensor, in memory or on disk."""

    def read(self) -> Bits:
        """The bits now."""

    def write(self, bits: Bits) -> None:
        """Set the bits."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """Entries of one tensor, with their bits before and after."""

    entries: Place
    before: Bits
    after: Bits


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A delta that the model carries, and the bits it replaced, by tensor."""

    delta: DeltaData
    undo: Undo


class DeltaStack:
    """The deltas that a set of live tensors carries. Every change holds :attr:`lock`.

    Args:
        tensors: Gives the live tensors; asked anew each time, since a model may be moved.
        base_root: Identity of the bare base where it is known; None: hashed at the first use.
    """

    def __init__(
        self, tensors: Callable[[], NamedTensors], *, base_root: str | None = None
    ) -> None:
        self._tensors = tensors
        self._base_root = base_root
        self._applied: list[Applied] = []
        self.lock = threading.RLock()
        """Hold it around a request, so that no swap falls into it."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the deltas applied, first to last."""
        return tuple(applied.delta.id for applied in self._applied)

    @property
    def base_root(self) -> str:
        """Identity of the bare base; hashes all of it when asked for the first time."""
        with self.lock:
            if self._base_root is None:
                assert not self._applied, "the first delta needed it"
                self._base_root = tensors_root(digests(self._tensors().tensors))
            return self._base_root

    def apply(self, delta: DeltaData) -> None:
        """Apply a delta on top.

        Raises:
            LicenseDenied: If its licence record forbids it.
            AlreadyApplied: If the model carries it.
            OutOfOrder: If it belongs on other deltas than those the model carries.
            WrongBase: If the model, or any touched bit, is not what it was made for.
            CorruptDelta: If the bits it would write are not those it promises.
        """
        with self.lock:
            self._check_place(delta, on=self.ids)
            tensors = self._tensors()
            writes, undo = [], {}
            for tensor in delta.tensors:
                live = _live(tensors, tensor, delta)
                before = live.read()
                after = checked_bits(before, tensor, delta, dtype=tensors.dtype(tensor.name))
                writes.append(Write(entries=live, before=before, after=after))
                undo[tensor.name] = before
            write_all(writes)
            self._applied.append(Applied(delta=delta, undo=undo))

    def revert(self, delta: DeltaData | None = None) -> DeltaData:
        """Take the top delta off, bit for bit.

        Args:
            delta: The one to take off; None: whichever is on top.

        Returns:
            The delta taken off.

        Raises:
            OutOfOrder: If the model carries none, or another one is on top.
            WrongBase: If touched weights were changed since; nothing is written then.
        """
        with self.lock:
            top = self._top(delta)
            tensors = self._tensors()
            writes = []
            for tensor in top.delta.tensors:
                live = _live(tensors, tensor, top.delta)
                before = live.read()
                check_unchanged(before, tensor.name, tensor.sel_post)
                writes.append(Write(entries=live, before=before, after=top.undo[tensor.name]))
            write_all(writes)
            self._applied.pop()
            return top.delta

    def swap(self, delta: DeltaData) -> None:
        """Put a delta in the place of the top one, writing only what either of them touches.

        Raises:
            DeltaError: As :meth:`apply` and :meth:`revert` do; the old one stays applied then.
        """
        with self.lock:
            top = self._top(None)
            self._check_place(delta, on=self.ids[:-1])
            tensors = self._tensors()
            old = {tensor.name: tensor for tensor in top.delta.tensors}
            new = {tensor.name: tensor for tensor in delta.tensors}
            writes, undo = [], {}
            for name in sorted(old | new):
                write, undone = _exchange(
                    tensors, old.get(name), new.get(name), top=top, delta=delta
                )
                writes.append(write)
                if name in new:
                    undo[name] = undone
            write_all(writes)
            self._applied[-1] = Applied(delta=delta, undo=undo)

    @contextlib.contextmanager
    def applied(self, delta: DeltaData) -> Iterator[None]:
        """Apply a delta for the length of a ``with`` block."""
        self.apply(delta)
        try:
            yield
        finally:
            self.revert(delta)

    def _top(self, delta: DeltaData | None) -> Applied:
        if not self._applied:
            raise OutOfOrder("the model carries no delta; there is nothing to take off")
        top = self._applied[-1]
        if delta is not None and top.delta.id != delta.id:
            where = "below it" if delta.id in self.ids else "not applied"
            raise OutOfOrder(
                f"delta {delta.id[:12]}: is {where}; on top is {top.delta.id[:12]}, take that off "
                "first"
            )
        return top

    def _check_place(self, delta: DeltaData, *, on: Sequence[str]) -> None:
        check_usable(delta)
        check_order(delta, on=on)
        # Another type or a quantised copy has another root; `additive` says so and is allowed to.
        if delta.mode != "additive":
            check_base(delta, self.base_root)


_STACKS: weakref.WeakKeyDictionary[nn.Module, DeltaStack] = weakref.WeakKeyDictionary()
_STACKS_LOCK = threading.Lock()


def delta_stack(model: nn.Module, *, base_root: str | None = None) -> DeltaStack:
    """The stack of deltas that a model carries; the same object each time.

    Args:
        model: Any module; its ``state_dict`` names are those of the checkpoint.
        base_root: Identity of the bare base, where the folder it was loaded from was hashed
            already; heeded the first time.
    """
    with _STACKS_LOCK:
        if model not in _STACKS:
            reference = weakref.ref(model)

            def tensors() -> NamedTensors:
                alive = reference()
                assert alive is not None, "the caller holds the model"
                return model_tensors(alive)

            _STACKS[model] = DeltaStack(tensors, base_root=base_root)
        return _STACKS[model]


# --- checks, shared with checkpoints on disk ----------------------------------------------------


def check_order(delta: DeltaData, *, on: Sequence[str]) -> None:
    """Refuse a delta that does not belong on the deltas applied so far.

    Raises:
        AlreadyApplied: If it is among them.
        OutOfOrder: If the last of them is not its parent.
    """
    if delta.id in on:
        raise AlreadyApplied(f"delta {delta.id[:12]}: is applied already")
    top, parent = (on[-1] if on else None), delta.record.parent
    if top == parent:
        return
    wanted = f"on top of delta {parent[:12]}" if parent else "on the bare base"
    carried = f"carry {top[:12]}" if top else "are bare"
    hint = "take that off, or compose the two" if top else "apply that one first"
    raise OutOfOrder(f"delta {delta.id[:12]}: belongs {wanted}, and the weights {carried}; {hint}")


def check_base(delta: DeltaData, root: str) -> None:
    """Refuse weights of another base.

    Raises:
        WrongBase: If the roots differ.
    """
    expected = delta.record.base
    if root != expected.tensors_root:
        known = f" ({expected.model_id})" if expected.model_id else ""
        raise WrongBase(
            f"delta {delta.id[:12]}: was made for the base {expected.tensors_root[:12]}{known}, "
            f"these weights are {root[:12]}; load the base it names, in the type it was stored in"
        )


def checked_bits(before: Bits, tensor: TensorDelta, delta: DeltaData, *, dtype: str) -> Bits:
    """The bits that a tensor's entries get, with both of its hashes checked.

    Raises:
        WrongBase: If the bits before are not those it was made for.
        CorruptDelta: If the bits after are not those it promises.
    """
    if delta.mode == "additive":
        change = to_float32(tensor.values, "F32")
        return from_float32(to_float32(before, dtype) + change, dtype)
    if hash_bits(before) != tensor.sel_pre:
        raise WrongBase(
            f"{tensor.name}: the weights that delta {delta.id[:12]} changes are not those it was "
            "made for; nothing was written"
        )
    after = new_bits(before, tensor, delta.mode)
    if hash_bits(after) != tensor.sel_post:
        raise CorruptDelta(
            f"{tensor.name}: delta {delta.id[:12]} does not give the weights it promises; nothing "
            "was written"
        )
    return after


def check_unchanged(now: Bits, name: str, expected: str | None) -> None:
    """Refuse to take a delta off weights that were changed after it was applied.

    Args:
        now: The touched entries' bits.
        name: Of the tensor.
        expected: Hash of what the delta left behind; None where it promised nothing.

    Raises:
        WrongBase: If they were.
    """
    if expected is not None and hash_bits(now) != expected:
        raise WrongBase(f"{name}: was changed after the delta was applied; nothing was written")


def write_all(writes: Sequence[Write]) -> None:
    """Write all entries and read them back; if anything fails, put back what was written."""
    begun: list[Write] = []
    try:
        for write in writes:
            begun.append(write)
            write.entries.write(write.after)
            # At once, while the entries are in the processor's cache: it costs next to nothing.
            if not np.array_equal(write.entries.read(), write.after):
                raise CorruptDelta("the weights read back are not those written; memory is faulty")
    except BaseException:
        for write in begun:
            write.entries.write(write.before)
        raise


# --- swap ---------------------------------------------------------------------------------------


def _live(source: NamedTensors, tensor: TensorDelta, delta: DeltaData) -> Entries:
    check_tensor(source, tensor, delta)
    return entries(source.live(tensor.name), tensor.indices)


def check_tensor(source: TensorSource, tensor: TensorDelta, delta: DeltaData) -> None:
    """Refuse a tensor of another shape or type; ``additive`` deltas fit any type.

    Raises:
        ShapeMismatch: If it is.
    """
    dtype = None if delta.mode == "additive" else tensor.dtype
    check_entry_shape(source, tensor.name, tensor.shape, dtype)


_NOTHING: Indices = np.empty(0, np.int64)


def _exchange(
    source: NamedTensors,
    old: TensorDelta | None,
    new: TensorDelta | None,
    *,
    top: Applied,
    delta: DeltaData,
) -> tuple[Write, Bits]:
    """One tensor's part of a swap, and the base bits under the new delta."""
    for tensor, owner in ((old, top.delta), (new, delta)):
        if tensor is not None:
            check_tensor(source, tensor, owner)
    name = (old or new).name  # type: ignore[union-attr] # one of them is there
    indices, old_places, new_places = _union(
        old.indices if old else _NOTHING, new.indices if new else _NOTHING
    )
    live = entries(source.live(name), indices)
    now = live.read()
    base = now.copy()
    if old is not None:
        check_unchanged(now[old_places], name, old.sel_post)
        base[old_places] = top.undo[name]
    after, undo = base.copy(), base[:0]
    if new is not None:
        undo = base[new_places]
        after[new_places] = checked_bits(undo, new, delta, dtype=source.dtype(name))
    return Write(entries=live, before=now, after=after), undo


def _union(first: Indices, second: Indices) -> tuple[Indices, Indices, Indices]:
    """The union of two ascending sets, and the place in it of each member of either."""
    both = np.concatenate([first, second])
    order = np.argsort(both, kind="stable")  # two ascending runs: one merge, not a sort
    ascending = both[order]
    fresh = np.diff(ascending, prepend=np.int64(-1)) != 0
    places = np.empty_like(both)
    places[order] = np.cumsum(fresh) - 1
    return ascending[fresh], places[: len(first)], places[len(first) :]
