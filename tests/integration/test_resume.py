"""An interrupted run, gone on with, equals the uninterrupted one bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samara.config import validate
from samara.errors import Stopped
from samara.runs import RunFolder, hash_file, read_json
from samara.train import pretrain as pretrain_module
from samara.train.checkpoint import TrainingState
from samara.train.config import PretrainConfig
from samara.train.pretrain import pretrain

Settings = Callable[..., dict[str, Any]]

TIMING = {"tokens_per_second", "mfu", "memory_bytes", "seconds"}


def run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    result = RunFolder(folder)
    pretrain(validate(PretrainConfig, settings), result)
    return result


def content(result: RunFolder) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    last = sorted((result.path / "checkpoints").iterdir())[-1]
    files = [result.path / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    summary = read_json(result.path / "summary.json")
    return {
        "files": {f"{f.parent.name}/{f.name}": hash_file(f) for f in files},
        "metrics": [
            {key: value for key, value in record.items() if key not in TIMING}
            for record in result.metrics()
        ],
        "losses": {key: value for key, value in summary.items() if "loss" in key},
        "counts": {key: summary[key] for key in ("steps", "tokens", "flops", "weights_hash")},
    }


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal in the middle of a step."""
    show_progress = pretrain_module._progress

    def progress(line: Any, start: TrainingState) -> Callable[..., None]:
        show = show_progress(line, start)

        def on_step(state: TrainingState, *arguments: Any) -> None:
            show(state, *arguments)
            if state.step == step:
                signal.raise_signal(number)

        return on_step

    monkeypatch.setattr(pretrain_module, "_progress", progress)


@pytest.fixture
def settings(pretrain_settings: Settings) -> dict[str, Any]:
    """Checkpoints at 4, 8, 12; records at 5, 10, 12; evaluation at 6, 12; average of two."""
    return pretrain_settings(
        checkpoint__average_last=2,
        checkpoint__keep_last=1,
        logging__every_steps=5,
        training__precision="bfloat16",
        schedule={"kind": "wsd", "warmup_steps": 3},
    )


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    return {}


@pytest.fixture
def straight(
    cache: dict[str, Any], settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The content of the uninterrupted run, made once."""
    if not cache:
        cache.update(content(run(tmp_path_factory.mktemp("straight") / "run", settings)))
    return cache


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGTERM),
        (4, signal.SIGINT),  # a checkpoint is due
        (5, signal.SIGTERM),  # a record is due
        (6, signal.SIGINT),  # evaluation is due
        (7, signal.SIGTERM),
        (11, signal.SIGINT),
    ],
)
def test_stopped_by_a_signal(
    settings: dict[str, Any],
    straight: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: signal.Signals,
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        with pytest.raises(Stopped, match=f"stopped by {number.name} after step {step}; saved"):
            run(tmp_path / "run", settings)
    assert not (tmp_path / "run" / "summary.json").exists()

    assert content(run(tmp_path / "run", settings)) == straight


def test_muon_stopped_again_and_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "optimizer": {"kind": "muon", "lr": 0.01}}
    straight = content(run(tmp_path / "straight", settings))

    for step in (2, 3, 8, 10):
        with monkeypatch.context() as patch:
            stop_at(patch, step, signal.SIGTERM)
            with pytest.raises(Stopped):
                run(tmp_path / "run", settings)

    assert content(run(tmp_path / "run", settings)) == straight


def test_seconds_and_peak_go_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(Stopped):
            run(tmp_path / "run", settings)
    records = RunFolder(tmp_path / "run").metrics()
    result = run(tmp_path / "run", settings)

    seconds = [record["seconds"] for record in result.metrics() if "seconds" in record]
    assert seconds == sorted(seconds)
    assert seconds[0] == records[0]["seconds"]
    assert read_json(result.path / "summary.json")["seconds"] >= seconds[-1]
