"""A federation through the functions of server and nodes, message by message, without a wire.

What travels is what Flower would carry; only its ``Message``, which exists in a run of its own
alone, is a plain object here. The servers themselves run in ``test_superlink.py``.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from samara.federated import node as node_app
from samara.federated.deploy import Address, write_deployment
from samara.federated.federate import federate
from samara.federated.flower import SECURE, secure_message
from samara.federated.job import Job
from samara.federated.superlink import Session, SuperLinkDriver, serving

HANDLERS = {
    "train": node_app.train_message,
    "evaluate": node_app.evaluate_message,
    f"query.{SECURE}": secure_message,
}
PROMISE = {"epsilon": 100.0, "delta": 0.01, "clip": 0.5, "noise_multiplier": 1.0}
WHOLE = {
    "method": "static_stld",
    "local__clip_grad_norm": None,
    "server__max_change": None,
    "privacy__randomness": "reproducible",
    "privacy__records": PROMISE,
}
EVERYTHING = {**WHOLE, "privacy__client": PROMISE, "privacy__secure_sum": {}}


class _Message(SimpleNamespace):
    """Flower's, with what the functions use of it."""

    def __init__(self, *, content, reply_to=None):
        super().__init__(content=content, has_error=lambda: False)


class _Nodes(SuperLinkDriver):
    """Hands each message to its node's function."""

    contexts: dict[int, SimpleNamespace]

    def _wait_for_nodes(self):
        """They are there."""

    def carry(self, contents, kind):
        answers = {}
        for client, content in contents.items():
            handler = HANDLERS[kind]
            answers[client] = handler(_Message(content=content), self.contexts[client])
        return answers


@pytest.fixture
def deployed(bases, rows, tmp_path, monkeypatch, folder_of):
    """Runs a recipe on nodes; returns the run folder."""
    pytest.importorskip("flwr")
    monkeypatch.setattr("flwr.app.Message", _Message)

    def run(config):
        folder = tmp_path / "it"
        address = Address(host="127.0.0.1", port=8000)
        config = write_deployment("small", config, folder, address=address)
        job = Job(config, folder_of(folder / "run"))
        driver = _Nodes(job.server, job.trainer, job.store, job.run)
        driver.contexts = {
            client: SimpleNamespace(
                state={},
                node_config={
                    "partition-id": client,
                    "data": str(folder / f"rows/client-{client:08d}.jsonl"),
                    "model": str(bases["samara"]),
                    "state": str(tmp_path / f"node-{client}"),
                },
            )
            for client in range(config.clients.number)
        }
        with serving(Session(grid=None, wait_seconds=1, reply_seconds=1)):
            driver.resume()
            driver.run()
            job.finish(driver.score_clients())
        return folder / "run"

    return run


def _but_for_the_engine(found):
    del found["results"]["engine"], found["results"]["parents"]
    return {name: own for name, own in found.items() if not name.startswith("clients/")}


@pytest.mark.parametrize(
    "changes",
    [
        {"sharing__head": "personal", "sharing__direction": "none"},
        {"method": "hetlora", "lora__rank": 4},
        {
            "method": "fedadapter",
            "lora__rank": 4,
            "depth_search": {"depth": 1, "trial_rounds": 1},
            "server__rounds": 3,
        },
        WHOLE,
        EVERYTHING,
    ],
    ids=["own layers", "ranks", "trials", "rows protected", "masked sums of protected clients"],
)
def test_nodes_come_to_the_same_result(
    bases, rows, tmp_path, settings, folder_of, outcome, deployed, changes
):
    if "privacy__records" in changes:
        pytest.importorskip("opacus")
    changes = {"clients__number": 3, "server__rounds": 1, **changes}
    config = settings(bases["samara"], rows, **changes)
    federate(config, folder_of(tmp_path / "one"))
    run = deployed(config)
    one, other = (_but_for_the_engine(outcome(path)) for path in (tmp_path / "one", run))
    assert one == other
    assert not (run / "clients").exists()
    if config.privacy.is_on:  # no node says how it scores, not even to the server
        assert json.loads((run / "unprotected/results.json").read_text())["clients"]["each"] == []
        assert not list((run / "privacy").glob("client-*"))  # keys and charges are the nodes'
