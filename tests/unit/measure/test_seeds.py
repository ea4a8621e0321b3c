"""Means and differences over runs of several seeds, against numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from samara.measure.compare import Interval
from samara.measure.seeds import (
    agreement,
    mean_over_seeds,
    non_inferiority,
    pooled_difference,
    score_over_seeds,
    score_table,
    spread,
)
from samara.measure.task_metrics import Item, Resampling, class_scores

HOW = Resampling(samples=500, seed=1)


def items(scores, predictions=None):
    said = predictions or ["x"] * len(scores)
    return [
        Item(
            line=line,
            id=None,
            scores={"f1": score},
            sums={},
            gold=("x",),
            prediction=word,
            is_truncated=False,
            details={},
        )
        for line, (score, word) in enumerate(zip(scores, said, strict=True), start=1)
    ]


def test_a_table_has_a_row_for_each_run():
    table = score_table("f1", [items([0.0, 1.0, 0.5]), items([1.0, 1.0, 0.5])])
    assert table.tolist() == [[0.0, 1.0, 0.5], [1.0, 1.0, 0.5]]
    assert mean_over_seeds(table, HOW).value == pytest.approx(4 / 6)
    assert spread(table) == pytest.approx(np.std([0.5, 5 / 6], ddof=1))
    assert spread(table[:1]) == 0.0


def test_a_constant_difference_has_no_width():
    rows = np.random.default_rng(0).random((1, 40))
    found = pooled_difference([rows + 0.125], [rows], HOW)
    assert (found.value, found.low, found.high) == pytest.approx((0.125,) * 3)


def test_tasks_weigh_the_same_whatever_their_size():
    small, large = np.ones((2, 4)), np.zeros((2, 400))
    found = pooled_difference([small, large], [small * 0, large], HOW)
    assert (found.value, found.low, found.high) == pytest.approx((0.5,) * 3)


def test_seeds_that_differ_widen_the_interval():
    rows = np.full((1, 50), 0.5)
    apart = np.concatenate([rows - 0.1, rows, rows + 0.1])
    found = pooled_difference([apart], [rows], HOW)
    assert found.value == pytest.approx(0)
    # all of the width is that of a mean of three draws from three values
    assert found.low == pytest.approx(-0.1, abs=0.04)
    assert found.high == pytest.approx(0.1, abs=0.04)


def test_the_interval_of_a_share_is_the_binomial_one():
    draw = np.random.default_rng(3)
    rows = (draw.random((1, 400)) < 0.3).astype(float)
    found = mean_over_seeds(rows, Resampling(samples=3000))
    half = 1.96 * math.sqrt(rows.mean() * (1 - rows.mean()) / 400)
    assert found.high - found.value == pytest.approx(half, rel=0.12)
    assert found.value - found.low == pytest.approx(half, rel=0.12)


def test_one_row_says_nothing():
    found = mean_over_seeds(np.ones((3, 1)), HOW)
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-0.009, 0.02, "non-inferior"),
        (-0.03, -0.011, "inferior"),
        (-0.02, 0.0, "inconclusive"),
        (-0.01, 0.0, "inconclusive"),
        (-math.inf, math.inf, "inconclusive"),
    ],
)
def test_non_inferior_is_what_the_whole_interval_says(low, high, word):
    assert non_inferiority(Interval(value=0.0, low=low, high=high, confidence=0.95), 0.01) == word


def test_agreement_is_over_all_pairs_of_runs():
    runs = [items([0, 0, 0, 0], list(text)) for text in ("abcd", "abcx", "abyx")]
    assert agreement(runs) == pytest.approx((3 / 4 + 2 / 4 + 3 / 4) / 3)
    assert agreement(runs[:1]) == 1.0


def test_macro_averages_are_means_over_the_runs():
    gold = list("aabb")
    runs = []
    for said in ("aabb", "abbb"):
        run = items([0.0] * 4, list(said))
        runs.append([replace(i, gold=(g,)) for i, g in zip(run, gold, strict=True)])
    found = score_over_seeds("macro_recall", runs, HOW)
    assert found.value == pytest.approx((1.0 + (0.5 + 1.0) / 2) / 2)
    assert found.low < found.value < found.high
    for name in ("macro_f1", "macro_precision", "macro_recall"):
        one = score_over_seeds(name, runs[1:], HOW)
        assert one.value == pytest.approx(class_scores(gold, list("abbb"))[name])
    table = score_over_seeds("f1", runs, HOW)
    assert (table.value, table.low, table.high) == (0.0, 0.0, 0.0)
