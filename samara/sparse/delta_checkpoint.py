"""Deltas on a checkpoint folder: its safetensors files are patched in place, safe against crashes.

``.sdelta/`` in the folder holds what a later command needs:

    state.json      the bare base's identity, the stack of deltas, and what is under way
    ID.undo.sdelta  the inverse of an applied delta: the bits it replaced

Applying writes and flushes the undo file, notes the intention in ``state.json``, patches, checks,
then notes the end. A process killed in between leaves an intention behind; the next command takes
it back from the undo file, which may be written any number of times. Taking a delta off writes the
same bits, so an interrupted one is simply finished. With the last delta off, ``.sdelta/`` goes too,
and every file is bit for bit what it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from samara.errors import CheckpointError, CorruptDelta, OutOfOrder, WrongBase
from samara.runs import read_json, write_json
from samara.sparse.delta import assemble
from samara.sparse.delta_apply import (
    Write,
    check_base,
    check_order,
    check_tensor,
    check_unchanged,
    checked_bits,
    write_all,
)
from samara.sparse.delta_data import DeltaData, TensorDelta, check_usable, hash_bits
from samara.sparse.delta_file import read_delta, write_delta
from samara.sparse.delta_records import Dtype, Provenance
from samara.sparse.tensor_bits import num_entries
from samara.sparse.tensor_files import CheckpointFiles

STATE_FOLDER = ".sdelta"
PROVENANCE, ASIDE = "provenance.json", "provenance.json.base"
"""The folder's hashes of its files hold for the bare base: out of the way while it is changed."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a folder's weights are.

    Attributes:
        base_root: Identity of the bare base; None while no delta was ever applied.
        stack: Ids of the deltas applied, first to last.
        pending: ``apply`` or ``revert`` and the delta's id, where a process was killed amid it.
    """

    base_root: str | None = None
    stack: Sequence[str] = ()
    pending: tuple[Literal["apply", "revert"], str] | None = None


def checkpoint_state(folder: Path) -> CheckpointState:
    """Which deltas a folder carries; reads only.

    Raises:
        CheckpointError: If the state is damaged.
    """
    path = CheckpointFiles(folder).folder / STATE_FOLDER / "state.json"
    if not path.exists():
        return CheckpointState()
    content = read_json(path)
    try:
        pending = content["pending"]
        return CheckpointState(
            base_root=content["base_root"],
            stack=tuple(content["stack"]),
            pending=(pending["action"], pending["delta_id"]) if pending else None,
        )
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: is no state of deltas; copy the model anew") from None


def apply_to_checkpoint(delta: DeltaData, folder: Path) -> None:
    """Patch a checkpoint folder in place.

    Args:
        delta: What to apply.
        folder: A model folder, or the run folder that made it; sharded or not.

    Raises:
        DeltaError: As :meth:`samara.sparse.delta_apply.DeltaStack.apply`; nothing is written then.
        CheckpointError: If the folder is no checkpoint, is in use, or its files are shared.
        ResourceError: If the disk is full.
    """
    check_usable(delta)
    with _opened(folder) as (files, state):
        check_order(delta, on=state.stack)
        root = state.base_root or files.root()
        if delta.mode != "additive":
            check_base(delta, root)
        _check_writable(files, delta)
        files.check_not_tied([tensor.name for tensor in delta.tensors])
        writes = plan_writes(files, delta)
        undo = _undo_delta(files, delta, writes, root)
        write_delta(undo, _undo_path(files, delta.id))
        _write_state(files, state, root=root, pending=("apply", delta.id))
        try:
            write_all(writes)
        except BaseException:
            _recover(files, checkpoint_state(files.folder))
            raise
        done = CheckpointState(base_root=root, stack=(*state.stack, delta.id))
        _write_state(files, done, root=root)


def revert_checkpoint(folder: Path, delta_id: str | None = None) -> str:
    """Take the last delta off a checkpoint folder, bit for bit; the delta file is not needed.

    Args:
        folder: A model folder, or the run folder that made it.
        delta_id: The delta expected on top (or the beginning of its id); None: whichever is.

    Returns:
        The id of the delta taken off.

    Raises:
        OutOfOrder: If there is none, or another one is on top.
        WrongBase: If the weights were changed since; nothing is written then.
        CorruptDelta: If the undo file is damaged.
    """
    with _opened(folder) as (files, state):
        if not state.stack:
            raise OutOfOrder(f"{files.folder}: carries no delta; there is nothing to take off")
        top = state.stack[-1]
        if delta_id is not None and not top.startswith(delta_id):
            raise OutOfOrder(
                f"{files.folder}: delta {delta_id[:12]} is not on top, {top[:12]} is; take that "
                "off first"
            )
        undo = read_delta(_undo_path(files, top))
        for tensor in undo.tensors:
            # What the inverse finds before it is what the delta left behind.
            now = files.read(tensor.name, tensor.indices)
            check_unchanged(now, tensor.name, tensor.sel_pre)
        _write_state(files, state, root=state.base_root, pending=("revert", top))
        _write_undo(files, undo)
        rest = CheckpointState(base_root=state.base_root, stack=state.stack[:-1])
        _write_state(files, rest, root=state.base_root)
        _undo_path(files, top).unlink()
        return top


def plan_writes(files: CheckpointFiles, delta: DeltaData) -> list[Write]:
    """Check a delta against stored weights, and say what to write; writes nothing.

    Raises:
        WrongBase: If a touched tensor or bit is not what the delta was made for.
        CorruptDelta: If the bits it would write are not those it promises.
    """
    writes = []
    for tensor in delta.tensors:
        check_tensor(files, tensor, delta)
        entries = files.entries(tensor.name, tensor.indices)
        before = entries.read()
        after = checked_bits(before, tensor, delta, dtype=files.dtype(tensor.name))
        writes.append(Write(entries=entries, before=before, after=after))
    return writes


def verify_checkpoint(delta: DeltaData, folder: Path, *, full: bool = False) -> None:
    """Check that a delta fits the weights of a folder as they are now; writes nothing.

    Args:
        delta: What would be applied.
        folder: A model folder, or the run folder that made it.
        full: Read every byte, trusting no cache, and hash each touched tensor whole, before and
            after.

    Raises:
        DeltaError: As :func:`apply_to_checkpoint`.
    """
    files, state = CheckpointFiles(folder), checkpoint_state(folder)
    check_order(delta, on=state.stack)
    if delta.mode != "additive":
        fresh = full and not state.stack
        root = files.root(cached=False) if fresh else state.base_root or files.root()
        check_base(delta, root)
    for tensor, write in zip(delta.tensors, plan_writes(files, delta), strict=True):
        if full:
            _verify_whole(files, tensor, write)


def _verify_whole(files: CheckpointFiles, tensor: TensorDelta, write: Write) -> None:
    entire = np.arange(num_entries(tensor.shape))
    bits = files.read(tensor.name, entire)
    if tensor.pre_sha256 not in (None, hashlib.sha256(bits.data).hexdigest()):
        raise WrongBase(f"{tensor.name}: is not the tensor that the delta was made for")
    bits[tensor.indices] = write.after
    if tensor.post_sha256 not in (None, hashlib.sha256(bits.data).hexdigest()):
        raise CorruptDelta(f"{tensor.name}: would not become the tensor that was trained")


# --- journal ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[CheckpointFiles, CheckpointState]]:
    """Hold a folder for this process, with whatever a killed one left behind put right."""
    files = CheckpointFiles(folder)
    # The weights themselves are locked: a lock file that goes away with .sdelta/ would protect
    # nobody from a process that had opened it before.
    with min(place.path for place in files.places.values()).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{files.folder}: another process is changing its weights; wait for it"
            ) from None
        try:
            yield files, _recover(files, checkpoint_state(files.folder))
        finally:
            _settle(files, checkpoint_state(files.folder))


def _recover(files: CheckpointFiles, state: CheckpointState) -> CheckpointState:
    """Undo an interrupted apply; finish an interrupted revert."""
    if state.pending is None:
        return state
    action, delta_id = state.pending
    _write_undo(files, read_delta(_undo_path(files, delta_id)))
    stack = state.stack[:-1] if action == "revert" else state.stack
    settled = CheckpointState(base_root=state.base_root, stack=stack)
    _write_state(files, settled, root=state.base_root)
    return settled


def _settle(files: CheckpointFiles, state: CheckpointState) -> None:
    """Bring what lies beside the weights in line with the stack."""
    inner = files.folder / STATE_FOLDER
    if state.pending is not None or not inner.exists():
        return
    kept = {"state.json", *(_undo_path(files, delta_id).name for delta_id in state.stack)}
    for path in inner.iterdir():
        if path.name not in kept:  # files of an apply that was killed or refused
            path.unlink()
    record, aside = files.folder / PROVENANCE, files.folder / ASIDE
    if state.stack and record.exists():
        record.rename(aside)
    if not state.stack:
        if aside.exists():
            aside.rename(record)
        shutil.rmtree(inner)


def _write_state(
    files: CheckpointFiles,
    state: CheckpointState,
    *,
    root: str | None,
    pending: tuple[str, str] | None = None,
) -> None:
    content: dict[str, Any] = {
        "version": 1,
        "base_root": root,
        "stack": list(state.stack),
        "pending": {"action": pending[0], "delta_id": pending[1]} if pending else None,
    }
    write_json(files.folder / STATE_FOLDER / "state.json", content)


def _undo_path(files: CheckpointFiles, delta_id: str) -> Path:
    return files.folder / STATE_FOLDER / f"{delta_id}.undo.sdelta"


def _undo_delta(
    files: CheckpointFiles, delta: DeltaData, writes: Sequence[Write], root: str
) -> DeltaData:
    """The inverse of a delta, as a delta of its own: it overwrites with the bits before."""
    tensors = [
        TensorDelta(
            name=tensor.name,
            shape=tensor.shape,
            dtype=cast(Dtype, files.dtype(tensor.name)),
            indices=tensor.indices,
            values=write.before,
            sel_pre=hash_bits(write.after),
            sel_post=hash_bits(write.before),
        )
        for tensor, write in zip(delta.tensors, writes, strict=True)
    ]
    return assemble(tensors, root=root, parent=delta.id, records=Provenance(), mode="overwrite")


def _write_undo(files: CheckpointFiles, undo: DeltaData) -> None:
    """Write the original bits, whatever is there now: an interrupted write may be half done."""
    for tensor in undo.tensors:
        entries = files.entries(tensor.name, tensor.indices)
        entries.write(tensor.values)
        if hash_bits(entries.read()) != tensor.sel_post:
            raise CorruptDelta(f"{tensor.name}: the original bits could not be written back")


def _check_writable(files: CheckpointFiles, delta: DeltaData) -> None:
    """Refuse files that other folders share: they would change as well."""
    for path in sorted({files[tensor.name].path for tensor in delta.tensors}):
        if path.is_symlink() or path.stat().st_nlink > 1:
            raise CheckpointError(
                f"{path}: is a link, so other folders share it; write a new checkpoint with "
                "`samara delta export`, or copy the folder first"
            )
