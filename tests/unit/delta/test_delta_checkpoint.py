"""Deltas on a folder: every file bit for bit back, whatever kills the process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samara.errors import (
    AlreadyApplied,
    CheckpointError,
    CorruptDelta,
    LicenseDenied,
    OutOfOrder,
    ShapeMismatch,
    TiedTensorDuplicate,
    WrongBase,
)
from samara.registry.records import License
from samara.runs import hash_file, write_json
from samara.sparse.delta import make_delta
from samara.sparse.delta_checkpoint import (
    apply_to_checkpoint,
    checkpoint_state,
    revert_checkpoint,
    verify_checkpoint,
)
from samara.sparse.delta_records import Provenance
from samara.sparse.tensor_files import CheckpointFiles, FileEntries

ROOT = Path(__file__).resolve().parents[3]


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture
def child(tuned, copies):
    """A delta on top of the one from base to tuned, and the weights it makes."""

    def make(parent):
        again = copies(tuned)
        again["d"].view(-1)[::3] += 1
        again["b"].view(-1)[::5] += 1
        return make_delta(tuned, again, parent=parent), again

    return make


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("mode", ["ulp", "xor", "overwrite", "additive"])
def test_a_folder_is_patched_and_every_file_comes_back(
    base, tuned, save_folder, same, child, sharded, mode
):
    folder = save_folder(base, sharded=sharded)
    before = snapshot(folder)
    delta = make_delta(base, tuned, mode=mode)
    apply_to_checkpoint(delta, folder)
    if mode != "additive":
        assert same(weights_of(folder), tuned)
        second, after = child(delta)
        apply_to_checkpoint(second, folder)
        assert same(weights_of(folder), after)
        assert checkpoint_state(folder).stack == (delta.id, second.id)
        assert revert_checkpoint(folder, second.id[:8]) == second.id
        assert same(weights_of(folder), tuned)
    assert revert_checkpoint(folder) == delta.id
    assert snapshot(folder) == before


def test_a_folder_patched_and_a_model_patched_agree(base, tuned, save_folder, net, same):
    folder, model = save_folder(base, sharded=True), net(base)
    delta = make_delta(base, tuned)
    assert CheckpointFiles(folder).root() == delta.record.base.tensors_root
    apply_to_checkpoint(delta, folder)
    with delta.applied_to(model):
        assert same(model, weights_of(folder))


def test_recorded_hashes_of_files_step_aside_while_they_do_not_hold(base, tuned, save_folder):
    folder = save_folder(base)
    write_json(folder / "provenance.json", {"schema": 1})
    before = snapshot(folder)
    apply_to_checkpoint(make_delta(base, tuned), folder)
    assert not (folder / "provenance.json").exists()
    revert_checkpoint(folder)
    assert snapshot(folder) == before


def test_a_thousand_cycles_give_the_same_sha256(save_folder, monkeypatch):
    base = {"w": torch.randn(8, 8).bfloat16()}
    tuned = {"w": base["w"] * 1.01}
    delta, folder = make_delta(base, tuned), save_folder(base)
    before = snapshot(folder)
    # A thousand times some fifteen flushes to disk: what is tested here is bits, not the disk.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for _ in range(1000):
        apply_to_checkpoint(delta, folder)
        revert_checkpoint(folder)
    assert snapshot(folder) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from samara import runs
from samara.sparse import delta_checkpoint, tensor_files
from samara.sparse.delta_file import read_delta

left = int(sys.argv[4])

def die_at(function):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

def half_then_whole(self, bits, write=tensor_files.FileEntries.write):
    half = tensor_files.FileEntries(place=self.place, indices=self.indices[: len(bits) // 2])
    die_at(write)(half, bits[: len(bits) // 2])
    die_at(write)(self, bits)

tensor_files.FileEntries.write = half_then_whole
delta_checkpoint.write_json = die_at(delta_checkpoint.write_json)
delta_checkpoint.write_delta = die_at(delta_checkpoint.write_delta)
folder = Path(sys.argv[1])
if sys.argv[3] == "apply":
    delta_checkpoint.apply_to_checkpoint(read_delta(Path(sys.argv[2])), folder)
else:
    delta_checkpoint.revert_checkpoint(folder)
print("done")
"""


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 6, 7])
def test_kill_9_in_the_middle_loses_nothing(base, tuned, save_folder, same, tmp_path, action, step):
    folder = save_folder(base, sharded=True)
    before = snapshot(folder)
    delta = make_delta(base, tuned)
    delta.save(tmp_path / "x.sdelta")
    if action == "revert":
        apply_to_checkpoint(delta, folder)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "x.sdelta"), action, str(step)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    # The next command of any kind puts it right first; a revert may be through by then.
    with contextlib.suppress(OutOfOrder):
        revert_checkpoint(folder)
    assert snapshot(folder) == before
    apply_to_checkpoint(delta, folder)
    assert same(weights_of(folder), tuned)


@pytest.mark.parametrize("failing", range(3))
def test_a_fault_at_any_write_leaves_every_file_as_it_was(
    base, tuned, save_folder, monkeypatch, failing
):
    folder, count, write = save_folder(base, sharded=True), 0, FileEntries.write
    before = snapshot(folder)

    def fails(self, bits):
        nonlocal count
        count += 1
        write(self, bits)
        if count == failing + 1:
            raise OSError("fault")

    monkeypatch.setattr(FileEntries, "write", fails)
    with pytest.raises(OSError, match="fault"):
        apply_to_checkpoint(make_delta(base, tuned), folder)
    assert snapshot(folder) == before


