"""Noise, protected rows and the secure sum by Flower's messages, to the same result."""

from __future__ import annotations

import pytest

from samara.federated.federate import federate


def test_flower_carries_a_protected_federation_to_the_same_result_bit_for_bit(
    bases, rows, tmp_path, settings, folder_of, outcome
):
    pytest.importorskip("flwr")
    promise = {"epsilon": 100.0, "delta": 0.01, "clip": 0.5, "noise_multiplier": 1.0}
    config = settings(
        bases["samara"],
        rows,
        method="static_stld",
        local__clip_grad_norm=None,
        clients__number=4,
        clients__per_round=4,
        server={"rounds": 2, "max_change": None},
        privacy={
            "client": promise,
            "records": promise,
            "secure_sum": {},
            "randomness": "reproducible",
        },
    )
    federate(config, folder_of(tmp_path / "one"))
    other = config.model_copy(update={"engine": "flower"})
    federate(other, folder_of(tmp_path / "other"))
    one, other = outcome(tmp_path / "one"), outcome(tmp_path / "other")
    engines = [found["results"].pop("engine") for found in (one, other)]
    assert engines == ["in_process", "flower"]
    assert one == other
