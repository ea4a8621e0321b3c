"""Flower's simulation carries the same messages to the same result."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from samara.federated.federate import federate
from samara.federated.job import Job
from samara.runs import RunFolder


def test_flower_carries_the_messages_to_the_same_result_bit_for_bit(
    bases, rows, tmp_path, stop_after_a_round, settings, folder_of, outcome
):
    """It also goes on with what another engine began, the clients' own layers included."""
    pytest.importorskip("flwr")
    config = settings(bases["samara"], rows, clients__number=4, server__rounds=3)
    federate(config, folder_of(tmp_path / "one"))
    stop_after_a_round(config, folder_of(tmp_path / "other"))
    federate(config.model_copy(update={"engine": "flower"}), folder_of(tmp_path / "other"))
    one, other = outcome(tmp_path / "one"), outcome(tmp_path / "other")
    engines = [found["results"].pop("engine") for found in (one, other)]
    assert engines == ["in_process", "flower"]
    assert one == other


def test_clients_of_flower_that_break_down_are_logged_and_the_rounds_complete(
    bases, rows, tmp_path, settings, folder_of
):
    pytest.importorskip("flwr")
    from samara.federated.flower import FlowerDriver

    data = Path(shutil.copytree(rows, tmp_path / "rows"))
    config = settings(bases["samara"], data, engine="flower", clients__number=2, server__rounds=1)
    job = Job(config, folder_of(tmp_path / "run"))
    driver = FlowerDriver(job.server, job.trainer, job.store, job.run)
    driver.resume()
    (data / "train.jsonl").unlink()
    driver.run()
    record = RunFolder(tmp_path / "run").metrics()[-1]
    assert [c["verdict"] for c in record["clients"]] == ["error"] * 2
    assert all("train.jsonl" in c["reason"] for c in record["clients"])
    assert set(record["senders"].values()) == {0}
