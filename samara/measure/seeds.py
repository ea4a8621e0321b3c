"""Several runs of one thing that differ in their seed: means, differences, agreement.

Every run scores the same rows, so that there are two sources of chance: which rows, and which
seeds. Intervals resample both, rows and runs, each with replacement (a two-way bootstrap; Owen
2007, arXiv 0712.1111, finds it cautious). Three seeds are few: such an interval says what these
runs show, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from samara.measure.compare import CHUNK, Interval, percentile_interval
from samara.measure.task_metrics import MACRO, METRICS, ClassCounts, Item, Resampling

Floats = npt.NDArray[np.float64]
NonInferiority = Literal["non-inferior", "inferior", "inconclusive"]


def score_table(name: str, runs: Sequence[Sequence[Item]]) -> Floats:
    """Scores of a mean as (runs, rows).

    Args:
        name: A metric that is a mean over rows.
        runs: Items of each run, the same rows in the same order.
    """
    assert METRICS[name].kind in ("binary", "mean"), name
    lines = [[item.line for item in run] for run in runs]
    assert all(own == lines[0] for own in lines), "every run scores the same rows"
    return np.array([[item.scores[name] for item in run] for run in runs], dtype=np.float64)


def score_over_seeds(name: str, runs: Sequence[Sequence[Item]], how: Resampling) -> Interval:
    """The mean over runs of a score, with its interval over rows and seeds.

    Args:
        name: A metric that is a mean over rows, or a macro average.
        runs: Items of each run, the same rows in the same order.
        how: Confidence, resamples, seed.
    """
    if METRICS[name].kind == "classes":
        return _macro_over_seeds(name, runs, how)
    return mean_over_seeds(score_table(name, runs), how)


def _macro_over_seeds(name: str, runs: Sequence[Sequence[Item]], how: Resampling) -> Interval:
    """Rows weigh as often as they were drawn; a macro average is one of weighted counts."""
    said = [[(item.gold[0], item.prediction) for item in run] for run in runs]
    labels = np.array(sorted({label for run in said for pair in run for label in pair}))

    def scores(weights_sr: Floats) -> Floats:
        """Macro average of each run under each weighting, (samples, runs)."""
        found = []
        for run in said:
            gold_rl, predicted_rl = (
                (np.array([pair[side] for pair in run])[:, None] == labels).astype(np.float64)
                for side in (0, 1)
            )
            counts = ClassCounts(
                right=weights_sr @ (gold_rl * predicted_rl),
                predicted=weights_sr @ predicted_rl,
                gold=weights_sr @ gold_rl,
            )
            found.append(MACRO[name](counts))
        return np.stack(found, axis=1)

    num_rows = len(said[0])
    value = float(scores(np.ones((1, num_rows))).mean())
    generator = np.random.default_rng(how.seed)
    drawn = [
        (scores(_draws(generator, size, num_rows)) * _draws(generator, size, len(runs))).sum(axis=1)
        / len(runs)
        for size in _chunks(how.samples, num_rows)
    ]
    return percentile_interval(value, np.concatenate(drawn), num_rows, how.confidence)


def mean_over_seeds(table: Floats, how: Resampling) -> Interval:
    """The mean of (runs, rows), with its interval over rows and seeds."""
    return pooled_difference([table], [np.zeros((1, table.shape[1]))], how)


def pooled_difference(
    model: Sequence[Floats], baseline: Sequence[Floats], how: Resampling
) -> Interval:
    """The difference of two models' means, each task weighing the same.

    Args:
        model: (runs, rows) of each task.
        baseline: The same tasks and rows of the other; its runs are others, and may be fewer.
        how: Confidence, resamples, seed.

    Returns:
        Mean over tasks of ``model - baseline``; rows are drawn in pairs, runs of each by itself.
        With fewer than two rows in a task the interval is infinite.
    """
    generator = np.random.default_rng(how.seed)
    value, total = 0.0, np.zeros(how.samples)
    for one, other in zip(model, baseline, strict=True):
        assert one.shape[1] == other.shape[1], "the same rows"
        value += (one.mean() - other.mean()) / len(model)
        total += _resampled(one, other, generator, how.samples) / len(model)
    num_rows = min(table.shape[1] for table in model)
    return percentile_interval(value, total, num_rows, how.confidence)


def _resampled(one: Floats, other: Floats, generator: np.random.Generator, samples: int) -> Floats:
    """Differences of means of ``samples`` resamples of the rows, and of the runs of either."""
    rows = one.shape[1]
    found = []
    for size in _chunks(samples, rows):
        counts_sr = _draws(generator, size, rows)
        a_sr, b_sr = (
            _draws(generator, size, len(table)) @ table / len(table) for table in (one, other)
        )
        found.append((counts_sr * (a_sr - b_sr)).sum(axis=1) / rows)
    return np.concatenate(found)


def _draws(generator: np.random.Generator, samples: int, size: int) -> Floats:
    """How often each of ``size`` things is drawn in as many draws, (samples, size)."""
    return generator.multinomial(size, np.full(size, 1 / size), size=samples).astype(np.float64)


def _chunks(samples: int, rows: int) -> list[int]:
    """Resamples done at once: bounds the memory whatever the number of rows."""
    most = max(1, CHUNK // max(rows, 1))
    return [min(most, samples - start) for start in range(0, samples, most)]


def non_inferiority(difference: Interval, margin: float) -> NonInferiority:
    """Whether a model is at most ``margin`` worse, as far as the interval of ``model - baseline``.

    The whole interval above ``-margin``: ``non-inferior``; the whole of it below: ``inferior``.
    """
    if difference.low > -margin:
        return "non-inferior"
    return "inferior" if difference.high < -margin else "inconclusive"


def agreement(runs: Sequence[Sequence[Item]]) -> float:
    """Share of equal predictions, row by row, over all pairs of runs; 1 for a single run."""
    predictions = [[item.prediction for item in run] for run in runs]
    shares = [
        sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
        for one, other in combinations(predictions, 2)
    ]
    return sum(shares) / len(shares) if shares else 1.0


def spread(table: Floats) -> float:
    """Standard deviation of the runs' means (sample); 0 for a single run."""
    return float(table.mean(axis=1).std(ddof=1)) if len(table) > 1 else 0.0
