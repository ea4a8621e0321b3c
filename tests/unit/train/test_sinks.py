from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from samara.errors import ConfigError
from samara.runs import RunFolder
from samara.train.sinks import open_sinks

RECORDS = [
    {"step": 1, "tokens": 48, "loss": 4.5, "mfu": None},
    {"step": 2, "tokens": 96, "loss": 4.25, "mfu": 0.5},
    {"step": 2, "tokens": 96, "validation_loss": 4.0},
]


def test_no_sinks_by_default(tmp_path: Path) -> None:
    with open_sinks([], run=RunFolder(tmp_path), start_step=0) as sinks:
        assert sinks == []


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "tensorboard"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)

    with (
        pytest.raises(ConfigError, match=rf"logging.sinks: {name} is not installed") as caught,
        open_sinks([name], run=RunFolder(tmp_path), start_step=0),
    ):
        pass
    assert "pip install 'samara[tracking]'" in str(caught.value)


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(item.step, item.value) for item in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="extra `tracking` is not installed")

    with open_sinks(["tensorboard"], run=RunFolder(tmp_path), start_step=0) as sinks:
        for record in RECORDS:
            sinks[0].write(record)

    assert read_events(tmp_path / "tensorboard") == {
        "tokens": [(1, 48.0), (2, 96.0), (2, 96.0)],
        "loss": [(1, 4.5), (2, 4.25)],
        "mfu": [(2, 0.5)],
        "validation_loss": [(2, 4.0)],
    }


def test_tensorboard_hides_what_a_crashed_run_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="extra `tracking` is not installed")
    run = RunFolder(tmp_path)
    for start, loss in ((0, 4.0), (1, 3.0)):  # the second one goes on after step 1
        with open_sinks(["tensorboard"], run=run, start_step=start) as sinks:
            for step in range(start + 1, 4):
                sinks[0].write({"step": step, "loss": loss})

    assert read_events(tmp_path / "tensorboard")["loss"] == [(1, 4.0), (2, 3.0), (3, 3.0)]


TRACKIO = """
import sys
from pathlib import Path
from samara.runs import RunFolder
from samara.train.sinks import open_sinks
run, start = RunFolder(Path(sys.argv[1])), int(sys.argv[2])
with open_sinks(["trackio"], run=run, start_step=start) as sinks:
    for step in range(start + 1, start + 3):
        sinks[0].write({"step": step, "loss": 4.0 / step, "mfu": None})
"""


def test_trackio_gets_the_numbers_offline(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="extra `tracking` is not installed")
    folder = tmp_path / "quickstart" / "dense"
    folder.mkdir(parents=True)
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "db"), "HF_HUB_OFFLINE": "1"}
    for start in ("0", "2"):
        done = subprocess.run(
            [sys.executable, "-c", TRACKIO, str(folder), start],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
    query = "import sys, json, trackio; from trackio.sqlite_storage import SQLiteStorage as S; "
    query += "print(json.dumps(S.get_logs('samara', 'quickstart/dense')))"
    read = subprocess.run(
        [sys.executable, "-c", query],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    rows = json.loads(read.stdout.splitlines()[-1])
    assert [(row["step"], row["loss"]) for row in rows] == [
        (step, 4.0 / step) for step in (1, 2, 3, 4)
    ]