def test_wrong_order_and_wrong_bases_are_refused_untouched(base, tuned, save_folder, copies, child):
    folder = save_folder(base)
    delta = make_delta(base, tuned)
    second, _ = child(delta)
    before = snapshot(folder)
    with pytest.raises(OutOfOrder, match="belongs on top of delta"):
        apply_to_checkpoint(second, folder)
    other = copies(base)
    other["d"].view(-1)[0] += 1
    foreign = make_delta(other, {**other, "b": tuned["b"]})
    with pytest.raises(WrongBase, match="was made for the base"):
        apply_to_checkpoint(foreign, folder)
    wider = {**base, "e": torch.zeros(2)}
    stranger = make_delta(wider, {**wider, "e": torch.ones(2)}, mode="additive")
    with pytest.raises(ShapeMismatch, match=r"e: .* has no such tensor"):
        apply_to_checkpoint(stranger, folder)
    records = Provenance(license=License(use="forbidden"))
    with pytest.raises(LicenseDenied):
        apply_to_checkpoint(make_delta(base, tuned, records=records), folder)
    assert snapshot(folder) == before
    apply_to_checkpoint(delta, folder)
    with pytest.raises(AlreadyApplied):
        apply_to_checkpoint(delta, folder)
    with pytest.raises(OutOfOrder, match="is not on top"):
        revert_checkpoint(folder, "f" * 64)


def test_weights_changed_since_and_a_damaged_undo_file_are_refused(base, tuned, save_folder):
    folder = save_folder(base)
    delta = make_delta(base, tuned)
    apply_to_checkpoint(delta, folder)
    entries = CheckpointFiles(folder).entries("b", delta.tensors[1].indices[:1])
    good = entries.read()
    entries.write(good ^ 1)
    before = snapshot(folder)
    with pytest.raises(WrongBase, match="b: was changed after"):
        revert_checkpoint(folder)
    assert snapshot(folder) == before
    entries.write(good)
    undo = folder / ".sdelta" / f"{delta.id}.undo.sdelta"
    content = undo.read_bytes()
    undo.write_bytes(content[:-1])
    with pytest.raises(CorruptDelta, match=r"undo\.sdelta"):
        revert_checkpoint(folder)
    undo.write_bytes(content)
    revert_checkpoint(folder)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_shared_with_other_folders_are_not_patched(base, tuned, save_folder, tmp_path, link):
    folder = save_folder(base)
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    link(blob, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a link, so other folders share it"):
        apply_to_checkpoint(make_delta(base, tuned), folder)


def test_one_process_at_a_time(base, tuned, save_folder):
    folder = save_folder(base)
    with (folder / "model.safetensors").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is changing its weights"):
            apply_to_checkpoint(make_delta(base, tuned), folder)
    apply_to_checkpoint(make_delta(base, tuned), folder)


def test_a_tied_tensor_stored_twice_is_not_half_changed(save_folder):
    weight = torch.randn(8, 4)
    stored = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone()}
    folder = save_folder(stored)
    write_json(folder / "config.json", {"tie_word_embeddings": True})
    base = {"model.embed_tokens.weight": weight}
    delta = make_delta(base, {"model.embed_tokens.weight": weight + 1})
    with pytest.raises(TiedTensorDuplicate, match=r"stores .*embed_tokens.* a second time"):
        apply_to_checkpoint(delta, folder)


def test_verify_reads_and_full_trusts_no_cache(base, tuned, save_folder):
    folder, delta = save_folder(base), make_delta(base, tuned)
    before = snapshot(folder)
    verify_checkpoint(delta, folder)
    verify_checkpoint(delta, folder, full=True)
    assert snapshot(folder) == before
    # A byte that the delta does not touch, changed behind the back of the cache.
    path = folder / "model.safetensors"
    stamp = path.stat()
    CheckpointFiles(folder).entries("d", delta.tensors[0].indices[:1]).write(
        CheckpointFiles(folder).read("d", delta.tensors[0].indices[:1]) ^ 1
    )
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    verify_checkpoint(delta, folder)
    with pytest.raises(WrongBase):
        verify_checkpoint(delta, folder, full=True)


def test_full_verification_compares_whole_tensors(base, tuned, copies, save_folder):
    import dataclasses

    folder, delta = save_folder(base), make_delta(base, tuned)
    for field, error, message in (
        ("pre_sha256", WrongBase, "a: is not the tensor that the delta was made for"),
        ("post_sha256", CorruptDelta, "a: would not become the tensor that was trained"),
    ):
        first = dataclasses.replace(delta.tensors[0], **{field: "0" * 64})
        lying = dataclasses.replace(delta, tensors=(first, *delta.tensors[1:]))
        verify_checkpoint(lying, folder)
        with pytest.raises(error, match=message):
            verify_checkpoint(lying, folder, full=True)


def test_damaged_checkpoints_and_states_are_named(base, tuned, save_folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        CheckpointFiles(tmp_path / "none")
    folder = save_folder(base)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match="damaged or cut short at"):
        CheckpointFiles(folder)
    path.write_bytes(content[:40])
    with pytest.raises(CheckpointError, match="header is longer than the file"):
        CheckpointFiles(folder)
    path.write_bytes(content)
    (folder / ".sdelta").mkdir()
    write_json(folder / ".sdelta" / "state.json", {"stack": []})
    with pytest.raises(CheckpointError, match="is no state of deltas"):
        checkpoint_state(folder)
