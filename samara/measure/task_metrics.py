"""The scores of tasks with their intervals, and paired differences between two models.

A scored item keeps what each score is made of, so that a score, its interval and its difference
from another model's are all computed from the items, here. Most scores are means over items and
some are ratios of sums: those are resampled by :mod:`samara.measure.compare`. Macro averages are
functions of a confusion matrix; resampling items with replacement is then the same as drawing the
counts of its cells from a multinomial, which is what is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from samara.measure.compare import (
    Interval,
    paired_difference,
    percentile_interval,
    ratio_interval,
)

Floats = npt.NDArray[np.float64]
Kind = Literal["binary", "mean", "classes", "ratio", "exp_ratio"]
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score.

    Attributes:
        kind: ``binary`` and ``mean``: the mean of the items' scores, of zeros and ones or of any
            numbers; ``ratio``: of two sums; ``exp_ratio``: its exponential; ``classes``: of the
            items' right and predicted labels.
        better: Which way is better; ``neither`` for a bias that should be balanced.
    """

    kind: Kind
    better: Better = "higher"


METRICS: dict[str, Metric] = {
    "acc": Metric(kind="binary"),
    "acc_norm": Metric(kind="binary"),
    "accuracy": Metric(kind="binary"),
    "exact_match": Metric(kind="binary"),
    "pct_stereotype": Metric(kind="binary", better="neither"),
    "mc2": Metric(kind="mean"),
    "f1": Metric(kind="mean"),
    "rouge1": Metric(kind="mean"),
    "rouge2": Metric(kind="mean"),
    "rougeL": Metric(kind="mean"),
    "macro_f1": Metric(kind="classes"),
    "macro_precision": Metric(kind="classes"),
    "macro_recall": Metric(kind="classes"),
    "perplexity": Metric(kind="exp_ratio", better="lower"),
    "word_perplexity": Metric(kind="exp_ratio", better="lower"),
    "bits_per_byte": Metric(kind="ratio", better="lower"),
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One scored row.

    Attributes:
        line: Its line in the data file.
        id: Its own id, if it has one.
        scores: Metric -> number, for means.
        sums: Metric -> numerator and denominator, for ratios.
        gold: The right label or labels, or the accepted answers.
        prediction: The label or answer of the model; empty for a text scored whole.
        is_truncated: Whether the prompt lost its beginning to fit into the model.
        details: What else is worth keeping, as log-likelihoods.
    """

    line: int
    id: str | None
    scores: Mapping[str, float]
    sums: Mapping[str, tuple[float, float]]
    gold: tuple[str, ...]
    prediction: str
    is_truncated: bool
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are made: confidence, number of resamples, seed."""

    confidence: float = 0.95
    samples: int = 2000
    seed: int = 0


def metric_interval(name: str, items: Sequence[Item], how: Resampling) -> Interval:
    """A score over items with its interval.

    Args:
        name: One of :data:`METRICS`, which every item must hold.
        items: At least one.
        how: Confidence, resamples, seed.
    """
    kind = METRICS[name].kind
    if kind == "classes":
        return _classes_interval(name, items, how)
    interval = ratio_interval(
        *_sums(name, items), confidence=how.confidence, samples=how.samples, seed=how.seed
    )
    return interval.map(_exp) if kind == "exp_ratio" else interval


def paired_metric(
    name: str, model: Sequence[Item], baseline: Sequence[Item], how: Resampling
) -> Interval:
    """The difference ``model - baseline`` of a score over the same items, with its interval.

    For perplexities it is the difference of their logarithms.

    Args:
        name: One of :data:`METRICS`.
        model: Items of the one model.
        baseline: Items of the other, in the same order.
        how: Confidence, resamples, seed.
    """
    if METRICS[name].kind == "classes":
        return _classes_difference(name, model, baseline, how)
    return paired_difference(
        _sums(name, model),
        _sums(name, baseline),
        confidence=how.confidence,
        samples=how.samples,
        seed=how.seed,
    )


def mean_over_tasks(tasks: Sequence[tuple[str, Sequence[Item]]], how: Resampling) -> Interval:
    """The mean of the scores of several tasks, each weighing the same, with its interval."""
    return ratio_interval(
        *_task_sums(tasks), confidence=how.confidence, samples=how.samples, seed=how.seed
    )


def paired_mean_over_tasks(
    model: Sequence[tuple[str, Sequence[Item]]],
    baseline: Sequence[tuple[str, Sequence[Item]]],
    how: Resampling,
) -> Interval:
    """The difference of two models' means over the same tasks, with its interval."""
    return paired_difference(
        _task_sums(model),
        _task_sums(baseline),
        confidence=how.confidence,
        samples=how.samples,
        seed=how.seed,
    )


def _sums(name: str, items: Sequence[Item]) -> tuple[Floats, Floats]:
    """Numerators and denominators of a mean or ratio."""
    if METRICS[name].kind in ("ratio", "exp_ratio"):
        pairs = np.array([item.sums[name] for item in items], dtype=np.float64)
        return pairs[:, 0], pairs[:, 1]
    scores = np.array([item.scores[name] for item in items], dtype=np.float64)
    return scores, np.ones_like(scores)


def _task_sums(tasks: Sequence[tuple[str, Sequence[Item]]]) -> tuple[Floats, Floats]:
    """The mean over tasks as one ratio: each item weighs one over the size of its task.

    Resampling the pooled items also varies how many fall into each task, so that the interval is a
    little wider than one resampled task by task.
    """
    scores = [_sums(name, items)[0] / len(items) for name, items in tasks]
    weights = [np.full(len(items), 1 / len(items)) for _, items in tasks]
    return np.concatenate(scores), np.concatenate(weights)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# --- labels -----------------------------------------------------------------------------------


def class_scores(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Macro precision, recall and F1: means over the labels that occur, 0 where undefined."""
    cells, counts = _cells(gold, predicted)
    labels = _indicators(cells, [(0, 1)])[0]
    return {name: float(MACRO[name](labels.count(counts))) for name in MACRO}


@dataclass(frozen=True, kw_only=True)
class ClassCounts:
    """Per label, over any number of resamples: (…, labels)."""

    right: Floats
    predicted: Floats
    gold: Floats

    def mean(self, values: Floats) -> Floats:
        """Mean over the labels that occur."""
        occurs = (self.predicted + self.gold) > 0
        return np.asarray((values * occurs).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1))


def _over(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, 0 where the denominator is 0."""
    return np.asarray(numerator / np.where(denominator > 0, denominator, 1.0))


MACRO: dict[str, Callable[[ClassCounts], Floats]] = {
    "macro_precision": lambda counts: counts.mean(_over(counts.right, counts.predicted)),
    "macro_recall": lambda counts: counts.mean(_over(counts.right, counts.gold)),
    "macro_f1": lambda counts: counts.mean(_over(2 * counts.right, counts.predicted + counts.gold)),
}


@dataclass(frozen=True, kw_only=True)
class _Indicators:
    """Which cells count for which label: (cells, labels)."""

    right: Floats
    predicted: Floats
    gold: Floats

    def count(self, cell_counts: npt.NDArray[np.int64]) -> ClassCounts:
        """Counts per label of counts per cell (…, cells)."""
        return ClassCounts(
            right=cell_counts @ self.right,
            predicted=cell_counts @ self.predicted,
            gold=cell_counts @ self.gold,
        )


def _cells(*columns: Sequence[str]) -> tuple[list[tuple[str, ...]], npt.NDArray[np.int64]]:
    """Distinct combinations of the columns, and how often each occurs."""
    counts: dict[tuple[str, ...], int] = {}
    for row in zip(*columns, strict=True):
        counts[row] = counts.get(row, 0) + 1
    cells = sorted(counts)
    return cells, np.array([counts[cell] for cell in cells], dtype=np.int64)


def _indicators(
    cells: Sequence[tuple[str, ...]], columns: Sequence[tuple[int, int]]
) -> list[_Indicators]:
    """Indicators of (gold, predicted) for each pair of columns."""
    found = []
    for gold, predicted in columns:
        labels = sorted({cell[column] for cell in cells for column in (gold, predicted)})
        is_gold = np.array([[cell[gold] == label for label in labels] for cell in cells], float)
        is_predicted = np.array(
            [[cell[predicted] == label for label in labels] for cell in cells], float
        )
        found.append(
            _Indicators(right=is_gold * is_predicted, predicted=is_predicted, gold=is_gold)
        )
    return found


def _redraw(counts: npt.NDArray[np.int64], how: Resampling) -> npt.NDArray[np.int64]:
    total = int(counts.sum())
    generator = np.random.default_rng(how.seed)
    return generator.multinomial(total, counts / total, size=how.samples)


def _classes_interval(name: str, items: Sequence[Item], how: Resampling) -> Interval:
    cells, counts = _cells([item.gold[0] for item in items], [item.prediction for item in items])
    (labels,) = _indicators(cells, [(0, 1)])
    value = float(MACRO[name](labels.count(counts)))
    resampled = MACRO[name](labels.count(_redraw(counts, how)))
    return percentile_interval(value, resampled, len(items), how.confidence)


def _classes_difference(
    name: str, model: Sequence[Item], baseline: Sequence[Item], how: Resampling
) -> Interval:
    cells, counts = _cells(
        [item.gold[0] for item in model],
        [item.prediction for item in model],
        [item.prediction for item in baseline],
    )
    one, other = _indicators(cells, [(0, 1), (0, 2)])

    def difference(cell_counts: npt.NDArray[np.int64]) -> Floats:
        return MACRO[name](one.count(cell_counts)) - MACRO[name](other.count(cell_counts))

    return percentile_interval(
        difference(counts), difference(_redraw(counts, how)), len(model), how.confidence
    )


# --- zeros and ones ---------------------------------------------------------------------------


def mcnemar_p(model_only: int, baseline_only: int) -> float:
    """Two-sided exact p of McNemar's test: could a fair coin split the disagreements like this?

    Args:
        model_only: Items that only the one model has right.
        baseline_only: Items that only the other has right.
    """
    total, fewer = model_only + baseline_only, min(model_only, baseline_only)
    ways, term = 0, 1
    for drawn in range(fewer + 1):
        ways += term
        term = term * (total - drawn) // (drawn + 1)
    return float(min(Fraction(1), Fraction(2 * ways, 2**total)))
