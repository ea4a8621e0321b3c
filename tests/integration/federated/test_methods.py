"""Server optimizers, payloads and baselines: each trains, stops and goes on like the others."""

from __future__ import annotations

import pytest

from samara.federated.driver import InProcessDriver
from samara.federated.federate import federate
from samara.federated.job import Job
from samara.runs import RunFolder

KINDS = {
    "fedadam": {"method": "fedlora", "server__optimizer": {"kind": "fedadam"}},
    "fedyogi": {"server__optimizer": {"kind": "fedyogi", "lr": 0.02}, "local__proximal": 0.1},
    "fedadagrad": {"method": "static_stld", "server__optimizer": {"kind": "fedadagrad"}},
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_each_trains_and_however_often_it_is_killed_comes_to_the_same(
    bases, rows, tmp_path, monkeypatch, kind, settings, folder_of, outcome
):
    config = settings(bases["samara"], rows, server__rounds=3, local__steps=4, **KINDS[kind])
    federate(config, folder_of(tmp_path / "whole"))
    losses = [record["validation_loss"] for record in RunFolder(tmp_path / "whole").metrics()]
    assert min(losses) < losses[0]
    run_round = InProcessDriver.run_round

    def killed(driver):
        record = run_round(driver)
        if driver.server.state.round in (1, 2):
            raise Killed
        return record

    with monkeypatch.context() as patch:
        patch.setattr(InProcessDriver, "run_round", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                federate(config, folder_of(tmp_path / "cut"))
    federate(config, folder_of(tmp_path / "cut"))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
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
    for mu in (0.0, 1.0, 100.0):
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
    assert moved[0] > moved[1] > moved[2]
