"""What the rows of ``benchmarks/growth.py`` say: from numbers to numbers, without torch.

Every candidate was trained to the end, so what a lag would have chosen can be looked up, and what
was best is known. Per objective:

* :func:`foretold`: how well does the loss after k steps rank the operators as the last loss does?
* :func:`ended`: how did each operator end, beside the large model trained from scratch?

What the rules of ``samara grow`` would have chosen is in ``growth_replays.py``.

Intervals are for 95 %. Those of rank correlations resample operators, all seeds together: another
pool might have been taken. Those of differences between runs come from Student's t over seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from samara.errors import SamaraError
from samara.growth.metrics import spearman
from samara.growth.race import Losses
from samara.measure.compare import Interval

Row = Mapping[str, Any]

CONFIDENCE = 0.95
RESAMPLES = 1000
STUDENT_T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""The 97.5 % point of Student's t by number of runs; two runs bound nothing worth printing."""
EXACTNESS = ("exact", "tolerance", "changes")
"""Labels in the rows, in the order in which the rules prefer them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One grown model, trained to the end.

    Attributes:
        exactness: What growth did to the function: one of :data:`EXACTNESS`.
        measured: Losses by steps since growth.
        flops_per_step: Training FLOPs.
        flops: Of training, the small model's included.
    """

    exactness: str
    measured: Mapping[int, Losses]
    flops_per_step: float
    flops: float

    def loss(self, step: int) -> float:
        """Nats per target."""
        return self.measured[step].mean

    @property
    def last(self) -> float:
        """The loss at the end."""
        return self.loss(max(self.measured))


Pool = Mapping[int, Mapping[str, Run]]
"""By seed, by operator: the same operators for each seed."""


def objectives(rows: Sequence[Row]) -> list[str]:
    """Those that models were grown for, in the order of the alphabet."""
    return sorted({row["objective"] for row in rows if row["kind"] == "grown"})


def grown(rows: Sequence[Row], objective: str) -> Pool:
    """The grown models of an objective; operators that some seed lacks are left out."""
    found: dict[int, dict[str, Run]] = {}
    for row in rows:
        if row["kind"] == "grown" and row["objective"] == objective:
            targets = _numbers(row["num_targets"])
            found.setdefault(row["seed"], {})[row["operator"]] = Run(
                exactness=row["exactness"],
                measured={
                    int(step): Losses(nll_sum=_numbers(sums), num_targets=targets)
                    for step, sums in row["rungs"].items()
                },
                flops_per_step=row["flops_per_step"],
                flops=row["flops"],
            )
    everywhere = set.intersection(*(set(runs) for runs in found.values())) if found else set()
    return {
        seed: {name: found[seed][name] for name in sorted(everywhere)} for seed in sorted(found)
    }


