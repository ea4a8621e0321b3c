"""Verb ``analyze`` from folders to ranks, tables and a recipe that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from samara.config import dump_yaml, load_yaml
from samara.data.tokenizer import TextTokenizer
from samara.model.config import PROJECTIONS
from samara.report.config import ReportConfig
from samara.report.inputs import read_inputs
from samara.report.sections.ranks import ranks
from samara.runs import RunFolder, read_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("analyze")


@pytest.fixture
def dense(folder, pretrain_settings, samara) -> Path:
    """A run of two layers that kept its checkpoints at steps 8 and 12."""
    run = folder / "dense"
    if not run.exists():
        write_recipe(folder / "dense.yaml", pretrain_settings())
        assert samara("pretrain", str(folder / "dense.yaml"), "--out", str(run)).returncode == 0
    return run


def write_recipe(path: Path, settings: dict[str, Any], verb: str = "pretrain") -> None:
    path.write_text(dump_yaml({"schema": 1, "name": path.stem, verb: settings}))


def test_ranks_of_checkpoints_and_a_low_rank_recipe_that_trains(dense, small_corpus, samara):
    arguments = ["--data", str(small_corpus.folder), "--sequence-length", "32", "--max-tokens"]
    done = samara(
        "analyze", str(dense), *arguments, "900", "--checkpoints", "--allocate", "60%",
        "--multiple", "2", "--alpha", "0.9", "--alpha", "0.5", "--out", "found",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "r(0.9), the directions that hold 90 % of the energy, over 900 tokens" in done.stdout
    assert "energy without its mean on average, no allocation holds more" in done.stdout
    found = read_json(Path("found/ranks.json"))
    (model,) = found["models"].values()
    assert model["num_tokens"] == 900
    assert model["warning"] is None
    assert [one["step"] for one in model["measurements"]] == [8, 12, None]
    *_, last, final = model["measurements"]
    assert last["sites"] == final["sites"]  # the weights of step 12 are the model's
    assert len(final["sites"]) == 2 * len(PROJECTIONS) * 2
    for site in final["sites"]:
        more, less = site["ranks"]
        assert 1 <= less <= more <= site["width"]
    allocation = found["allocation"]
    assert allocation["parameters"] <= allocation["budget"]
    look = Path("look.yaml")
    settings = load_yaml(Path("found/recipe.yaml"))["analyze"]
    settings["allocate"]["centred"] = settings["checkpoints"] = False
    write_recipe(look, settings, "analyze")
    assert samara("run", str(look), "--out", "whole").returncode == 0
    whole = read_json(Path("whole/ranks.json"))["allocation"]
    assert whole["captured"] > allocation["captured"]  # the mean's energy is held by one direction
    recipe = load_yaml(Path("found/allocated.yaml"))
    assert recipe["name"] == "dense-allocated"
    assert recipe["pretrain"]["model"]["cola"]["rank"] == allocation["ranks"]
    trained = samara("pretrain", "found/allocated.yaml", "training.max_steps=2", "--out", "low")
    assert trained.returncode == 0, trained.stderr
    ranks_there = read_json(Path("low/model/config.json"))["ranks"]
    assert ranks_there == allocation["ranks"]

    both = samara("analyze", str(dense), "low", *arguments, "64", "--out", "both")
    assert both.returncode == 0, both.stderr
    assert "64 tokens are few for 48 channels" in both.stdout
    assert "bottleneck before its nonlinearity" in both.stdout
    low = read_json(Path("both/ranks.json"))["models"]["low"]["measurements"][-1]["sites"]
    assert {site["space"] for site in low} == {"input", "bottleneck", "activated", "output"}

    page = RunFolder(Path("page"))
    for name in ("found", "both"):
        section = ranks(read_inputs(ReportConfig(analysis=name), page))
        assert section is not None
        html = section.render()
        assert html.count('class="heat-map"') == (6 if name == "both" else 3)
        assert ("During training" in html) == (name == "found")
    del page


def test_an_encoder_of_transformers_and_a_text_file(tmp_path, small_corpus, samara):
    config = BertConfig(
        vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    TextTokenizer.load(small_corpus.tokenizer_folder).copy_to(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        (tmp_path / "bert" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "return the value of each item"}))
    settings = {
        "models": {"encoder": str(tmp_path / "bert")},
        "data": str(tmp_path / "text.jsonl"),
        "sequence_length": 16,
        "layers_at_once": 1,
    }
    write_recipe(tmp_path / "look.yaml", settings, "analyze")
    done = samara("run", str(tmp_path / "look.yaml"), "--out", "look")
    assert done.returncode == 0, done.stderr
    sites = read_json(Path("look/ranks.json"))["models"]["encoder"]["measurements"][0]["sites"]
    assert {site["projection"] for site in sites} >= {"query", "key", "value"}
    refused = samara("run", str(tmp_path / "look.yaml"), "allocate={budget: 0.5}", "--out", "b")
    assert refused.returncode == 2
    assert "no model of Samara's, so no recipe can hold its ranks" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dense}"], "--data: is missing"),
        (["x.yaml", "--data", "{corpus}"], "x.yaml: is a recipe; use `samara run x.yaml`"),
        (["{dense}", "--data", "gone.txt"], "data: 'gone.txt': no such file"),
        (["{dense}", "--data", "{corpus}", "--multiple", "4"], "--multiple 4: goes with --alloc"),
        (["{dense}", "--data", "{corpus}", "--allocate", "lots"], "--allocate lots: is no budget"),
        (["{dense}", "--data", "{corpus}", "--allocate", "140%"], "--allocate 140%: is no budget"),
        (["{dense}", "--data", "{corpus}"], "sequence_length: 256 exceeds the context"),
        (["{dense}", "--data", "{corpus}", "--alpha", "1.5"], "analyze.alphas"),
        (
            ["{dense}/model", "--data", "{corpus}", "--sequence-length", "32", "--checkpoints"],
            "holds no checkpoints of a training run",
        ),
        (
            ["{dense}", "--data", "{corpus}", "--sequence-length", "32", "--allocate", "10"],
            "allocate.budget: 10 parameters do not hold the least ranks",
        ),
    ],
)
def test_mistakes_are_one_line_each(arguments, message, dense, small_corpus, samara):
    places = {"dense": dense, "corpus": small_corpus.folder}
    done = samara("analyze", *(text.format(**places) for text in arguments))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_allocation_from_an_unknown_model_is_an_error(dense, small_corpus, samara, tmp_path):
    settings = {
        "models": {"dense": str(dense)},
        "data": str(small_corpus.folder),
        "allocate": {"model": "dens", "budget": 0.5},
    }
    write_recipe(tmp_path / "look.yaml", settings, "analyze")
    done = samara("run", str(tmp_path / "look.yaml"))
    assert done.returncode == 2
    assert "allocate.model: no such model" in done.stderr


def test_a_page_says_that_an_analysis_has_not_run(tmp_path):
    (tmp_path / "analysis").mkdir()
    config = ReportConfig(analysis=str(tmp_path / "analysis"))
    section = ranks(read_inputs(config, RunFolder(tmp_path / "page")))
    assert section is not None
    assert "The analysis has no results yet" in section.render()
    assert ranks(read_inputs(ReportConfig(), RunFolder(tmp_path / "page"))) is None
