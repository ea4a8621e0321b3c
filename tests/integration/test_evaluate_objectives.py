"""Verb ``evaluate`` of masked and UL2 models: one set of masks, rows as units, clear refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from samara.config import dump_yaml, validate
from samara.data.prepare import PreparedCorpus
from samara.errors import CheckpointError, ConfigError
from samara.measure.config import EvaluateConfig
from samara.measure.evaluate import evaluate
from samara.model.interchange.convert import convert
from samara.report.config import ReportConfig
from samara.report.inputs import read_inputs
from samara.runs import RunFolder, read_json
from samara.train.config import PretrainConfig
from samara.train.pretrain import pretrain

MASKED = {"kind": "masked_lm", "fraction": 0.2, "max_predictions": 4}
UL2 = {"kind": "ul2", "weights": {"R-3-0.15": 1, "S-0.25": 1}}


@pytest.fixture(scope="module")
def train(
    small_corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    def make(objective: dict[str, Any], steps: int, seed: int = 1) -> Path:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        settings = {
            "seed": seed,
            "objective": objective,
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
                "max_steps": steps,
                "batch_size": 16,
                "micro_batch_size": 16,
                "precision": "float32",
                "device": "cpu",
            },
            "logging": {"device_profile": "cpu-2core"},
        }
        pretrain(validate(PretrainConfig, settings, path="pretrain"), folder)
        return folder.path

    return make


@pytest.fixture(scope="module")
def masked(train: Callable[..., Path]) -> dict[str, Path]:
    return {"short": train(MASKED, 1), "long": train(MASKED, 40)}


@pytest.fixture
def scores(small_corpus: PreparedCorpus, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(models: dict[str, Path], objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
        settings = {
            "models": {name: str(path) for name, path in models.items()},
            "corpus": str(small_corpus.folder),
            "objective": objective,
            "sequence_length": 32,
            "device": "cpu",
            "bootstrap_samples": 200,
            **changes,
        }
        folder = RunFolder(tmp_path / "evaluation")
        evaluate(EvaluateConfig.model_validate(settings), folder)
        return dict(read_json(folder.path / "results.json"))

    return run


def test_a_masked_model_has_a_pseudo_perplexity(
    masked: dict[str, Path], scores: Callable[..., dict[str, Any]]
) -> None:
    results = scores(masked, MASKED)
    short, long = results["models"].values()
    # The training loop validates on the same rows under the same masks.
    summary = read_json(masked["long"] / "summary.json")
    assert long["loss"]["value"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert long["perplexity"]["value"] == pytest.approx(math.exp(long["loss"]["value"]))
    assert long["loss"]["low"] < long["loss"]["value"] < long["loss"]["high"]
    assert long["bits_per_byte"] is None
    assert long["samples"] == []
    assert short["loss"]["value"] > long["loss"]["value"]
    assert results["comparisons"][0]["verdict"] == "better"
    assert results["objective"] == {"mask_sets": None, "rows": "packed", **MASKED}
    assert "num_documents" not in results
    assert results["num_tokens"] <= 4 * results["num_rows"]
    assert scores(masked, MASKED, batch_size=3)["num_tokens"] == results["num_tokens"]


def test_masks_are_the_same_for_every_model_and_run(
    masked: dict[str, Path], scores: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    convert(masked["long"], tmp_path / "copy", to="samara")
    results = scores({"one": masked["long"], "copy": tmp_path / "copy"}, MASKED)
    one, copy = results["models"].values()
    assert one["loss"] == copy["loss"]
    assert results["comparisons"][0]["loss_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert scores({"one": masked["long"]}, MASKED)["models"]["one"]["loss"] == one["loss"]
    other = scores({"one": masked["long"]}, {**MASKED, "fraction": 0.1})
    assert other["num_tokens"] < results["num_tokens"]


def test_ul2_is_scored_under_its_denoisers(
    train: Callable[..., Path], scores: Callable[..., dict[str, Any]]
) -> None:
    run = train(UL2, 10)
    results = scores({"ul2": run}, UL2, sampling={"max_new_tokens": 3})
    entry = results["models"]["ul2"]
    summary = read_json(run / "summary.json")
    assert entry["loss"]["value"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert entry["samples"][0]["prompt"] == "Return the"


def test_models_of_another_kind_are_refused(
    masked: dict[str, Path], train: Callable[..., Path], scores: Callable[..., dict[str, Any]]
) -> None:
    causal = train({"kind": "causal_lm"}, 1)
    with pytest.raises(CheckpointError, match="is a causal language model, a masked language mod"):
        scores({"m": causal}, MASKED)
    with pytest.raises(CheckpointError, match="a causal language model cannot be bidirectional"):
        scores({"m": masked["long"]}, {"kind": "causal_lm"})
    with pytest.raises(
        ConfigError,
        match=r"models.m: the vocabulary of .* \(300 entries\) is not that of the corpus .* "
        r"\(3\d\d with \d+ special tokens of the objective\)",
    ):
        scores({"m": causal}, UL2)


def test_ul2_needs_a_model_of_ours(
    masked: dict[str, Path], scores: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(masked["long"] / "model" / name, tmp_path / "llama" / name)
    with pytest.raises(ConfigError, match=r"models.m: .* is no model of Samara's, whose decoder"):
        scores({"m": tmp_path / "llama"}, UL2)
    with pytest.raises(CheckpointError, match="is no model of Samara's, a masked language model"):
        scores({"m": tmp_path / "llama"}, MASKED)


@pytest.mark.parametrize("name", ["masked-lm", "ul2"])
def test_the_shipped_recipes_run_to_their_end(
    name: str, small_corpus: PreparedCorpus, samara: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / f"{name}.yaml"
    settings = [
        f"data.corpus={small_corpus.folder}",
        "data.sequence_length=64",
        "model.hidden_size=32",
        "model.num_hidden_layers=1",
        "model.ffn_dim=32",
        "training.max_tokens=4096",
        "training.evaluate_every_steps=2",
        "checkpoint.every_steps=2",
        "logging.device_profile=cpu-2core",
    ]
    out = tmp_path / "run"
    done = samara("pretrain", str(recipe), *settings, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert read_json(out / "status.json")["state"] == "finished"
    objective = read_json(out / "summary.json")["objective"]
    evaluation = {
        "schema": 1,
        "name": "scored",
        "evaluate": {
            "models": {"it": str(out)},
            "corpus": str(small_corpus.folder),
            "objective": {"kind": objective},
            "sequence_length": 64,
            "sampling": None,
        },
    }
    (tmp_path / "evaluation.yaml").write_text(dump_yaml(evaluation))
    scored = samara("evaluate", str(tmp_path / "evaluation.yaml"), "--out", str(tmp_path / "e"))
    assert scored.returncode == 0, scored.stderr
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["objective"]["kind"] == objective
    assert results["models"]["it"]["loss"]["value"] > 0


def test_the_report_says_what_it_does_not_show(
    masked: dict[str, Path], scores: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    scores(masked, MASKED)
    config = ReportConfig.model_validate(
        {
            "title": "T",
            "pretraining": {"long": str(masked["long"])},
            "evaluation": str(tmp_path / "evaluation"),
        }
    )
    inputs = read_inputs(config, RunFolder(tmp_path / "report"))
    assert inputs.evaluation is None
    assert inputs.evaluation_note == (
        "The evaluation is one of masked_lm; its scores stand in results.json."
    )
