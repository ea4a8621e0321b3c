"""Which layers run in a pass: frequencies, budget, and where the randomness comes from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.train.layer_dropout import Gates, draw_gates
from samara.train.layer_rates import LayerDropoutConfig, LayerRates

DRAWS = 6000


def draw(
    rates: LayerRates, *, seed: int = 0, node: int = 0, round: int = 0, batches: Iterable[int]
) -> list[Gates]:
    return [draw_gates(rates, seed=seed, node=node, round=round, batch=batch) for batch in batches]


@pytest.mark.parametrize("shape", ["uniform", "incremental", "decay", "normal"])
@pytest.mark.parametrize(
    ("gate", "rate", "protected"),
    [("budgeted", 0.5, 0), ("budgeted", 0.4, 2), ("bernoulli", 0.4, 1)],
)
def test_every_layer_runs_as_often_as_it_should(shape, gate, rate, protected):
    config = LayerDropoutConfig(rate=rate, shape=shape, gate=gate, protect_first=protected)
    rates = config.rates(7)
    gates = np.array(draw(rates, batches=range(DRAWS)))

    keep = np.array(rates.keep)
    error = np.sqrt(keep * (1 - keep) / DRAWS)
    assert (np.abs(gates.mean(axis=0) - keep) <= 4 * error + 1e-12).all()
    if gate == "budgeted":
        assert (gates.sum(axis=1) == rates.budget).all()
    else:
        assert len(set(gates.sum(axis=1))) > 3


@settings(max_examples=30)
@given(
    num_layers=st.integers(1, 40),
    rate=st.floats(0, 0.9),
    gate=st.sampled_from(["budgeted", "bernoulli"]),
    numbers=st.tuples(*[st.integers(0, 2**63)] * 4),
)
def test_the_budget_is_kept_and_a_layer_runs_whatever_the_numbers(num_layers, rate, gate, numbers):
    rate = 0.0 if rate * num_layers < 0.51 else rate
    rates = LayerDropoutConfig(rate=rate, gate=gate).rates(num_layers)
    seed, node, round_, batch = numbers
    (gates,) = draw(rates, seed=seed, node=node, round=round_, batches=[batch])

    assert len(gates) == num_layers
    assert sum(gates) == rates.budget or (rates.budget is None and any(gates))
    assert all(gates[layer] for layer in rates.always)


def test_all_pairs_of_layers_run_together():
    gates = np.array(
        draw(LayerDropoutConfig(rate=0.5, shape="uniform").rates(6), batches=range(500))
    )
    together = gates.T.astype(int) @ gates.astype(int)

    assert (together > 0).all()


def test_gates_depend_on_each_number_and_on_nothing_else():
    rates = LayerDropoutConfig(rate=0.5).rates(24)
    first = draw(rates, batches=range(50))

    assert draw(rates, batches=reversed(range(50))) == first[::-1]
    assert len(set(first)) > 25
    for other in ({"seed": 1}, {"node": 1}, {"round": 1}):
        assert draw(rates, batches=range(50), **other) != first


def test_independent_gates_leave_at_least_one_layer():
    rates = LayerDropoutConfig(rate=0.9, gate="bernoulli", shape="uniform").rates(2)
    active = {sum(gates) for gates in draw(rates, batches=range(300))}

    assert active == {1, 2}


def test_the_stream_of_gates_stays_what_it_is():
    """A run of an earlier version goes on with the gates it would have had."""
    rates = LayerDropoutConfig(rate=0.5).rates(8)
    drawn = [
        "".join("01"[runs] for runs in gates) for gates in draw(rates, seed=7, batches=range(4))
    ]

    assert drawn == ["10110010", "11100100", "11100100", "11110000"]
