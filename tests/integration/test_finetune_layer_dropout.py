"""Verb finetune with layers left out: the plain run at rate 0, resumed, and what is not touched."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from samara.adapt import finetune as module
from samara.adapt.finetune import Job
from samara.adapt.load import load_finetuned
from samara.errors import ConfigError
from samara.runs import RunFolder, hash_file, read_json
from samara.train.layer_dropout import draw_gates
from samara.train.layer_rates import LayerDropoutConfig
from samara.train.parallel import choose_place

from .test_finetune import METHODS, SPARSE, build, rows, run_one, settings, weights

__all__ = ["rows"]  # the fixture

HALF = {"rate": 0.5, "shape": "uniform"}
METHODS_ASKED = ("sparse", "full", "lora")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: build(kind, root / kind) for kind in ("llama", "bert")}


def training(**changes: Any) -> dict[str, Any]:
    return {"max_steps": 6, "evaluate_every_steps": 4, "layer_dropout": HALF, **changes}


@pytest.mark.parametrize("name", METHODS_ASKED)
def test_rate_zero_is_the_plain_run(bases, rows, tmp_path, name):
    found = {}
    for kind, dropout in (("plain", None), ("zero", {"rate": 0.0})):
        own = training(layer_dropout=dropout)
        config = settings(bases["llama"], rows, "labels", METHODS[name], training=own)
        results = run_one(config, tmp_path / kind)
        last = max((tmp_path / kind / "checkpoints").iterdir())
        found[kind] = (
            {path.name: hash_file(path) for path in sorted(last.glob("*.safetensors"))},
            {n: t.tolist() for n, t in weights(load_finetuned(tmp_path / kind)).items()},
            results["validation_loss"],
            results["flops"],
        )
    assert found["plain"] == found["zero"]


@pytest.mark.parametrize("name", METHODS_ASKED)
def test_resuming_is_going_on_bit_for_bit(bases, rows, tmp_path, monkeypatch, name):
    config = settings(
        bases["llama"],
        rows,
        "labels",
        METHODS[name],
        training=training(),
        checkpoint={"every_steps": 2},
    )
    straight = run_one(config, tmp_path / "straight")
    evaluate = module.Job._evaluate

    def interrupted(job: Job) -> float:
        if job.state.step == 4:
            raise KeyboardInterrupt
        return evaluate(job)

    monkeypatch.setattr(module.Job, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_one(config, tmp_path / "resumed")
    monkeypatch.undo()
    resumed = run_one(config, tmp_path / "resumed")
    for key in ("scores", "validation_loss", "train_loss", "flops", "tokens"):
        assert straight[key] == resumed[key], key
    expected = weights(load_finetuned(tmp_path / "straight"))
    for tensor_name, tensor in weights(load_finetuned(tmp_path / "resumed")).items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name
    # One of two layers in each pass: what the other would have cost is not counted.
    costs = read_json(tmp_path / "straight" / "costs.json")
    least, most = (
        straight["tokens"] * (costs["flops_per_token"] - left_out)
        for left_out in sorted(costs["flops_per_token_by_layer"], reverse=True)
    )
    assert least * 0.999 < straight["flops"] < most * 1.001
    assert straight["layer_dropout"]["budget"] == 1


def ran(step: int) -> set[int]:
    """The layers that ran in any micro-batch of a step, by the run's own numbers."""
    rates = LayerDropoutConfig.model_validate(HALF).rates(2)
    found: set[int] = set()
    for number in range(2):
        gates = draw_gates(rates, seed=3, node=0, round=step, batch=number)
        found |= {layer for layer, runs in enumerate(gates) if runs}
    return found


def test_a_layer_that_is_left_out_leaves_its_entries_moments_and_count_untouched(
    bases, rows, tmp_path
):
    config = settings(
        bases["llama"],
        rows,
        "question",
        SPARSE,
        training=training(max_steps=5),
        checkpoint={"every_steps": 1, "keep_last": 9},
    )
    run_one(config, tmp_path / "run")
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    states = [load_file(folder / "optimizer.safetensors") for folder in folders]
    assert len(states) == 5
    assert any(len(ran(step)) == 1 for step in range(1, 5)), "a draw that shows something"
    for step, (before, after) in enumerate(pairwise(states), start=1):
        for key, tensor in after.items():
            if ".layers." not in key or key.endswith(".index"):
                continue
            layer = int(key.split(".layers.")[1].split(".")[0])
            is_same = torch.equal(tensor, before[key])
            assert is_same == (layer not in ran(step)), (step, key)
    counts = {key: float(t) for key, t in states[-1].items() if key.endswith(".step")}
    for layer in range(2):
        times = sum(layer in ran(step) for step in range(5))
        own = {count for key, count in counts.items() if f".layers.{layer}." in key}
        assert own == {float(times)}


def test_every_evaluation_uses_all_layers(bases, rows, tmp_path):
    config = settings(bases["llama"], rows, "question", SPARSE, training=training())
    results = run_one(config, tmp_path / "run")
    job = Job(config, RunFolder(tmp_path / "run"), choose_place("cpu"))
    assert job._validation_loss(job.model) == results["validation_loss"]


def test_what_cannot_be_is_said_in_a_line(bases, rows, tmp_path):
    def fails(match: str, base: str, method: Any, dropout: dict[str, Any]) -> None:
        own = training(layer_dropout=dropout)
        task = "labels" if base == "bert" else "question"
        with pytest.raises(ConfigError, match=match):
            run_one(settings(bases[base], rows, task, method, training=own), tmp_path / base)

    only_first = {"selection": {"density": 0.1, "num_samples": 2, "targets": ["*layers.0.*proj*"]}}
    fails(r"use inverse_keep", "llama", SPARSE, {"rate": 0.5, "scale": "survival_at_eval"})
    fails(
        r"^training\.layer_dropout\.rate: 0\.1 of 2 layers rounds to no layer",
        "llama",
        SPARSE,
        {"rate": 0.1},
    )
    fails(
        r"^training\.layer_dropout: nothing is trained in layers 1 and outside of the layers",
        "llama",
        {**SPARSE, **only_first},
        HALF,
    )
    fails(
        r"^training\.layer_dropout\.scale: inverse_keep needs layers that add to a residual",
        "bert",
        SPARSE,
        {"rate": 0.5, "scale": "inverse_keep"},
    )
