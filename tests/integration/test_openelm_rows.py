"""OpenELM's rows as an option of pretraining, and the measured comparison with packing."""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from samara.config import validate
from samara.data.prepare import PreparedCorpus
from samara.errors import DataError
from samara.runs import RunFolder, hash_file, read_json
from samara.train import pretrain as pretrain_module
from samara.train.config import PretrainConfig
from samara.train.pretrain import pretrain

Settings = Callable[..., dict[str, Any]]

ROWS = {"kind": "openelm", "words": 24, "min_characters": 40, "min_tokens": 16}

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "data_paths.py"


def run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    result = RunFolder(folder)
    pretrain(validate(PretrainConfig, settings), result)
    return result


def test_stopped_and_gone_on_with_is_the_same(
    pretrain_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = pretrain_settings(data__rows=ROWS)
    straight = run(tmp_path / "straight", settings)

    def interrupted(steps: Iterator[Any]) -> Iterator[Any]:
        yield from itertools.islice(steps, 6)
        raise KeyboardInterrupt

    batches = pretrain_module.training_batches
    with monkeypatch.context() as patch:
        patch.setattr(
            pretrain_module, "training_batches", lambda *a, **k: interrupted(batches(*a, **k))
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", settings)
    again = run(tmp_path / "run", {**settings, "data": {**settings["data"], "num_workers": 1}})

    weights = [hash_file(x.path / "model" / "model.safetensors") for x in (straight, again)]
    assert weights[0] == weights[1]


def test_training_differs_and_validation_does_not(
    pretrain_settings: Settings, tmp_path: Path
) -> None:
    rates = {"optimizer": {"kind": "adamw", "lr": 1e-30, "weight_decay": 0.0}}  # changes nothing
    packed = run(tmp_path / "packed", {**pretrain_settings(), **rates})
    openelm = run(tmp_path / "openelm", {**pretrain_settings(data__rows=ROWS), **rates})

    found = [read_json(x.path / "summary.json") for x in (packed, openelm)]
    assert found[0]["validation_loss"] == found[1]["validation_loss"]
    assert found[0]["train_loss"] != found[1]["train_loss"]


def test_rules_that_keep_nothing(pretrain_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="OpenELM's rules keep none of the") as error:
        run(tmp_path / "run", pretrain_settings(data__rows={"kind": "openelm"}))
    assert "\n" not in str(error.value)


def test_the_script_prints_what_each_way_costs(
    small_corpus: PreparedCorpus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--words", "24", "--min-characters", "40", "--min-tokens", "16"]
    monkeypatch.syspath_prepend(SCRIPT.parent)
    arguments = [str(SCRIPT), str(small_corpus.folder), "--sequence-length", "32", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")

    found = json.loads(capsys.readouterr().out)
    assert found["corpus_hash"] == small_corpus.hash
    assert found["documents"] == small_corpus.statistics["splits"]["train"]["documents"]
    assert found["packed"]["lost_share"] == 0.0
    assert found["packed"]["padding_share"] < found["openelm"]["padding_share"]
    assert 0.0 < found["openelm"]["lost_share"] < 1.0
    assert found["openelm"]["lost_tokens"]["cut"] > 0
