"""A thousand clients in one process: what each keeps is on disk, and the server costs little."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

from samara.federated.driver import InProcessDriver
from samara.federated.job import Job
from samara.federated.overhead import CpuWatch


@pytest.fixture
def many_rows(rows, tmp_path):
    """4,000 rows, all different."""
    lines = (rows / "train.jsonl").read_text().splitlines()
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(4000):
            row = {**json.loads(lines[number % len(lines)]), "id": str(number)}
            file.write(json.dumps(row) + "\n")
    return tmp_path / "many.jsonl"


def test_a_thousand_clients_keep_nothing_in_memory(
    bases, rows, many_rows, tmp_path, monkeypatch, settings, folder_of
):
    config = settings(
        bases["samara"],
        rows,
        data={"train": str(many_rows), "sequence_length": 16, "validation_fraction": 0.01},
        sharing__direction="none",
        clients__number=1000,
        clients__per_round=4,
        clients__partition={"kind": "iid"},
        local__steps=1,
        server__rounds=3,
    )
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    save, kept = job.store.save_client, []

    def watched(client, state, *, round):
        kept.append(weakref.ref(state))
        assert state.personal
        save(client, state, round=round)

    monkeypatch.setattr(job.store, "save_client", watched)
    driver.run()
    gc.collect()
    assert len(kept) >= 9
    assert not [state for ref in kept if (state := ref()) is not None]
    assert len(list((tmp_path / "run/clients").iterdir())) == len(
        {c for c in range(1000) if job.store.newest_round(c) is not None}
    )
    assert len(json.dumps(job.server.plain_state())) < 100_000


def test_old_states_of_clients_go_with_the_checkpoints_that_name_them(
    bases, rows, tmp_path, settings, folder_of
):
    config = settings(bases["samara"], rows, server__rounds=6, clients__number=4)
    job = Job(config, folder_of(tmp_path / "run"))
    driver = InProcessDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    while not driver.is_done:
        driver.run_round()
        named = set()
        for path in (tmp_path / "run/checkpoints").iterdir():
            clients = json.loads((path / "state.json").read_text())["state"]["clients"]
            named |= {(int(client), round) for client, round in clients.items()}
        folders = (tmp_path / "run/clients").glob("*/*")
        assert {(int(f.parent.name[-8:]), int(f.name[-8:])) for f in folders} == named


def test_results_say_what_the_server_cost(bases, rows, tmp_path, settings, finished):
    result = finished(settings(bases["samara"], rows), tmp_path / "run")
    measured = result["measured"]
    assert 0 < measured["strategy_cpu_seconds"] < 10
    assert measured["strategy_share_of_cpu_seconds"] == pytest.approx(
        measured["strategy_cpu_seconds"] / measured["cpu_seconds"]
    )
    again = finished(settings(bases["samara"], rows, server__rounds=3), tmp_path / "run")
    assert again["measured"]["strategy_cpu_seconds"] > measured["strategy_cpu_seconds"]


def test_a_watch_counts_what_runs_and_not_what_is_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("samara.federated.overhead.time.process_time", lambda: now[0])
    watch = CpuWatch()
    with watch.paused():
        now[0] += 100
    with watch.running():
        now[0] += 1
        with watch.paused():
            now[0] += 10
        now[0] += 2
        assert watch.read() == 3
    now[0] += 100
    assert watch.seconds == 3
