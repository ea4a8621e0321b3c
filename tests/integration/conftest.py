"""A small corpus and a recipe of a model that trains on it in a second."""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from samara.cli import main
from samara.data.config import PrepareConfig
from samara.data.prepare import PreparedCorpus, prepare

TEXT = """
return the value of each item in a list and raise an error when file is not found open path read
write line by line convert text to number between two dates make new folder under root if missing
"""
WORDS = TEXT.split()


def write_text(path: Path, *, documents: int = 120, seed: int = 0) -> Path:
    """A JSON Lines file of random sentences."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            sentences = [
                " ".join(draw.choices(WORDS, k=draw.randint(5, 12))).capitalize() + "."
                for _ in range(draw.randint(2, 6))
            ]
            file.write(json.dumps({"id": f"doc-{number}", "text": " ".join(sentences)}) + "\n")
    return path


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection() -> None:
    """Each run of pretrain collects garbage first: let it not walk through all of torch."""
    gc.freeze()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """Random sentences, a vocabulary of 300, three splits."""
    folder = tmp_path_factory.mktemp("corpus")
    text = write_text(folder / "text.jsonl")
    config = PrepareConfig.model_validate(
        {
            "source": {"kind": "files", "paths": [str(text)]},
            "cleaning": {"english_only": False, "near_duplicate_threshold": None},
            "split": {"validation_fraction": 0.2, "test_fraction": 0.1},
            "tokenizer": {"kind": "train", "vocab_size": 300},
        }
    )
    return prepare(config, folder / "prepared")


@pytest.fixture
def pretrain_settings(small_corpus: PreparedCorpus) -> Callable[..., dict[str, Any]]:
    """A function that gives the settings of a twelve-step run, some replaced (``a__b`` is a.b)."""

    def make(**changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "head_dim": 16,
                "ffn_dim": 48,
                "max_position_embeddings": 64,
            },
            "data": {"corpus": str(small_corpus.folder), "sequence_length": 32},
            "optimizer": {"kind": "adamw", "lr": 0.01},
            "training": {
                "max_steps": 12,
                "batch_size": 8,
                "micro_batch_size": 4,
                "precision": "float32",
                "device": "cpu",
                "evaluate_every_steps": 6,
            },
            "checkpoint": {"every_steps": 4, "keep_last": 2},
            "logging": {"every_steps": 3, "device_profile": "cpu-2core"},
        }
        for path, value in changes.items():
            node = settings
            *parents, last = path.split("__")
            for key in parents:
                node = node[key]
            if value is None:
                node.pop(last, None)
            else:
                node[last] = value
        return settings

    return make


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def samara(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Done]:
    """Run the command as its entry point does, in this process and a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["samara", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        out, err = capsys.readouterr()
        return Done(returncode=code, stdout=out, stderr=err)

    return run
