"""What goes wrong: clients that fail, lie or are late; settings that do not fit."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samara.config import dump_yaml
from samara.errors import ConfigError
from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.federated.messages import ClientState, Instruction
from samara.runs import RunFolder


def test_a_round_completes_whatever_its_clients_send(bases, rows, tmp_path, settings, folder_of):
    config = settings(bases["samara"], rows, clients__per_round=6, method="fedlora")
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    honest = job.trainer.train

    def spoilt(instruction, tensors, state):
        reply, state = honest(instruction, tensors, state)
        sent = dict(reply.tensors)
        name = next(iter(sent))
        match instruction.client:
            case 0:
                sent[name] = np.full_like(sent[name], np.nan)
            case 1:
                sent[name] = sent[name][:1]
            case 2:
                sent["somebody.else"] = sent.pop(name)
            case 3:
                sent = {key: 1e6 * value for key, value in sent.items()}
        return type(reply)(**{**vars(reply), "tensors": sent}), state

    job.trainer.train = spoilt
    record = driver.run_round()
    reasons = {c["client"]: (c["verdict"], c["reason"]) for c in record["clients"]}
    assert [reasons[client][0] for client in range(6)] == ["refused"] * 4 + ["ok"] * 2
    assert "not finite" in reasons[0][1]
    assert "shape" in reasons[1][1]
    assert "unknown tensor somebody.else" in reasons[2][1]
    assert "times the median" in reasons[3][1]
    assert set(record["senders"].values()) == {2}


def test_a_client_whose_own_layers_are_damaged_is_lost_and_the_round_completes(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, clients__per_round=6, sharing__direction="none")
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    driver.run_round()
    file = tmp_path / "run/clients/client-00000003/round-00000000/personal.safetensors"
    file.write_bytes(b"rubbish")
    record = driver.run_round()
    verdicts = {c["client"]: c["verdict"] for c in record["clients"]}
    assert verdicts == {client: "error" if client == 3 else "ok" for client in range(6)}
    assert "is cut off" in record["clients"][3]["reason"]


def test_a_training_that_diverges_is_a_failed_reply_and_changes_nothing(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, local__optimizer={"lr": 1e30})
    job = Job(config, folder_of(tmp_path / "run"))
    state = ClientState()
    reply, after = job.trainer.train(Instruction(round=0, client=0), job.trainer.tensors(), state)
    assert reply.verdict == "not_finite"
    assert reply.message
    assert not reply.tensors
    assert after is state


def test_lost_and_late_clients_do_not_stop_a_run(
    bases, rows, tmp_path, settings, finished, device_fields
):
    for name, changes in (("lossy", {"failure_probability": 0.5}), ("late", {"slowness": 1e4})):
        path = tmp_path / f"{name}.yaml"
        device = {"name": name, "slowness": 1.0, "availability": 0.9, **device_fields, **changes}
        path.write_text(dump_yaml(device))
    config = settings(
        bases["samara"],
        rows,
        clients__devices=[{"profile": str(tmp_path / f"{n}.yaml")} for n in ("lossy", "late")],
        clients__per_round=5,
        server={"rounds": 3, "deadline_seconds": 60.0},
    )
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()[1:]
    verdicts = [(c["device"], c["verdict"]) for record in log for c in record["clients"]]
    assert {v for d, v in verdicts if d == "late"} == {"timeout"}
    assert {v for d, v in verdicts if d == "lossy"} == {"ok", "error"}
    assert all(record["round_modelled_seconds"] <= 60 for record in log)


def test_a_round_in_which_nobody_can_be_reached_changes_nothing(
    bases, rows, tmp_path, settings, finished, device_fields
):
    path = tmp_path / "gone.yaml"
    path.write_text(
        dump_yaml({"name": "gone", "slowness": 1.0, "availability": 0.0, **device_fields})
    )
    config = settings(bases["samara"], rows, clients__devices=[{"profile": str(path)}])
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()
    assert len({record["validation_loss"] for record in log}) == 1
    assert all(not record["clients"] for record in log[1:])


def test_a_device_with_little_memory_drops_layers_or_sits_out(
    bases, rows, tmp_path, settings, finished, device_fields
):
    small = tmp_path / "small.yaml"
    # With the clock's 1 MB + 1 MB a layer and the margin of a tenth: three layers fit, not four.
    device = {**device_fields, "name": "small", "slowness": 1.0, "memory_bytes": 4.5e6}
    small.write_text(dump_yaml(device))
    for method in ("droppeft", "fedlora"):
        config = settings(
            bases["samara"],
            rows,
            method=method,
            clients__devices=[{"profile": str(small)}],
            server__rounds=2,
        )
        finished(config, tmp_path / method)
        log = RunFolder(tmp_path / method).metrics()[1:]
        counts = [c["active_layers_max"] for record in log for c in record["clients"]]
        if method == "droppeft":
            assert counts
            assert max(counts) <= 3
        else:
            assert not counts
            assert all(len(record["sat_out"]) == 3 for record in log)


def test_the_server_goes_back_to_its_best_weights_when_the_loss_rises(
    bases, rows, tmp_path, settings, finished
):
    config = settings(
        bases["samara"], rows, method="fedlora", local__optimizer={"lr": 0.5}, server__rounds=3
    )
    config = config.model_copy(
        update={"server": config.server.model_copy(update={"rollback_rise": 0.0})}
    )
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()
    assert any(record["rolled_back"] for record in log[1:])
    best = min(log, key=lambda record: record["validation_loss"])
    result = json.loads((tmp_path / "run/results.json").read_text())
    assert result["best_round"] == best["step"]
    if log[-1]["rolled_back"]:
        assert result["test"]["last"] == result["test"]["best"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_dropout": {"rate": 0.5, "scale": "survival_at_eval"}},
            "layer_dropout.scale: survival_at_eval changes evaluation",
        ),
        ({"clients__devices": []}, "clients: devices: is empty"),
        ({"clients__test_fraction": 0.95}, "leave nothing to train on"),
        ({"metod": "fedlora"}, "metod: unknown key .did you mean 'method'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(bases, rows, changes, message, settings):
    with pytest.raises(ConfigError, match=message):
        settings(bases["samara"], rows, **changes)


def test_settings_that_do_not_fit_the_model_are_refused(bases, rows, tmp_path, settings, folder_of):
    text = {"kind": "perplexity", "name": "text", "data": str(rows / "test.jsonl")}
    with pytest.raises(ConfigError, match=r"method: head_only needs task.kind labels"):
        settings(
            bases["samara"],
            rows,
            method="head_only",
            task=text,
            clients__partition={"kind": "iid"},
        )
    with pytest.raises(ConfigError, match=r"clients.partition: dirichlet spreads labels"):
        settings(bases["samara"], rows, task=text)
    config = settings(bases["samara"], rows, configurator__rates=[0.05])
    with pytest.raises(ConfigError, match=r"configurator.rates: arm 0.05-incremental"):
        federate(config, folder_of(tmp_path / "a"))
    config = settings(bases["bert"], rows, layer_dropout={"rate": 0.5, "scale": "inverse_keep"})
    with pytest.raises(ConfigError, match=r"layer_dropout.scale: inverse_keep needs layers"):
        federate(config, folder_of(tmp_path / "c"))
    config = settings(bases["samara"], rows, method="frozen_depth", trained_layers=9)
    with pytest.raises(ConfigError, match=r"trained_layers: 9 wanted, the model has 4 layers"):
        federate(config, folder_of(tmp_path / "b"))
