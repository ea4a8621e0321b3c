"""Flower's simulation carries parts, masks and moments to the same result as one process."""

from __future__ import annotations

import pytest

from samara.federated.federate import federate


@pytest.fixture
def same(bases, rows, tmp_path, settings, folder_of, outcome):
    pytest.importorskip("flwr")

    def check(**changes):
        config = settings(bases["samara"], rows, clients__number=4, **changes)
        found = []
        for engine in ("in_process", "flower"):
            own = config.model_copy(update={"engine": engine})
            federate(own, folder_of(tmp_path / engine))
            found.append(outcome(tmp_path / engine))
            assert found[-1]["results"].pop("engine") == engine
        assert found[0] == found[1]

    return check


def test_hetlora(same):
    same(method="hetlora")


def test_fedadapter(same):
    same(method="fedadapter", lora__rank=4, depth_search={"depth": 1, "trial_rounds": 1})


def test_sparse(same):
    same(payload="sparse", selection={"density": 0.05, "num_samples": 4}, local__proximal=0.1)


def test_full(same):
    same(
        method="static_stld",
        payload="full",
        server={"rounds": 2, "optimizer": {"kind": "fedadam"}},
    )
