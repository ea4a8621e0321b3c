"""Chains of real stages: skipped when done, redone when changed, resumed when interrupted."""

from __future__ import annotations

import random
import re

import pytest

from samara.config import load_yaml
from samara.data.prepare import PreparedCorpus
from samara.errors import CheckpointError, ConfigError, DataError
from samara.lifecycle import plan, run_recipe
from samara.recipe import parse_recipe
from samara.runs import RunFolder

WORDS = "the model reads a line of text and writes the next word of it in one file".split()


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        words = [draw.choice(WORDS) + draw.choice(["", "s", "ed"]) for _ in range(60)]
        (folder / f"{number:02d}.txt").write_text(" ".join(words) + ".\n")
    return folder


@pytest.fixture
def chain(text):
    """Two preparations of one source; the second takes the first one's tokenizer."""
    source = {"kind": "files", "paths": [f"{text}/*.txt"]}
    cleaning = {"english_only": False, "near_duplicate_threshold": None}
    split = {"validation_fraction": 0.2, "test_fraction": 0.1}
    return {
        "schema": 1,
        "name": "chain",
        "defaults": {"prepare": {"source": source, "cleaning": cleaning, "split": split}},
        "stages": {
            "first": {"prepare": {"tokenizer": {"kind": "train", "vocab_size": 280}}},
            "second": {"prepare": {"tokenizer": {"kind": "load", "path": "stage:first"}}},
        },
    }


def run(chain, out, **options):
    said: list[str] = []
    run_recipe(parse_recipe(chain), out, say=said.append, **options)
    return said


def actions(chain, out):
    return [item.action for item in plan(parse_recipe(chain), out)]


def test_a_chain_runs_once_and_is_skipped_the_second_time(chain, tmp_path):
    out = tmp_path / "run"
    assert actions(chain, out) == ["run", "run"]
    said = run(chain, out)
    assert [line.split(":")[0] for line in said] == ["first (prepare)"] * 2 + [
        "second (prepare)"
    ] * 2
    assert RunFolder(out).status()["state"] == "finished"
    first, second = (PreparedCorpus.open(out / name) for name in ("first", "second"))
    assert first.vocab_size == second.vocab_size == 280
    assert run(chain, out) == [
        "first (prepare): finished, unchanged",
        "second (prepare): finished, unchanged",
    ]


def test_each_stage_is_a_run_folder_whose_recipe_runs_alone(chain, tmp_path):
    out = tmp_path / "run"
    run(chain, out)
    recipe = load_yaml(out / "second" / "recipe.yaml")
    assert recipe["prepare"]["tokenizer"]["path"] == str(out / "first")
    run(recipe, tmp_path / "alone")
    alone, chained = PreparedCorpus.open(tmp_path / "alone"), PreparedCorpus.open(out / "second")
    assert alone.hash == chained.hash


def test_a_changed_stage_is_redone_with_what_needs_it_and_says_why(chain, tmp_path):
    out = tmp_path / "run"
    run(chain, out)
    chain["stages"]["first"]["prepare"]["tokenizer"]["vocab_size"] = 270
    assert actions(chain, out) == ["redo", "redo"]
    said = run(chain, out)
    assert said[0].startswith("first (prepare): changed: prepare.tokenizer.vocab_size: 280 -> 270;")
    assert "second (prepare): changed: its input first;" in said[2]
    assert PreparedCorpus.open(out / "second").vocab_size == 270
    assert PreparedCorpus.open(out / "superseded" / "first-1").vocab_size == 280


def test_a_changed_last_stage_leaves_the_first_alone(chain, tmp_path):
    out = tmp_path / "run"
    run(chain, out)
    chain["stages"]["second"]["prepare"]["max_documents"] = 40
    assert actions(chain, out) == ["skip", "redo"]


def test_an_interrupted_stage_goes_on_and_a_failed_one_is_tried_again(chain, tmp_path, text):
    out = tmp_path / "run"
    moved = text.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError):
        run(chain, out)
    status = RunFolder(out / "first").status()
    assert status["state"] == "failed"
    assert status["message"].startswith("DataError: ")
    assert RunFolder(out).status()["state"] == "failed"
    moved.rename(text)
    assert actions(chain, out) == ["resume", "run"]
    assert run(chain, out)[0] == "first (prepare): goes on, it was failed"


def test_one_stage_alone(chain, tmp_path):
    out = tmp_path / "run"
    run(chain, out, only="first")
    assert not (out / "second").exists()
    assert actions(chain, out) == ["skip", "run"]


def test_a_single_verb_is_skipped_when_done_and_refuses_another_recipe(chain, tmp_path):
    out = tmp_path / "run"
    run(chain, out)
    recipe = load_yaml(out / "first" / "recipe.yaml")
    single = tmp_path / "single"
    run(recipe, single)
    assert run(recipe, single) == [
        f"{single}: finished, unchanged; give another folder with --out to run it again"
    ]
    recipe["prepare"]["max_documents"] = 30
    with pytest.raises(ConfigError, match=r"max_documents: null -> 30.*--out"):
        run(recipe, single)
    assert PreparedCorpus.open(single).statistics["splits"]["train"]["documents"] > 30


def test_a_locked_chain_is_left_alone(chain, tmp_path):
    out = tmp_path / "run"
    with RunFolder(out).locked(), pytest.raises(CheckpointError, match="another process"):
        run(chain, out)
    assert not re.search("running", str(RunFolder(out).status()))
