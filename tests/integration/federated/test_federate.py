"""Verb federate: the whole of it on a tiny model, from rows to results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from samara.config import dump_yaml
from samara.data.draws import Draws, Purpose
from samara.data.loader import training_batches
from samara.federated.job import Job
from samara.federated.messages import ClientState, Instruction
from samara.runs import RunFolder
from samara.train.checkpoint import TrainingState
from samara.train.loop import train
from samara.train.optim import Optimizer

METHODS = (
    "droppeft", "static_stld", "fedavg", "fedlora", "fedlora_checkpointing", "frozen_depth",
    "head_only",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "base"),
    [*((method, "samara") for method in METHODS), ("droppeft", "bert"), ("fedlora", "bert")],
)
def test_one_line_switches_the_method(bases, rows, tmp_path, method, base, settings, finished):
    result = finished(settings(bases[base], rows, method=method), tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()
    assert [record["step"] for record in log] == [0, 1, 2]
    layers = {c["active_layers_max"] for record in log[1:] for c in record["clients"]}
    assert layers == {"static_stld": {2}, "droppeft": layers}.get(method, {4})
    assert (min(layers) < 4) == (method in ("droppeft", "static_stld"))
    assert all(c["verdict"] == "ok" for record in log[1:] for c in record["clients"])
    assert {"seconds", "joules", "clock", "devices"} <= result["modelled"].keys()
    assert result["measured"]["cpu_seconds"] > 0
    assert set(result["modelled"]["devices"]) == {"quick", "slow"}
    groups = set(log[1]["senders"])
    wanted = {"head_only": {"head"}, "frozen_depth": {"2", "3", "head"}}
    assert groups == wanted.get(method, {"0", "1", "2", "3", "head"})
    if method != "droppeft":
        assert all(not entry["personal_layers"] for entry in result["clients"]["each"])
    exported = "head.safetensors" if method == "head_only" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / exported).exists()


def test_causal_models_are_tuned_on_the_text_of_natural_users(
    bases, rows, tmp_path, settings, finished
):
    config = settings(
        bases["samara"],
        rows,
        task={"kind": "perplexity", "name": "text", "data": str(rows / "test.jsonl")},
        clients__number=None,
        clients__partition={"kind": "key", "field": "user"},
        server__rounds=3,
        local__steps=8,
    )
    result = finished(config, tmp_path / "run")
    losses = [record["validation_loss"] for record in RunFolder(tmp_path / "run").metrics()]
    assert min(losses) < losses[0] - 0.1
    assert result["clients"]["number"] == 8
    assert "loss_worst_decile" in result["clients"]["personal"]
    assert result["test"]["best"]["accuracy"] is None


@pytest.mark.parametrize("payload", ["lora", "sparse", "full"])
def test_a_federation_of_one_client_is_training_on_one_machine(
    bases, rows, tmp_path, payload, settings, finished, folder_of
):
    """Each round an optimizer that starts afresh, on the client's rows in their order."""
    config = settings(
        bases["samara"],
        rows,
        method="fedavg",
        payload=payload,
        selection={"density": 0.05, "num_samples": 4},
        lora__dropout=0.0,
        clients__number=1,
        clients__per_round=1,
        clients__partition={"kind": "iid"},
        server={"rounds": 2, "rollback_rise": None},
    )
    finished(config, tmp_path / "run")
    job = Job(config, folder_of(tmp_path / "alone"))
    trainer, local = job.trainer, config.local
    own = trainer.data.client(0).train
    order = Draws(seed=5, purpose=Purpose.CLIENT_TRAINING).integers(1, below=2**53)
    for round in range(2):
        state = TrainingState()
        train(
            trainer.model,
            objective=trainer.objective,
            optimizer=trainer.payload.optimizer()
            if payload == "sparse"
            else Optimizer(trainer.model, local.optimizer),
            learning_rate=lambda _: 0.01,
            batches=training_batches(
                own,
                batch_size=4,
                micro_batch_size=4,
                seed=int(order[0]),
                start_step=2 * round,
                num_steps=2,
            ),
            state=state,
            num_steps=2,
            clip_grad_norm=1.0,
        )
    saved = load_file(tmp_path / "run/checkpoints/round-00000002/global.safetensors")
    for name, value in trainer.tensors().items():
        np.testing.assert_array_equal(saved[name].numpy(), value)


def test_a_client_depends_on_nothing_that_happened_before(
    bases, rows, tmp_path, settings, folder_of
):
    job = Job(settings(bases["samara"], rows), folder_of(tmp_path / "run"))
    start = job.trainer.tensors()
    asked = [Instruction(round=1, client=c, rate=0.5, shape="incremental") for c in (0, 1)]
    first, _ = job.trainer.train(asked[0], start, ClientState())
    job.trainer.train(asked[1], start, ClientState())
    again, _ = job.trainer.train(asked[0], start, ClientState())
    assert first.plain() == again.plain()
    for name, value in first.tensors.items():
        np.testing.assert_array_equal(value, again.tensors[name])


def test_the_clock_is_measured_once_and_kept_for_when_the_run_goes_on(
    bases, rows, tmp_path, settings, finished
):
    clock = {"kind": "calibrated", "repetitions": 1}
    first = finished(settings(bases["samara"], rows, clock=clock), tmp_path / "run")
    measured = json.loads((tmp_path / "run/clock.json").read_text())
    assert measured["basis"] == "measured"
    assert measured["bytes_per_layer"] > 0
    assert measured["bytes_fixed"] > 0
    again = finished(
        settings(bases["samara"], rows, clock=clock, server__rounds=3), tmp_path / "run"
    )
    assert first["modelled"]["clock"] == again["modelled"]["clock"] == measured


def test_the_command_runs_a_recipe(bases, rows, samara, tmp_path, settings):
    config = settings(bases["samara"], rows).model_dump(mode="json")
    recipe = {"schema": 1, "name": "small", "federate": config}
    (tmp_path / "small.yaml").write_text(dump_yaml(recipe))
    done = samara("federate", "small.yaml", "method=fedlora", "server.rounds=1", "--out", "run")
    assert (done.returncode, "1/1 rounds" in done.stderr) == (0, True)
    assert json.loads((tmp_path / "run/results.json").read_text())["method"] == "fedlora"
