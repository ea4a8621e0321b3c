"""``kill -9`` at any moment loses the steps since the last checkpoint, and nothing else.

One subprocess imports everything once and forks a child for each attempt; a child kills itself at
the moment under test, for good: no handler, no cleanup.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

Settings = Callable[..., dict[str, Any]]

DRIVER = '''
import gc, json, os, signal, sys
from pathlib import Path
import torch
import samara.runs
from samara.config import validate
from samara.runs import RunFolder, hash_file, read_json
from samara.train import averaging, checkpoint, optim, pretrain
from samara.train.config import PretrainConfig

job = json.load(sys.stdin)
torch.set_num_threads(1)
gc.freeze()  # each run collects garbage first


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, count, half=None, when=lambda *args: True):
    """Kill this process at the count-th such call of a function, after half of its work."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += when(*args)
        if calls[0] == count:
            if half is not None:
                half(real, *args, **kwargs)
            die()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def half_file(real, tensors, path, **kwargs):
    real(tensors, path, **kwargs)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def half_line(real, run, record):
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(dict(record))[:20])


def half_step(real, optimizer):
    parameters = optimizer.parameters
    parameters[0].data.zero_()


def half_removed(real, path, **kwargs):
    next(Path(path).iterdir()).unlink()


# Checkpoints at 4, 8, 12; members of the average at 8 and 12: one file each, then three more.
MOMENTS = {
    "before the first checkpoint": lambda: before(optim.Optimizer, "step", 3, half_step),
    "in a step": lambda: before(optim.Optimizer, "step", 6, half_step),
    "in the last step": lambda: before(optim.Optimizer, "step", 12, half_step),
    "in the first checkpoint's weights": lambda: before(checkpoint, "save_file", 1, half_file),
    "in an average's member": lambda: before(checkpoint, "save_file", 4, half_file),
    "in a later optimizer state": lambda: before(checkpoint, "save_file", 6, half_file),
    "before a checkpoint's name": lambda: before(samara.runs.os, "replace", 5),
    "while an old checkpoint goes": lambda: before(
        checkpoint.shutil, "rmtree", 1, half_removed, lambda path, *_: path.name[0] == "s"
    ),
    "in a line of the log": lambda: before(RunFolder, "append_metrics", 3, half_line),
    "in the export": lambda: before(pretrain, "save_model", 1),
    "before the summary": lambda: before(RunFolder, "write_lineage", 1),
}


def attempt(folder, moment):
    child = os.fork()
    if child == 0:
        try:
            if moment:
                MOMENTS[moment]()
            pretrain.pretrain(validate(PretrainConfig, job["settings"]), RunFolder(folder))
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def content(folder):
    timing = {"tokens_per_second", "mfu", "memory_bytes", "seconds"}
    files = [folder / "model" / "model.safetensors"]
    files += sorted((folder / "checkpoints" / "step-00000012").glob("*.safetensors"))
    run = RunFolder(folder)
    return {
        "files": [hash_file(file) for file in files],
        "metrics": [{k: v for k, v in r.items() if k not in timing} for r in run.metrics()],
        "leftovers": sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith(".tmp")
        ),
    }


root, report = Path(job["root"]), {}
for name in ["", *MOMENTS]:
    folder = root / (name or "straight")
    folder.mkdir()
    codes = [attempt(folder, name)] if name else []
    codes.append(attempt(folder, ""))
    report[name] = {"codes": codes, "content": content(folder) if codes[-1] == 0 else None}
print("REPORT" + json.dumps(report))
'''

MOMENTS = [
    "before the first checkpoint",
    "in a step",
    "in the last step",
    "in the first checkpoint's weights",
    "in an average's member",
    "in a later optimizer state",
    "before a checkpoint's name",
    "while an old checkpoint goes",
    "in a line of the log",
    "in the export",
    "before the summary",
]


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def report(
    cache: dict[str, Any], pretrain_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What became of each attempt; worked off once for all tests."""
    if not cache:
        settings = pretrain_settings(checkpoint__average_last=2, checkpoint__keep_last=1)
        job = {"settings": settings, "root": str(tmp_path_factory.mktemp("killed"))}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER],
            input=json.dumps(job),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        line = next(x for x in done.stdout.splitlines() if x.startswith("REPORT"))
        cache.update(json.loads(line.removeprefix("REPORT")), log=done.stderr)
    return cache


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_straight(report: dict[str, Any], moment: str) -> None:
    assert report[""]["codes"] == [0], report["log"]
    assert report[moment]["codes"] == [-9, 0], report["log"]
    assert report[moment]["content"] == report[""]["content"]
    assert report[""]["content"]["leftovers"] == []