def _numbers(text: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([float(word) for word in text.split()])


# --- what a lag foretells -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What the losses after k steps say about the last ones.

    Attributes:
        step: k.
        share: k as a share of all steps.
        spearman: Rank correlation with the last losses, mean over seeds.
        by_seed: The same of each seed.
        gain: The correlation minus that of the losses right after growth, on the same resamples.
        lowest: Operators with the lowest loss at k, of any seed.
        hits: Seeds for which the lowest loss at k is the lowest in the end.
        regret: Last loss of the lowest at k minus the lowest last loss, mean over seeds; of several
            that are lowest, the mean.
        relative_regret: Regret by (median − lowest) of the last losses, mean over seeds.
        gross: Steps of all candidates up to k, as a share of one whole training.
        net: The same without the winner's, which go on.
    """

    step: int
    share: float
    spearman: Interval
    by_seed: tuple[float, ...]
    gain: Interval
    lowest: tuple[str, ...]
    hits: int
    regret: float
    relative_regret: float
    gross: float
    net: float


def holds_from(findings: Sequence[Foretold], *, gain: bool = False) -> Foretold | None:
    """The first rung from which on the interval lies above zero.

    Args:
        findings: In order of their steps.
        gain: Look at the gain on the losses right after growth, not at the correlation itself.
    """
    first = None
    for one in reversed(findings):
        if not (one.gain if gain else one.spearman).low > 0:
            break
        first = one
    return first


def foretold(pool: Pool) -> list[Foretold]:
    """One finding per rung, that of 0 steps first; the last rung is what is foretold."""
    horizon, steps = horizon_of(pool), rungs(pool)[:-1]
    num = len(next(iter(pool.values())))
    last = _table(pool, horizon)
    correlations = {step: _correlations(_table(pool, step), last) for step in steps}
    return [
        Foretold(
            step=step,
            share=step / horizon,
            spearman=_percentiles(correlations[step]),
            by_seed=correlations[step].by_seed,
            gain=_percentiles(correlations[step], correlations[steps[0]]),
            lowest=tuple(sorted({n for runs in pool.values() for n in lowest_at(runs, step)})),
            hits=sum(regret_of_lowest(runs, step) == 0.0 for runs in pool.values()),
            regret=statistics.fmean(regret_of_lowest(runs, step) for runs in pool.values()),
            relative_regret=statistics.fmean(
                relative(regret_of_lowest(runs, step), runs) for runs in pool.values()
            ),
            gross=num * step / horizon,
            net=(num - 1) * step / horizon,
        )
        for step in steps
    ]


def rungs(pool: Pool) -> list[int]:
    """Steps at which every run was measured."""
    runs = [run for by_name in pool.values() for run in by_name.values()]
    return sorted(set.intersection(*(set(run.measured) for run in runs)))


def horizon_of(pool: Pool) -> int:
    """Steps of the whole training after growth."""
    return rungs(pool)[-1]


def lowest_at(runs: Mapping[str, Run], step: int) -> list[str]:
    """The operators with the lowest loss at a rung: more than one where all keep the function."""
    lowest = min(run.loss(step) for run in runs.values())
    return [name for name, run in runs.items() if run.loss(step) == lowest]


def regret_of_lowest(runs: Mapping[str, Run], step: int) -> float:
    """What taking the lowest loss at ``step`` costs in the end, in nats."""
    best = min(run.last for run in runs.values())
    return statistics.fmean(runs[name].last - best for name in lowest_at(runs, step))


def spread_of(runs: Mapping[str, Run]) -> float:
    """Median minus lowest last loss: what a blind choice costs, about."""
    last = [run.last for run in runs.values()]
    return statistics.median(last) - min(last)


def relative(regret: float, runs: Mapping[str, Run]) -> float:
    """A regret by the spread; NaN where half of the pool is as good as the best."""
    return regret / spread_of(runs) if spread_of(runs) else math.nan


def blind_regret(pool: Pool) -> float:
    """What a choice by lot costs in the end, in nats: the mean over operators and seeds."""
    return statistics.fmean(
        run.last - min(other.last for other in runs.values())
        for runs in pool.values()
        for run in runs.values()
    )


def between_seeds(pool: Pool) -> float | None:
    """Rank correlation of the last losses of two seeds, mean over pairs: how far any can go."""
    last = _table(pool, horizon_of(pool))
    found = [_correlation(a, b) for a, b in itertools.combinations(last, 2)]
    return statistics.fmean(found) if found else None


Table = tuple[tuple[float, ...], ...]
"""(seeds, operators)"""


def _table(pool: Pool, step: int) -> Table:
    return tuple(tuple(run.loss(step) for run in runs.values()) for runs in pool.values())


@dataclass(frozen=True, kw_only=True)
class _Correlations:
    by_seed: tuple[float, ...]
    resampled: tuple[float, ...]
    """Means over seeds; NaN where a resample has no ranks to correlate."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed)


@cache
def _correlations(losses: Table, last: Table) -> _Correlations:
    """Rank correlations, and what they are for pools drawn with replacement from this one."""
    num = len(last[0])
    draws = np.random.default_rng(0).integers(0, num, size=(RESAMPLES, num))
    by_draw = [
        [_correlation([x[i] for i in draw], [y[i] for i in draw]) for draw in draws.tolist()]
        for x, y in zip(losses, last, strict=True)
    ]
    return _Correlations(
        by_seed=tuple(_correlation(x, y) for x, y in zip(losses, last, strict=True)),
        resampled=tuple(statistics.fmean(seeds) for seeds in zip(*by_draw, strict=True)),
    )


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    value = spearman(x, y)
    return math.nan if value is None else value


def _percentiles(own: _Correlations, minus: _Correlations | None = None) -> Interval:
    value, drawn = own.mean, np.array(own.resampled)
    if minus is not None:
        value, drawn = value - minus.mean, drawn - np.array(minus.resampled)
    drawn = drawn[~np.isnan(drawn)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (math.nan, math.nan)
    return Interval(value=value, low=float(low), high=float(high), confidence=CONFIDENCE)


# --- how it ended, and what scratch gives ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """The large model trained from the start.

    Attributes:
        sweep: Last loss by learning rate, of one seed, at the grown models' total FLOPs.
        swept_seed: That seed.
        lr: The best rate.
        losses: Last loss by seed at the best rate and the grown models' total FLOPs.
        grown_lr: The rate of the grown models.
        curve: (FLOPs, last loss) of the swept seed at the best rate, cheapest first.
    """

    sweep: Mapping[float, float]
    swept_seed: int
    lr: float
    losses: Mapping[int, float]
    grown_lr: float
    curve: tuple[tuple[float, float], ...]

    def flops_for(self, loss: float) -> float | None:
        """FLOPs that reach a loss, on the line through the runs around it in log FLOPs.

        None outside of what was run: nothing is extrapolated.
        """
        for (cheap, high), (dear, low) in itertools.pairwise(self.curve):
            if low <= loss <= high:
                share = (high - loss) / (high - low)
                return math.exp(math.log(cheap) + share * math.log(dear / cheap))
        return None


def scratch(rows: Sequence[Row], objective: str) -> Scratch | None:
    """The scratch runs of an objective; None where none was made.

    Raises:
        SamaraError: If the sweep is not one seed's.
    """
    own = [row for row in rows if row["kind"] == "scratch" and row["objective"] == objective]
    equal = [row for row in own if row["budget"] == 1.0]
    if not equal:
        return None
    seeds = {row["seed"] for row in equal}
    swept = {seed for seed in seeds if len({r["lr"] for r in equal if r["seed"] == seed}) > 1}
    if len(swept) != 1:
        raise SamaraError(
            f"scratch runs of {objective}: learning rates were swept in {len(swept)} seeds; "
            "run benchmarks/growth.py until the sweep of its first seed is in"
        )
    (first,) = swept
    rates = {row["lr"] for row in rows if row["kind"] == "grown" and row["objective"] == objective}
    assert len(rates) == 1, "grown models share one learning rate"
    sweep = {row["lr"]: row["loss"] for row in equal if row["seed"] == first}
    lr = min(sweep, key=lambda rate: sweep[rate])
    at_best = [row for row in own if row["lr"] == lr]
    return Scratch(
        sweep=dict(sorted(sweep.items())),
        swept_seed=first,
        lr=lr,
        losses={row["seed"]: row["loss"] for row in at_best if row["budget"] == 1.0},
        grown_lr=rates.pop(),
        curve=tuple(sorted((r["flops"], r["loss"]) for r in at_best if r["seed"] == first)),
    )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an operator ended.

    Attributes:
        operator: Its name.
        exactness: What growth did to the function; of several seeds, the worst.
        at_growth: Loss right after growth, mean over seeds.
        last: Last loss, mean over seeds.
        deviation: Standard deviation of the last loss over seeds.
        against_scratch: Last loss minus that of scratch at equal total FLOPs, paired by seed; None
            with fewer than three seeds of both.
        flops: Of training, the small model's included, mean over seeds.
        saved: FLOPs saved against a scratch run of the same last loss, as a share of that run's, of
            the swept seed alone; None where no such run can be told.
    """

    operator: str
    exactness: str
    at_growth: float
    last: float
    deviation: float
    against_scratch: Interval | None
    flops: float
    saved: float | None


def ended(pool: Pool, beside: Scratch | None) -> list[Ended]:
    """One finding per operator, the lowest last loss first."""
    found = []
    for name in next(iter(pool.values())):
        runs = {seed: by_name[name] for seed, by_name in pool.items()}
        last = [run.last for run in runs.values()]
        saved, differences = None, []
        if beside is not None:
            differences = [runs[s].last - beside.losses[s] for s in runs if s in beside.losses]
            one = runs.get(beside.swept_seed)
            needed = None if one is None else beside.flops_for(one.last)
            saved = None if one is None or needed is None else 1.0 - one.flops / needed
        found.append(
            Ended(
                operator=name,
                exactness=max((run.exactness for run in runs.values()), key=EXACTNESS.index),
                at_growth=statistics.fmean(run.loss(0) for run in runs.values()),
                last=statistics.fmean(last),
                deviation=statistics.stdev(last) if len(last) > 1 else math.nan,
                against_scratch=mean_difference(differences),
                flops=statistics.fmean(run.flops for run in runs.values()),
                saved=saved,
            )
        )
    return sorted(found, key=lambda one: (one.last, one.operator))


def mean_difference(differences: Sequence[float]) -> Interval | None:
    """The mean with Student's interval; None for fewer than three or more than ten."""
    if len(differences) not in STUDENT_T:
        return None
    value = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = STUDENT_T[len(differences)] * error
    return Interval(value=value, low=value - half, high=value + half, confidence=CONFIDENCE)
