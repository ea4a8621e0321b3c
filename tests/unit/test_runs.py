"""Run folders: files whole or absent, hashes that mean content, one writer at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samara import runs
from samara.errors import CheckpointError, ConfigError, ResourceError
from samara.runs import Compute, Lineage, RunFolder, differences, hash_files, hash_json, new_folder


def _no_space(*_args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    runs.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(ResourceError, match="the disk is full"):
        runs.write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["status.json"]


def test_a_full_disk_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    target = tmp_path / "model"
    with new_folder(target) as staging:
        (staging / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(ResourceError, match="the disk is full"), new_folder(target) as staging:
        (staging / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_a_failed_folder_vanishes_and_a_finished_one_replaces(tmp_path):
    target = tmp_path / "model"

    def fail() -> None:
        with new_folder(target) as staging:
            (staging / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with new_folder(target) as staging:
            (staging / "a").write_text(content)
    assert (target / "a").read_text() == "second"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_kill_9_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.json"
    runs.write_json(path, {"value": 1})
    code = (
        "import os, signal, sys; from pathlib import Path; from samara import runs\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "runs.write_json(Path(sys.argv[1]), {'value': 2})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert runs.read_json(path) == {"value": 1}


def test_json_has_no_nan_and_broken_json_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}
    path.write_text('{"a": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        runs.read_json(path)
    with pytest.raises(CheckpointError, match="no such file"):
        runs.read_json(tmp_path / "none.json")


def test_hashes_mean_content(tmp_path):
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
    (tmp_path / "x").write_bytes(b"1")
    (tmp_path / "y").write_bytes(b"1")
    assert hash_files({"n": tmp_path / "x"}) == hash_files({"n": tmp_path / "y"})
    assert hash_files({"n": tmp_path / "x"}) != hash_files({"m": tmp_path / "x"})


def test_compute_adds_up_over_ancestors(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.lineage() == Lineage()
    lineage = Lineage(
        parents={"data": "abc"},
        spent=Compute(tokens=10, flops=1e9, seconds=2.0, joules=5.0),
        inherited=Compute(tokens=7, flops=2e9, seconds=1.0, joules=1.0),
    )
    run.write_lineage(lineage)
    assert run.lineage() == lineage
    assert lineage.total == Compute(tokens=17, flops=3e9, seconds=3.0, joules=6.0)


def test_a_folder_of_another_recipe_is_refused_with_what_differs(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start({"schema": 1, "pretrain": {"seed": 1, "optimizer": {"lr": 1e-3}}})
    run.start({"schema": 1, "pretrain": {"seed": 1, "optimizer": {"lr": 1e-3}}})
    with pytest.raises(ConfigError, match=r"pretrain.optimizer.lr: 0.001 -> 0.002"):
        run.start({"schema": 1, "pretrain": {"seed": 1, "optimizer": {"lr": 2e-3}}})


def test_differences_see_new_and_removed_keys():
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 2, "d": 3}}) == [
        "a: 1 -> null",
        "b.d: null -> 3",
    ]
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == []


def test_one_writer_at_a_time(tmp_path):
    run = RunFolder(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from samara.runs import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): pass"
    )
    with run.locked():
        done = subprocess.run(
            [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False
        )
    assert "another process is writing to this run folder" in done.stderr
    with run.locked():
        pass


def test_metrics_survive_a_cut_off_line_and_can_be_truncated(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(1, 5):
        run.append_metrics({"step": step, "loss": float("nan") if step == 3 else 1.0})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]
    run.truncate_metrics(2)
    assert [record["step"] for record in run.metrics()] == [1, 2]


def test_environment_names_versions_and_machine():
    found = runs.environment()
    assert found["packages"]["torch"]
    assert found["cpu_count"] == os.cpu_count()
    assert found["memory_bytes"] > 0
    assert str(Path.home()) not in json.dumps(found)
