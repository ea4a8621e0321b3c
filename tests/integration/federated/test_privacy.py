"""Federations that promise privacy: what they do, what they write, and when they stop."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from opacus.accountants import RDPAccountant
from safetensors.torch import load_file

from samara.config import dump_yaml
from samara.errors import CheckpointError
from samara.federated.accounting import ORDERS
from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.federated.server_state import Scores
from samara.report.federation_inputs import read_federations
from samara.runs import RunFolder

CLIENT = {"epsilon": 50.0, "delta": 0.01, "clip": 0.5, "noise_multiplier": 1.0}
RECORDS = {"epsilon": 50.0, "delta": 0.01, "clip": 0.5, "noise_multiplier": 1.0}
SECURE = {"clip": 100.0, "min_clients": 3, "threshold": 0.6, "max_examples": 100}


@pytest.fixture
def private(bases, rows, settings):
    """Settings of a run with a promise; ``a__b`` changes a.b."""

    def make(privacy, **changes):
        together = {
            "method": "static_stld",
            "server": {"rounds": 2, "max_change": None},
            "local__clip_grad_norm": None,
            "clients__per_round": 5,
            "privacy": {"randomness": "reproducible", **privacy},
            **changes,
        }
        return settings(bases["samara"], rows, **together)

    return make


def _global(path, round=2):
    return load_file(path / f"checkpoints/round-{round:08d}/global.safetensors")


def _driver(config, run):
    job = Job(config, run)
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    return job, driver


# --- clients --------------------------------------------------------------------------------------


def test_epsilon_is_logged_each_round_and_the_run_stops_before_its_budget(
    private, tmp_path, finished, capsys
):
    promise = {**CLIENT, "epsilon": 4.5}
    config = private({"client": promise}, server={"rounds": 9, "max_change": None})
    result = finished(config, tmp_path / "run")
    log = RunFolder(tmp_path / "run").metrics()[1:]
    accountant, expected = RDPAccountant(), []
    while True:
        accountant.step(noise_multiplier=1.0, sample_rate=5 / 6)
        epsilon = accountant.get_epsilon(0.01, alphas=list(ORDERS))
        if epsilon > 4.5:
            break
        expected.append(epsilon)
    assert 1 < len(expected) < 9
    found = [record["privacy"]["client"]["epsilon"] for record in log]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert result["rounds"] == len(expected)
    assert result["privacy"]["client"]["epsilon"] == found[-1]
    said = capsys.readouterr().err
    assert f"stopped after round {len(expected)}: the next one would pass" in said


def test_a_run_does_not_go_on_with_another_promise(private, tmp_path, folder_of):
    changes = {"server": {"rounds": 1, "max_change": None}}
    federate(private({}, **changes), folder_of(tmp_path / "run"))
    with pytest.raises(
        CheckpointError, match=r"belongs to a run of something else \(privacy: null"
    ):
        federate(private({"client": CLIENT}, **changes), folder_of(tmp_path / "run"))


def test_nothing_that_is_released_tells_of_a_single_client(private, tmp_path, finished):
    config = private({"client": CLIENT}, clients__per_round=4)
    result = finished(config, tmp_path / "run")
    allowed = {
        "step", "validation_loss", "validation_accuracy", "rolled_back", "best_arms", "warnings",
        "privacy", "modelled_seconds", "modelled_client_seconds", "modelled_joules", "bytes_down",
        "bytes_up",
    }  # fmt: skip
    log = RunFolder(tmp_path / "run").metrics()
    assert all(set(record) <= allowed for record in log)
    steps = np.diff([record["modelled_client_seconds"] for record in log])
    np.testing.assert_allclose(steps, steps[0])  # whoever was drawn
    lineage = json.loads((tmp_path / "run/lineage.json").read_text())
    assert lineage["spent"]["tokens"] == 2 * 4 * 2 * 4 * 16  # as expected, not as drawn
    assert result["clients"] == {"number": 6}
    assert "measured" not in result
    audit = json.loads((tmp_path / "run/sharing.json").read_text())
    assert audit["clients"] == {} == audit["importance"]
    full = RunFolder(tmp_path / "run/unprotected").metrics()
    assert any(record["clients"] for record in full[1:])
    apart = json.loads((tmp_path / "run/unprotected/results.json").read_text())
    assert len(apart["clients"]["each"]) == 6
    (shown,) = read_federations({"private": str(tmp_path / "run")})
    assert (shown.results.clients.each, shown.results.measured) == ((), None)
    assert (shown.metric, len(shown.rounds), shown.asked) == ("accuracy", 3, ())


def test_a_reply_says_nothing_beside_its_values(private, tmp_path, folder_of):
    job, driver = _driver(private({"client": CLIENT}), folder_of(tmp_path / "run"))
    plan = job.server.plan()
    replies = driver.ask(plan.instructions)
    assert replies
    said = [{**reply.plain(), "client": 0, "active_layers": ()} for reply in replies]
    assert all(entry == said[0] for entry in said)
    assert said[0]["sharing"]["importance"] == ()
    assert (said[0]["loss_before"], said[0]["num_examples"]) == (0.0, 1)


@pytest.mark.parametrize(
    "privacy", [{"client": CLIENT, "records": RECORDS}, {"secure_sum": SECURE}], ids=str
)
def test_a_run_that_was_stopped_goes_on_to_the_same_result_with_secret_noise(
    private, tmp_path, folder_of, outcome, stop_after_a_round, privacy
):
    config = private({**privacy, "randomness": "secret"})
    one, other = tmp_path / "one", tmp_path / "other"
    federate(config, folder_of(one))
    if "client" in privacy:
        folder_of(other)
        shutil.copytree(one / "privacy", other / "privacy")  # the same keys
        for charges in (other / "privacy").glob("*.json"):
            charges.unlink()
    stop_after_a_round(config, folder_of(other))
    federate(config, folder_of(other))
    assert outcome(one) == outcome(other)


def test_secret_noise_differs_from_run_to_run(private, tmp_path, folder_of):
    config = private({"client": CLIENT, "randomness": "secret"}, server__rounds=1)
    found = []
    for name in "ab":
        federate(config, folder_of(tmp_path / name))
        found.append(_global(tmp_path / name, 1))
    assert not any(bool((found[0][name] == found[1][name]).all()) for name in found[0])


def test_the_configurator_learns_from_the_servers_rows_alone(private, tmp_path, finished):
    config = private(
        {"client": CLIENT},
        method="droppeft",
        configurator={"rates": [0.25, 0.5], "shapes": ["incremental"], "rewards": "server"},
        sharing={"direction": "depth"},
        server={"rounds": 4, "max_change": None},
    )
    finished(config, tmp_path / "run")
    for record in RunFolder(tmp_path / "run/unprotected").metrics()[1:]:
        for device in ("quick", "slow"):
            assert len({c["rate"] for c in record["clients"] if c["device"] == device}) <= 1
    state = json.loads((tmp_path / "run/checkpoints/round-00000004/state.json").read_text())
    classes = state["state"]["server"]["configurator"]["classes"]
    # One observation a round and class, whoever was drawn.
    assert {name: len(own["observations"]) for name, own in classes.items()} == {
        "quick": 4,
        "slow": 4,
    }


# --- rows -----------------------------------------------------------------------------------------


def test_each_clients_epsilon_is_what_opacus_counts_and_a_spent_client_is_out(
    private, tmp_path, folder_of
):
    config = private(
        {"records": {**RECORDS, "epsilon": 1.9}},
        clients__per_round=6,
        server={"rounds": 12, "max_change": None},
    )
    job, driver = _driver(config, folder_of(tmp_path / "run"))
    log = [driver.run_round()["clients"] for _ in range(5)]
    spent = {}
    for client in range(6):
        entries = [next(e for e in clients if e["client"] == client) for clients in log]
        done = [entry for entry in entries if entry["verdict"] == "ok"]
        refused = entries[len(done) :]
        assert {entry["reason"] for entry in refused} <= {"its privacy budget would be passed"}
        rate = min(1.0, 4 / len(job.trainer.data.client(client).train))
        epsilon = done[-1]["epsilon"] if done else 0.0
        assert epsilon == pytest.approx(_counted(rate, 2 * len(done)) if done else 0, rel=1e-9)
        assert epsilon <= 1.9
        assert not refused or _counted(rate, 2 * len(done) + 2) > 1.9
        spent[client] = (epsilon, bool(refused))
    assert {is_out for _, is_out in spent.values()} == {True, False}
    largest = job.server.protection.summary(5)["records"]["epsilon_largest"]
    assert largest == max(epsilon for epsilon, _ in spent.values())


def _counted(rate, steps):
    accountant = RDPAccountant()
    accountant.history = [(1.0, rate, steps)]
    return accountant.get_epsilon(0.01, alphas=list(ORDERS))


def test_training_with_protected_rows_moves_the_weights_and_learns(private, tmp_path, finished):
    little = {**RECORDS, "noise_multiplier": 0.05, "epsilon": 1e9, "clip": 5.0}
    config = private(
        {"records": little}, method="fedlora", local__steps=8, clients__per_round=4,
    )  # fmt: skip
    finished(config, tmp_path / "run")
    before, after = _global(tmp_path / "run", 1), _global(tmp_path / "run", 2)
    assert not any(bool((before[name] == after[name]).all()) for name in before)
    losses = [record["validation_loss"] for record in RunFolder(tmp_path / "run").metrics()]
    assert losses[-1] < losses[0] - 0.02


# --- the secure sum -------------------------------------------------------------------------------


def test_the_secure_sum_is_the_plain_mean_to_the_step_of_the_grid(
    private, tmp_path, finished, settings
):
    """Layers left out by dropout, or kept by their client, included: each has its own mean."""
    changes = {
        "method": "droppeft",
        "configurator": {"rates": [0.5], "shapes": ["incremental"], "rewards": "server"},
        "sharing": {"direction": "depth"},
        "server": {"rounds": 1, "max_change": None},
    }
    finished(private({"secure_sum": SECURE}, **changes), tmp_path / "secure")
    finished(private({}, **changes), tmp_path / "plain")
    one, other = _global(tmp_path / "secure", 1), _global(tmp_path / "plain", 1)
    moved = 0
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), atol=3e-6)
        moved += bool((one[name] != 0).any())
    assert moved
    log = RunFolder(tmp_path / "secure").metrics()
    assert all("personal_layers" not in c and "num_examples" not in c for c in log[1]["clients"])
    assert len({c["bytes_up"] // 100 for c in log[1]["clients"]}) == 1  # sizes tell nothing


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": "sparse", "selection": {"density": 0.05, "num_samples": 4}},
        {"method": "fedavg", "payload": "full"},
        {"server__optimizer": {"kind": "fedadagrad", "lr": 0.5, "tau": 1.0}},
    ],
    ids=["sparse", "full", "fedadagrad"],
)
def test_the_secure_sum_is_of_any_payload_and_the_server_may_step_along_it(
    private, tmp_path, finished, changes
):
    server = {"server": {"rounds": 1, "max_change": None}, "clients__per_round": 6}
    changes = {**server, **changes}
    result = finished(private({"secure_sum": SECURE}, **changes), tmp_path / "secure")
    finished(private({}, **changes), tmp_path / "plain")
    one, other = _global(tmp_path / "secure", 1), _global(tmp_path / "plain", 1)
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), atol=3e-6)
    # Nobody says how long it trained: there is nothing to compare the server's time with.
    assert result["measured"]["strategy_share_of_cpu_seconds"] is None


@pytest.mark.parametrize("payload", ["sparse", "full"])
def test_the_noise_of_clients_reaches_every_value_of_any_payload(
    private, tmp_path, folder_of, payload
):
    config = private(
        {"client": CLIENT},
        method="fedavg",
        payload=payload,
        selection={"density": 0.05, "num_samples": 4},
        clients__per_round=2,
    )
    job, driver = _driver(config, folder_of(tmp_path / "run"))
    before = dict(job.server.state.tensors)
    plan = job.server.plan()
    job.server.finish(plan, driver.ask(plan.instructions), lambda _: Scores(loss=0.0))
    after = job.server.state.tensors
    moved = np.concatenate([(after[name] - before[name]).ravel() for name in before])
    assert (moved != 0).all()
    # Noise of 1.0 times the clip of 0.5, over 2 clients; a change of norm 0.5 hides in it.
    assert moved.std() == pytest.approx(0.25, rel=0.2)


def test_a_client_that_is_asked_twice_in_a_round_answers_once(private, tmp_path, folder_of):
    _, driver = _driver(private({"secure_sum": SECURE}), folder_of(tmp_path / "run"))
    ask, again = driver.ask, []

    def twice(instructions):
        replies = ask(instructions)
        again.extend(ask(instructions))
        return replies

    driver.ask = twice
    record = driver.run_round()
    assert {entry["verdict"] for entry in record["clients"]} == {"ok"}
    assert {reply.verdict for reply in again} == {"error"}
    assert {reply.message for reply in again} == {"has sent its vector of this round already"}
    assert not any(reply.tensors for reply in again)


def test_the_population_is_known_from_the_sum_and_nobodys_choice_is(private, tmp_path, folder_of):
    config = private(
        {"secure_sum": SECURE},
        method="droppeft",
        configurator={"rates": [0.5], "shapes": ["incremental"], "rewards": "server"},
        sharing={"direction": "share_common", "patience": 1, "hysteresis": 0.0},
    )
    job, driver = _driver(config, folder_of(tmp_path / "run"))
    driver.run_round()
    population = job.server.protection.population
    assert sum(population) == pytest.approx(1.0, abs=1e-4)
    kept = [job.store.load_client(client).sharing for client in range(6)]
    taken = np.array([own.importance for own in kept if own.importance])
    np.testing.assert_allclose(population, taken.mean(axis=0), atol=1e-6)
    assert job.server.plan().instructions[0].population == population
    assert job.server.state.audit.to_dict()["clients"] == {}


def test_with_client_privacy_the_masks_change_nothing_at_all(private, tmp_path, finished):
    """The same noise on the same sum, which here only the clients could take apart."""
    finished(private({"client": CLIENT}), tmp_path / "open")
    finished(private({"client": CLIENT, "secure_sum": {}}), tmp_path / "masked")
    one, other = _global(tmp_path / "open"), _global(tmp_path / "masked")
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_lost_and_late_clients_are_not_in_the_sum_and_too_many_close_it(
    private, tmp_path, folder_of, device_fields
):
    path = tmp_path / "lossy.yaml"
    device = {"name": "lossy", "slowness": 1.0, "failure_probability": 0.3, **device_fields}
    path.write_text(dump_yaml(device))
    late = tmp_path / "late.yaml"
    late.write_text(dump_yaml({"name": "late", "slowness": 1e4, **device_fields}))
    config = private(
        {"secure_sum": SECURE},
        clients__per_round=6,
        clients__devices=[
            {"profile": str(path), "share": 5},
            {"profile": str(late), "share": 1},
        ],
        server={
            "rounds": 8,
            "max_change": None,
            "deadline_seconds": 60.0,
            "rollback_rise": None,
        },
    )
    job, driver = _driver(config, folder_of(tmp_path / "run"))
    verdicts, opened = set(), []
    for _ in range(8):
        before = dict(job.server.state.tensors)
        record = driver.run_round()
        found = [own["verdict"] for own in record["clients"]]
        verdicts |= set(found)
        after = job.server.state.tensors
        changed = any(not np.array_equal(after[name], before[name]) for name in before)
        opened.append(bool(changed))
        assert changed == (found.count("ok") >= 4)
        if not changed:
            assert {o["verdict"] for o in record["clients"]} <= {"refused", "error", "timeout"}
    assert verdicts == {"ok", "error", "timeout", "refused"}
    assert True in opened
    assert False in opened
