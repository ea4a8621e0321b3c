"""Places on a chart."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samara.report.scales import (
    Axis,
    Place,
    axis_around,
    smoothed,
    some,
    spread,
    thinned,
    tick_places,
)


def test_ticks_are_round():
    assert Axis(0, 999_424).ticks(5) == [0, 200_000, 400_000, 600_000, 800_000]
    assert Axis(-0.03, 0.031).ticks(4) == [-0.02, 0, 0.02]
    assert Axis(4.1, 5.3).ticks(6) == [4.2, 4.4, 4.6, 4.8, 5.0, 5.2]


@pytest.mark.parametrize(
    ("ticks", "places"), [([0.0, 0.025], 3), ([4.2, 4.4], 1), ([0, 50], 0), ([1.0], 2)]
)
def test_tick_places(ticks, places):
    assert tick_places(ticks) == places


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_lie_inside_and_are_not_many(low, span, about):
    axis = Axis(low, low + span)
    ticks = axis.ticks(about)
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in ticks)
    assert len(ticks) <= 2 * about + 1


def test_an_axis_has_room_even_around_one_value():
    axis = axis_around([3.0, 3.0])
    assert axis.low < 3.0 < axis.high
    assert axis_around([0.0]).low < 0


def test_smoothing_keeps_a_constant_and_does_not_lag():
    flat = [Place(x, 2.5) for x in range(50)]
    assert all(p.y == pytest.approx(2.5) for p in smoothed(flat, width=3))
    slope = [Place(x, 2.0 * x) for x in range(101)]
    assert smoothed(slope, width=4)[50].y == pytest.approx(100.0)


def test_smoothing_of_sparse_points_changes_nothing():
    sparse = [Place(0, 1.0), Place(100, 5.0), Place(200, 2.0)]
    assert smoothed(sparse, width=1) == sparse


def test_thinning_keeps_the_end_and_the_mean():
    curve = [Place(x, x % 2) for x in range(1001)]
    thin = thinned(curve, most=100)
    assert len(thin) <= 100
    assert thin[-1] == curve[-1]
    assert thin[3].y == pytest.approx(0.5, abs=0.1)
    assert thinned(curve[:5], most=100) == curve[:5]


def test_some_keeps_the_last():
    assert some(list(range(10)), most=3) == [1, 5, 9]
    assert some([1, 2], most=3) == [1, 2]
    assert some([], most=3) == []


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_are_moved_apart_in_order(positions):
    placed = spread(positions, gap=17, low=4, high=296)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    for before, after in itertools.pairwise(order):
        assert placed[after] - placed[before] >= 17 - 1e-6
    assert all(value >= 4 - 1e-6 for value in placed)
    assert all(value <= 296 + 1e-6 for value in placed)


def test_labels_with_room_stay():
    assert spread([100.0, 20.0], gap=17, low=4, high=300) == [100.0, 20.0]
