"""The rates of layer dropout: the mean is the one asked for, the budget a whole number."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.config import validate
from samara.errors import ConfigError
from samara.train.layer_rates import LayerDropoutConfig, LayerRates

SHAPES = ("uniform", "incremental", "decay", "normal")


def rates(num_layers: int, **fields: Any) -> LayerRates:
    return LayerDropoutConfig(**fields).rates(num_layers)


@settings(max_examples=40)
@given(
    num_layers=st.integers(1, 48),
    share=st.floats(0, 1),
    shape=st.sampled_from(SHAPES),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    cap=st.floats(0.05, 0.99),
)
def test_the_mean_is_exact_and_no_rate_leaves_its_bounds(num_layers, share, shape, ends, cap):
    first, last = ends
    free = num_layers - first - last
    if free <= 0:
        return
    found = rates(
        num_layers,
        rate=share * cap * free / num_layers,
        shape=shape,
        gate="bernoulli",
        protect_first=first,
        protect_last=last,
        max_rate=cap,
    )

    assert math.fsum(found.drop) / num_layers == pytest.approx(share * cap * free / num_layers)
    assert all(0 <= rate <= cap for rate in found.drop)
    assert not any(found.drop[:first] + found.drop[num_layers - last :])
    assert found.keep == tuple(1 - rate for rate in found.drop)


@settings(max_examples=40)
@given(
    num_layers=st.integers(2, 48),
    share=st.floats(0, 0.95),
    shape=st.sampled_from(SHAPES),
    protected=st.integers(0, 1),
)
def test_the_probabilities_of_a_budgeted_gate_add_up_to_its_budget(
    num_layers, share, shape, protected
):
    rate = share * (num_layers - protected) / num_layers
    if 0 < rate * num_layers < 0.5:
        with pytest.raises(ConfigError, match="rounds to no layer"):
            rates(num_layers, rate=rate, shape=shape, protect_first=protected)
        return
    found = rates(num_layers, rate=rate, shape=shape, protect_first=protected)

    assert found.budget is not None
    assert math.fsum(found.keep) == pytest.approx(found.budget, abs=1e-7)
    assert abs(found.budget - num_layers * (1 - rate)) <= 0.5 + 1e-6 or found.budget == 1
    assert all(0 <= keep <= 1 for keep in found.keep)
    assert all(found.keep[layer] == 1 for layer in range(protected))
    assert found.mean_active == pytest.approx(found.budget, abs=1e-7)


@pytest.mark.parametrize(
    ("rate", "first", "last"), [(0.5, 0.0417, 0.95), (0.3, 0.025, 0.575), (0.0, 0.0, 0.0)]
)
def test_the_incremental_shape_grows_from_the_bottom(rate, first, last):
    found = rates(12, rate=rate)

    assert found.drop[0] == pytest.approx(first, abs=1e-3)
    assert found.drop[-1] == pytest.approx(last)
    assert list(found.drop) == sorted(found.drop)


def test_the_shapes():
    uniform, falling, middle = (
        rates(12, rate=0.25, shape=shape).drop for shape in ("uniform", "decay", "normal")
    )

    assert uniform == pytest.approx([0.25] * 12)
    assert falling == pytest.approx(rates(12, rate=0.25).drop[::-1])
    assert middle == pytest.approx(middle[::-1])
    assert middle[5] == max(middle)
    assert middle[0] < 0.1 * middle[5]


def test_a_whole_number_of_active_layers_leaves_the_rates_as_they_are():
    found = rates(12, rate=0.5)

    assert found.budget == 6
    assert found.keep == pytest.approx([1 - rate for rate in found.drop])


def test_half_a_layer_runs():
    assert [rates(n, rate=0.5, shape="uniform").budget for n in (5, 7, 9, 11)] == [3, 4, 5, 6]


def test_protected_layers_run_also_where_the_budget_is_rounded_down():
    found = rates(5, rate=0.28, protect_first=2, shape="uniform")  # 3.6 run: the budget is 4
    lower = rates(5, rate=0.32, protect_first=2, shape="uniform")  # 3.4 run: it is 3

    assert (found.budget, lower.budget) == (4, 3)
    assert lower.always == {0, 1}
    assert lower.keep[2:] == pytest.approx([1 / 3] * 3)


def test_scaling_keeps_more_of_each_layer():
    assert max(rates(12, rate=0.5).drop) == pytest.approx(0.95)
    assert max(rates(12, rate=0.5, scale="inverse_keep").drop) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rate": 0.9, "protect_first": 2},
            r"layer_dropout.rate: 0.9 is more than the 0.633 that 4 of 6 layers give at 0.95 each; "
            "lower it, protect fewer layers, or raise layer_dropout.max_rate",
        ),
        (
            {"rate": 0.05},
            r"layer_dropout.rate: 0.05 of 6 layers rounds to no layer; use 0.17 or more, or gate: "
            "bernoulli",
        ),
        (
            {"rate": 0.5, "protect_first": 4, "protect_last": 2},
            "layer_dropout.protect_first: 4 and protect_last 2 leave none of 6 layers to drop; "
            "protect fewer",
        ),
    ],
)
def test_what_cannot_be_is_said(fields, message):
    with pytest.raises(ConfigError, match=message):
        rates(6, **fields)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_is_a_share(rate):
    with pytest.raises(ConfigError, match=r"layer_dropout.rate: "):
        validate(LayerDropoutConfig, {"rate": rate}, path="layer_dropout")
