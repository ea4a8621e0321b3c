"""How sure a score is: document bootstrap intervals, and paired differences between two models.

A score here is a ratio of sums over documents: the loss is summed negative log-likelihood over
summed tokens. Tokens of one document are not independent, so documents are the units that are
resampled (a cluster bootstrap), and both sums of the ratio come from the same resample. Intervals
are percentile intervals (Efron and Tibshirani, An Introduction to the Bootstrap, chapters 13, 23).

Two models are compared on the same documents of the same resamples, so that what makes a document
hard cancels out: the interval of the difference is far narrower than the two intervals suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "unresolved"]

# Resampled documents held at once; bounds the memory whatever the number of documents.
CHUNK = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the interval around it."""

    value: float
    low: float
    high: float
    confidence: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """The same interval on another, increasing scale (perplexity is ``exp`` of the loss)."""
        return Interval(
            value=function(self.value),
            low=function(self.low),
            high=function(self.high),
            confidence=self.confidence,
        )


def ratio_interval(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ``sum(numerators) / sum(denominators)`` over resampled documents.

    Args:
        numerators: (documents,) as summed negative log-likelihood.
        denominators: (documents,) as number of tokens; not negative, some positive.
        confidence: Share of such intervals that hold the true value.
        samples: Number of resamples.
        seed: Equal seeds and equal numbers of documents give equal resamples.

    Returns:
        The ratio and its interval. With fewer than two documents nothing can be said: the interval
        is infinite.
    """
    table = _table(numerators, denominators)
    sums = _resampled_sums(table, samples=samples, seed=seed)
    return percentile_interval(_ratio(table.sum(axis=0)), _ratio(sums), len(table), confidence)


def paired_difference(
    model: tuple[npt.ArrayLike, npt.ArrayLike],
    baseline: tuple[npt.ArrayLike, npt.ArrayLike],
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of ``ratio(model) - ratio(baseline)`` over resamples of the same documents.

    Args:
        model: Numerators and denominators, (documents,) each.
        baseline: The same of the baseline, document by document.
        confidence: Share of such intervals that hold the true difference.
        samples: Number of resamples.
        seed: As in :func:`ratio_interval`.
    """
    table = _table(*model, *baseline)
    sums = _resampled_sums(table, samples=samples, seed=seed)
    value = _ratio(table.sum(axis=0)[:2]) - _ratio(table.sum(axis=0)[2:])
    differences = _ratio(sums[:, :2]) - _ratio(sums[:, 2:])
    return percentile_interval(value, differences, len(table), confidence)


def verdict(difference: Interval) -> Verdict:
    """What a difference of losses (model minus baseline) says; less loss is better."""
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "unresolved"


def _table(*columns: npt.ArrayLike) -> Floats:
    """Columns of numerators and denominators in turn, as (documents, columns)."""
    table = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
    # A document without tokens weighs nothing; drawing it would only thin out the resamples.
    return table[(table[:, 1::2] > 0).any(axis=1)]


def _resampled_sums(table: Floats, *, samples: int, seed: int) -> Floats:
    """Column sums of ``samples`` resamples of the rows: (samples, columns)."""
    documents, columns = table.shape
    generator = np.random.default_rng(seed)
    sums = np.empty((samples, columns))
    rows = max(1, CHUNK // max(documents, 1))
    for start in range(0, samples, rows):
        stop = min(start + rows, samples)
        drawn = generator.integers(0, max(documents, 1), size=(stop - start, documents))
        for column in range(columns):
            sums[start:stop, column] = table[:, column][drawn].sum(axis=1)
    return sums


def _ratio(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def percentile_interval(
    value: npt.ArrayLike, resampled: Floats, num_units: int, confidence: float
) -> Interval:
    """The interval between two quantiles of a value's resamples.

    Args:
        value: A scalar.
        resampled: (samples,).
        num_units: What was resampled; fewer than two say nothing, and the interval is infinite.
        confidence: Share of such intervals that hold the true value.
    """
    point = float(np.asarray(value))
    if num_units < 2:
        return Interval(value=point, low=-math.inf, high=math.inf, confidence=confidence)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    # Rounding of sums taken in another order must not leave the value outside its interval.
    return Interval(
        value=point,
        low=min(float(low), point),
        high=max(float(high), point),
        confidence=confidence,
    )
