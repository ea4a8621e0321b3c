"""Server optimizers, payloads and baselines: each trains, stops and goes on like the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samara.adapt.models import load_task_model
from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.federated.messages import ClientState, Instruction, message_bytes
from samara.federated.mixed_ranks import truncate
from samara.runs import RunFolder
from samara.sparse.delta import Delta
from samara.sparse.support import Support
from samara.train.layer_dropout import LayerDropout

KINDS = {
    "fedadam": {"method": "fedlora", "server__optimizer": {"kind": "fedadam"}},
    "fedyogi": {"server__optimizer": {"kind": "fedyogi", "lr": 0.02}, "local__proximal": 0.1},
    "sparse": {
        "payload": "sparse",
        "selection": {"density": 0.05, "num_samples": 4},
        "server__optimizer": {"kind": "fedadagrad"},
        "local__optimizer": {"lr": 0.03},
    },
    "full": {"method": "static_stld", "payload": "full"},
    "hetlora": {"method": "hetlora", "mixed_ranks": {"missing": "leave_out"}},
    "fedadapter": {
        "method": "fedadapter",
        "lora__rank": 4,
        "depth_search": {"depth": 1, "trial_rounds": 2},
    },
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_each_trains_and_killed_goes_on_to_the_same_result(
    bases, rows, tmp_path, monkeypatch, kind, settings, folder_of, outcome
):
    config = settings(bases["samara"], rows, server__rounds=3, local__steps=4, **KINDS[kind])
    federate(config, folder_of(tmp_path / "whole"))
    losses = [record["validation_loss"] for record in RunFolder(tmp_path / "whole").metrics()]
    assert min(losses) < losses[0]
    run_round = InProcessDriver.run_round

    def killed(driver):
        record = run_round(driver)
        if driver.server.state.round == 1:
            raise Killed
        return record

    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "run_round", killed)
        with pytest.raises(Killed):
            federate(config, folder_of(tmp_path / "cut"))
    federate(config, folder_of(tmp_path / "cut"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["fedyogi", "sparse", "hetlora", "fedadapter"])
def test_the_order_in_which_clients_reply_changes_no_bit(
    bases, rows, tmp_path, monkeypatch, kind, settings, folder_of, outcome
):
    config = settings(bases["samara"], rows, **KINDS[kind])
    federate(config, folder_of(tmp_path / "straight"))
    ask = InProcessDriver.ask
    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "ask", lambda *own: ask(*own)[::-1])
        federate(config, folder_of(tmp_path / "reversed"))
    assert outcome(tmp_path / "reversed") == outcome(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["sparse", "full", "hetlora", "fedadapter"])
def test_unsound_replies_are_refused_and_bytes_are_what_the_log_says(
    bases, rows, tmp_path, kind, settings, folder_of
):
    config = settings(bases["samara"], rows, clients__per_round=6, **KINDS[kind])
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    honest, counted = job.trainer.train, {}

    def spoilt(instruction, tensors, state):
        reply, state = honest(instruction, tensors, state)
        sent = dict(reply.tensors)
        name = next(iter(sent))
        match instruction.client:
            case 0:
                sent[name] = np.full_like(sent[name], np.nan)
            case 1:
                sent[name] = sent[name][:1, :1] if sent[name].ndim == 2 else sent[name][:1]
            case 2:
                sent["somebody.else"] = sent.pop(name)
            case 3:
                sent = {key: 1e6 * (1 + value) for key, value in sent.items()}
        reply = replace(reply, tensors=sent)
        counted[instruction.client] = (
            message_bytes(instruction.to_dict(), tensors), message_bytes(reply.plain(), sent),
        )  # fmt: skip
        return reply, state

    job.trainer.train = spoilt
    record = driver.run_round()
    logged = {c["client"]: (c["bytes_down"], c["bytes_up"]) for c in record["clients"]}
    assert logged == counted
    verdicts = {c["client"]: (c["verdict"], c["reason"]) for c in record["clients"]}
    assert [verdicts[client][0] for client in range(6)] == ["refused"] * 4 + ["ok"] * 2
    for client, reason in enumerate(["not finite", "shape", "unknown tensor", "the median"]):
        assert reason in verdicts[client][1]
    assert all(np.isfinite(value).all() for value in job.server.state.tensors.values())


def test_moments_go_back_with_the_weights(bases, rows, tmp_path, settings, folder_of):
    config = settings(
        bases["samara"],
        rows,
        method="fedlora",
        server={"rounds": 4, "optimizer": {"kind": "fedadam", "lr": 2.0}, "rollback_rise": 0.0},
    )
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    state, rolled = job.server.state, 0
    while not driver.is_done:
        record = driver.run_round()
        if record["rolled_back"]:
            rolled += 1
            assert state.moments is state.best_moments
            assert set(state.moments.steps.values()) <= {state.best_round}
    assert rolled
    saved = job.store.latest()
    assert saved is not None
    other = Job(config, folder_of(tmp_path / "run"))
    other.server.restore(saved.plain, saved.tensors, saved.best_tensors, saved.beside)
    assert other.server.beside().keys() == job.server.beside().keys()


def test_a_pull_towards_the_start_keeps_clients_near_it(bases, rows, tmp_path, settings, folder_of):
    moved = []
    for mu in (0.0, 10.0):
        config = settings(
            bases["samara"], rows, method="fedlora", local__proximal=mu, local__steps=8
        )
        job = Job(config, folder_of(tmp_path / f"run-{mu}"))
        driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
        driver.resume()
        before = dict(job.server.state.tensors)
        driver.run_round()
        moved.append(
            sum(float(((v - before[n]) ** 2).sum()) for n, v in job.server.state.tensors.items())
        )
    assert moved[0] > 2 * moved[1]


def test_of_a_sparse_payload_values_alone_travel_and_a_delta_comes_out(
    bases, rows, tmp_path, settings, finished, folder_of
):
    config = settings(
        bases["samara"], rows, method="fedavg", payload="sparse", selection={"density": 0.05}
    )
    result = finished(config, tmp_path / "run")
    support = Support.load(tmp_path / "run/support.safetensors")
    saved = load_file(tmp_path / "run/checkpoints/round-00000002/best.safetensors")
    assert {name: value.numel() for name, value in saved.items()} == {
        name: index.numel() for name, index in support.indices.items()
    }
    assert result["trained_parameters"] == support.num_entries
    file = tmp_path / "run/support.safetensors"
    assert result["measured"]["setup_bytes_per_client"] == file.stat().st_size
    sent = [c for r in RunFolder(tmp_path / "run").metrics()[1:] for c in r["clients"]]
    assert all(0 < c["bytes_up"] - 4 * support.num_entries < 1000 for c in sent)
    head = load_file(tmp_path / "run/head.safetensors")
    job = Job(config, folder_of(tmp_path / "run"))
    job.trainer.load({name: value.numpy() for name, value in saved.items()})
    trained = dict(job.trainer.model.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in head.items())
    plain = load_task_model(str(bases["samara"]), labels=None, dtype=None, seed=0).model
    with Delta.load(tmp_path / "run/delta.safetensors").applied_to(plain):
        for name, value in plain.model.named_parameters():
            assert torch.equal(value, trained[f"model.{name}"])


def test_a_layer_that_is_skipped_leaves_its_selected_entries_and_their_state(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(
        bases["samara"], rows, payload="sparse", layer_dropout={"rate": 0.5, "gate": "budgeted"}
    )
    job = Job(config, folder_of(tmp_path / "run"))
    asked = Instruction(round=0, client=0, rate=0.7, shape="incremental")
    before = job.trainer.tensors()
    reply, _ = job.trainer.train(asked, before, ClientState())
    with LayerDropout(
        job.trainer.model,
        config.layer_dropout.model_copy(update={"rate": 0.7, "shape": "incremental"}),
        seed=config.seed,
    ) as dropout:
        drawn = [dropout.gates(batch=batch, round=0) for batch in range(2)]
    active = [sum(gates[layer] for gates in drawn) for layer in range(4)]
    assert 0 in active
    entries = job.trainer.payload.selected
    for name, group in job.trainer.layout.groups.items():
        count = 2 if group == "head" else active[int(group)]
        assert float(entries[name].steps) == count, name
        assert bool(entries[name].exp_avg.any()) == (count > 0)
        now = job.trainer.tensors()[name]
        assert np.array_equal(now, before[name]) == (count == 0)
        assert (name in reply.tensors) == (count > 0)


@pytest.mark.parametrize("payload", ["sparse", "full"])
def test_payloads_fit_an_encoder_with_layers_left_out(
    bases, rows, tmp_path, payload, settings, finished
):
    config = settings(
        bases["bert"], rows, method="static_stld", payload=payload, server__rounds=1,
        selection={"density": 0.05, "num_samples": 4},
    )  # fmt: skip
    finished(config, tmp_path / "run")
    record = RunFolder(tmp_path / "run").metrics()[-1]
    assert all((c["verdict"], c["active_layers_max"]) == ("ok", 2) for c in record["clients"])
    assert record["senders"]["head"] == 3
    made = {"sparse": "delta.safetensors", "full": "model/model.safetensors"}
    assert (tmp_path / "run" / made[payload]).exists()


def test_a_small_rank_is_a_small_adapter(bases, rows, tmp_path, settings, folder_of):
    """Rank 1 of an adapter of rank 2 trains as an adapter of rank 1 with the same scale."""
    common = {"local__steps": 4, "lora__dropout": 0.0}
    large = Job(
        settings(bases["samara"], rows, method="hetlora", **common), folder_of(tmp_path / "large")
    )
    small = Job(
        settings(bases["samara"], rows, method="fedlora", lora__rank=1, lora__alpha=2.0, **common),
        folder_of(tmp_path / "small"),
    )
    given = truncate(large.trainer.tensors(), 1)
    one, _ = large.trainer.train(Instruction(round=0, client=0, lora_rank=1), given, ClientState())
    other, _ = small.trainer.train(Instruction(round=0, client=0), given, ClientState())
    assert one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        assert value.shape == other.tensors[name].shape
        np.testing.assert_allclose(value, other.tensors[name], rtol=1e-4, atol=1e-6)


def test_slow_devices_send_less_of_mixed_ranks(bases, rows, tmp_path, settings, finished):
    config = settings(bases["samara"], rows, method="hetlora", clients__per_round=6)
    finished(config, tmp_path / "run")
    sent: dict[str, set[int]] = {"quick": set(), "slow": set()}
    for record in RunFolder(tmp_path / "run").metrics()[1:]:
        for client in record["clients"]:
            assert client["lora_rank"] == {"quick": 2, "slow": 1}[client["device"]]
            sent[client["device"]].add(client["bytes_up"])
    assert max(sent["slow"]) < min(sent["quick"])


def test_adapters_grow_by_trials_and_cost_what_is_trained(
    bases, rows, tmp_path, settings, finished
):
    config = settings(
        bases["samara"],
        rows,
        method="fedadapter",
        lora__rank=4,
        depth_search={"depth": 1, "trial_rounds": 1},
        clients__per_round=6,
        server__rounds=4,
    )
    finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()[1:]
    assert all("best" in record for record in log)
    seen = {
        (c["device"], c["trained_layers"], c["modelled_peak_bytes"])
        for record in log
        for c in record["clients"]
    }
    assert {peak for _, depth, peak in seen if depth == 1} == {2e6}  # 1 MB and 1 MB a layer
    assert max(depth for _, depth, _ in seen) > 1
    # 2 batches of 0.1 s, half of 0.2 s for each of 4 layers forward, the other half if trained.
    quick = [c for c in log[0]["clients"] if c["device"] == "quick" and c["trained_layers"] == 1]
    assert all(2 * 0.6 < c["modelled_seconds"] < 2 * 0.6 + 0.05 for c in quick)
