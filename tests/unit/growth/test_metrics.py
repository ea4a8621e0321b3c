"""Ranking metrics, rank correlations, and where a ranking has settled."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.growth.metrics import (
    Curve,
    Foretelling,
    agreement,
    best_metric,
    foretelling,
    kendall_tau_b,
    score,
    settled_at,
    spearman,
)


def power_law(floor: float, size: float, exponent: float) -> Curve:
    """A curve that the extrapolation knows exactly, and a recovery's start."""
    steps = (50, 100, 200, 400)
    return Curve(loss={0: 9.0} | {k: floor + size * k**-exponent for k in steps})


def test_extrapolation_is_exact_for_a_power_law():
    curve = power_law(2.5, 4.0, 0.4)
    expected = 2.5 + 4.0 * 6400**-0.4
    assert score("extrapolation", curve, step=400, horizon=6400) == pytest.approx(expected)
    assert score("extrapolation", curve, step=200, horizon=6400) == pytest.approx(expected)


def test_extrapolation_at_the_horizon_is_the_loss():
    curve = power_law(2.5, 4.0, 0.4)
    assert score("extrapolation", curve, step=400, horizon=400) == pytest.approx(curve.loss[400])


def test_extrapolation_of_a_rising_curve_stays_where_it_is():
    curve = Curve(loss={50: 3.0, 100: 2.9, 200: 3.1})
    assert score("extrapolation", curve, step=200, horizon=800) == 3.1


def test_what_cannot_be_told_is_none():
    curve = Curve(loss={0: 4.0, 50: 3.0, 100: 2.5}, indicators={"sharpness": {50: 0.5}})
    assert score("extrapolation", curve, step=100, horizon=800) is None
    assert score("loss_drop", curve, step=50, horizon=800) is None
    assert score("loss_drop", curve, step=100, horizon=800) == pytest.approx(-0.5)
    assert score("loss", curve, step=200, horizon=800) is None
    assert score("sharpness", curve, step=50, horizon=800) == 0.5
    assert score("gradient_norm", curve, step=50, horizon=800) is None
    assert score("loss_drop", curve, step=0, horizon=800) is None


VALUES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_correlations_are_those_of_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert kendall_tau_b(x, y) is None
        assert spearman(x, y) is None
        return
    assert kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_correlations_of_nothing_are_none():
    assert kendall_tau_b([], []) is None
    assert spearman([], []) is None


CROSSING = {
    # In the recovery the ranking is stable and wrong; from 100 on it is what it is at the end.
    "a": Curve(loss={0: 5.0, 50: 4.0, 100: 3.0, 200: 2.5, 400: 2.0}),
    "b": Curve(loss={0: 4.0, 50: 3.5, 100: 3.2, 200: 2.8, 400: 2.2}),
    "c": Curve(loss={0: 3.0, 50: 3.1, 100: 3.3, 200: 3.0}),
}


def test_the_settle_point_is_where_the_ranking_becomes_the_last_one():
    assert settled_at(CROSSING) == 100
    first = agreement(CROSSING, 0, 50)
    assert (first.tau_b, first.same_leader, first.num_candidates) == (1.0, True, 3)
    turned = agreement(CROSSING, 50, 100)
    assert turned.tau_b == -1.0
    assert not turned.same_leader
    assert agreement(CROSSING, 200, 400).num_candidates == 2


def test_every_pair_of_rungs_has_to_agree_not_only_with_the_last():
    curves = {
        "a": Curve(loss={0: 1.0, 8: 1.0, 16: 1.0}),
        "b": Curve(loss={0: 2.0, 8: 3.0, 16: 2.0}),
        "c": Curve(loss={0: 3.0, 8: 2.0}),  # the last rung knows nothing of it
    }
    assert settled_at(curves) == 8


def test_a_ranking_that_turns_at_the_last_rung_has_not_settled():
    curves = {"a": Curve(loss={0: 1.0, 8: 2.0}), "b": Curve(loss={0: 2.0, 8: 1.0})}
    assert settled_at(curves) is None
    assert settled_at({"a": Curve(loss={0: 1.0})}) is None
    same = {name: Curve(loss={0: 1.0, 8: 2.0}) for name in "ab"}
    assert settled_at(same) == 0
    assert settled_at({}) is None


def test_auto_takes_what_foretold_later_losses():
    indicators = {"a": 1.0, "b": 2.0, "c": 3.0}
    curves = {
        name: Curve(
            loss=curve.loss | {400: {"a": 2.0, "b": 2.2, "c": 2.9}[name]},
            indicators={"sharpness": dict.fromkeys((0, 50, 100, 200), indicators[name])},
        )
        for name, curve in CROSSING.items()
    }
    found = foretelling(curves, horizon=1000)
    assert found["sharpness"].tau_b > found["loss"].tau_b
    assert (
        found["loss_drop"].tau_b == found["loss_drop"].loss_tau_b == 1.0
    )  # late, when all is easy
    assert "gradient_norm" not in found
    assert best_metric(found) == "sharpness"


def test_auto_prefers_the_loss_among_equals_and_where_nothing_is_known():
    assert best_metric({}) == "loss"
    equal, better = (Foretelling(tau_b=tau, loss_tau_b=0.5, num_pairs=3) for tau in (0.5, 0.75))
    assert best_metric({"loss": equal, "sharpness": equal}) == "loss"
    assert best_metric({"loss": equal, "loss_drop": equal, "extrapolation": better}) == (
        "extrapolation"
    )
    assert foretelling({"a": Curve(loss={0: 1.0, 8: 2.0})}, horizon=9) == {}
