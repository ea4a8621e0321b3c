"""Ranks under a budget: never above it, the best there are, the same every time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.errors import ConfigError
from samara.measure.rank_allocation import Choice, allocate_ranks

SHAPES = [(8, 8), (8, 4), (8, 12), (12, 8)]


def choice(shape: tuple[int, int], spectrum: list[float]) -> Choice:
    return Choice(
        layer=0,
        projection="q_proj",
        in_features=shape[0],
        out_features=shape[1],
        spectrum=np.sort(np.resize(np.array(spectrum), shape[1]))[::-1].copy(),
    )


@st.composite
def choices(draw: st.DrawFn, shapes: list[tuple[int, int]] = SHAPES) -> list[Choice]:
    values = st.lists(st.floats(0.0, 10.0), min_size=3, max_size=12)
    return [
        choice(draw(st.sampled_from(shapes)), draw(values)) for _ in range(draw(st.integers(1, 4)))
    ]


def best_by_trying_all(given: list[Choice], budget: int, multiple: int) -> float:
    options = [own.ranks(multiple) for own in given]
    return max(
        float(np.mean([own.captured([rank])[0] for own, rank in zip(given, ranks, strict=True)]))
        for ranks in itertools.product(*options)
        if sum(own.price * rank for own, rank in zip(given, ranks, strict=True)) <= budget
    )


def least(given: list[Choice], multiple: int) -> int:
    return sum(own.price * multiple for own in given)


@given(given=choices(), extra=st.integers(0, 300), multiple=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_it_is_the_best_of_all_under_the_budget(given, extra, multiple):
    budget = least(given, multiple) + extra
    found = allocate_ranks(given, budget, multiple=multiple)
    assert found.exact
    assert found.parameters == sum(c.price * r for c, r in zip(given, found.ranks, strict=True))
    assert found.parameters <= budget
    assert all(rank >= multiple and rank % multiple == 0 for rank in found.ranks)
    best = best_by_trying_all(given, budget, multiple)
    assert found.captured == pytest.approx(best, abs=1e-9)
    assert found.bound >= best - 1e-9
    assert allocate_ranks(given, budget, multiple=multiple) == found


@given(given=choices([(8, 8)]), extra=st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_water_filling_is_the_best_where_all_steps_cost_the_same(given, extra):
    budget = least(given, 1) + extra
    found = allocate_ranks(given, budget, most_cells=0)
    assert found.captured == pytest.approx(best_by_trying_all(given, budget, 1), abs=1e-9)


@given(given=choices(), extra=st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_water_filling_is_under_the_budget_and_short_of_the_best_by_less_than_a_step(given, extra):
    budget = least(given, 1) + extra
    found = allocate_ranks(given, budget, most_cells=0)
    assert found.parameters <= budget
    best = best_by_trying_all(given, budget, 1)
    step = max(
        (float(np.max(np.diff(own.captured(own.ranks(1))), initial=0.0)) for own in given),
    )
    assert best - step / len(given) - 1e-9 <= found.captured <= best + 1e-9
    assert found.bound >= best - 1e-9


def test_the_linear_with_the_flatter_spectrum_gets_more():
    steep = choice((8, 8), [100.0, 1, 0, 0, 0, 0, 0, 0])
    flat = choice((8, 8), [1.0] * 8)
    found = allocate_ranks([steep, flat], 16 * 5)
    assert found.ranks == (2, 3) or found.ranks == (1, 3)
    assert found.ranks[1] > found.ranks[0]


def test_no_linear_gets_more_than_makes_it_smaller_than_a_dense_one():
    found = allocate_ranks([choice((8, 8), [1.0] * 8)], 10**9)
    assert found.ranks == (3,)  # 3 * 16 < 64 <= 4 * 16


def test_errors_say_what_to_change():
    own = [choice((8, 8), [1.0] * 8)]
    with pytest.raises(ConfigError, match=r"allocate\.budget: 15 parameters do not hold .* raise"):
        allocate_ranks(own, 15)
    with pytest.raises(ConfigError, match=r"allocate\.multiple: 9 exceeds the width 8 of q_proj"):
        allocate_ranks(own, 10**6, multiple=9)
