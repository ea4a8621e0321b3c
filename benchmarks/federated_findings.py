"""What the runs of ``benchmarks/federated.py`` say: cost to a target, scores, memory, verdicts.

The target of a situation is fixed by the tuned baseline: the final validation score of FedLoRA,
mean over seeds, less one point of accuracy (of a loss: one percent more). A run has reached it at
the first evaluation that is no worse than it and whose mean with the two that follow is not,
either; a run that never does is censored, which is told and not averaged away. Ratios are taken
seed by seed; intervals are Student's over seeds, of ratios on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from federated_cases import ARMS, SITUATIONS

REFERENCE = "FedLoRA"
WINDOW = 3
POINT = 0.01
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""97.5 % quantile by number of values."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A mean over seeds and its 95 % interval; None: too few seeds for one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """An arm in a situation, over its seeds.

    Attributes:
        arm, situation: Which.
        lr: The rate its sweep chose.
        seeds, reached: How many ran, and how many of them reached the target.
        final, at_equal_time: Validation score at the end, and when FedLoRA's run of that seed ends.
        final_difference: Of the former to FedLoRA's.
        clients, worst_decile: Score of the clients' own test rows by their own models.
        worst_decile_difference: To FedLoRA's.
        seconds, bytes, joules: To the target, median over seeds; None: a seed is censored.
        against_reference, against_best: FedLoRA's time to the target, and that of the quickest arm
            that drops nothing, over this arm's; None: a seed of either is censored.
        total_seconds, total_bytes, total_joules, cpu_seconds: Of whole runs, mean.
        peak_bytes: Modelled: mean over the clients' trainings, and the largest.
        measured_peak_bytes: The allocator's peak of a run; None: not measured.
        strategy_share: Time of planning, aggregation and saving over that of the clients.
    """

    arm: str
    situation: str
    lr: float
    seeds: int
    reached: int
    final: Bounds
    at_equal_time: Bounds | None
    final_difference: Bounds | None
    clients: Bounds
    worst_decile: Bounds
    worst_decile_difference: Bounds | None
    seconds: float | None
    bytes: float | None
    joules: float | None
    against_reference: Bounds | None
    against_best: Bounds | None
    total_seconds: float
    total_bytes: float
    total_joules: float
    cpu_seconds: float
    peak_bytes: tuple[float, float]
    measured_peak_bytes: float | None
    strategy_share: float


# --- figures of one run ---------------------------------------------------------------------------


def is_loss(row: Row) -> bool:
    """Whether the score is a loss: then less is better."""
    return SITUATIONS[row["situation"]][0] == "text"


def scores(row: Row) -> list[float]:
    """After each round; more is better: accuracy, or a loss with its sign changed."""
    curve = row["curve"]
    values = [-loss for loss in curve["loss"]] if is_loss(row) else curve["accuracy"]
    return [float(value) for value in values]


def final(row: Row) -> float:
    """Mean of the last evaluations."""
    return fmean(scores(row)[-WINDOW:])


def until(row: Row, seconds: float) -> float:
    """Mean of the last evaluations up to a time."""
    found = [s for s, at in zip(scores(row), row["curve"]["seconds"], strict=True) if at <= seconds]
    return fmean(found[-WINDOW:])


def reached_at(values: Sequence[float], target: float) -> int | None:
    """The evaluation that reaches a target and stays there; None: censored."""
    for place in range(len(values) - WINDOW + 1):
        if values[place] >= target and fmean(values[place : place + WINDOW]) >= target:
            return place
    return None


def client_score(row: Row, which: str) -> float:
    """``mean`` or ``worst_decile`` of the clients' own models; more is better."""
    name = "loss" if is_loss(row) else "accuracy"
    value = float(row["clients"]["personal"][f"{name}_{which}"])
    return -value if is_loss(row) else value


# --- over seeds -----------------------------------------------------------------------------------


def bounds(values: Sequence[float]) -> Bounds:
    """Mean and Student interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Bounds(value=mean)
    half = STUDENT.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values))
    return Bounds(value=mean, low=mean - half, high=mean + half)


def ratio_bounds(ratios: Sequence[float]) -> Bounds:
    """Geometric mean and the interval of the logarithms."""
    logs = bounds([math.log(ratio) for ratio in ratios])
    ends = [None if end is None else math.exp(end) for end in (logs.low, logs.high)]
    return Bounds(value=math.exp(logs.value), low=ends[0], high=ends[1])


def chosen_rates(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(kind of task, arm) -> the rate with the least validation loss where rates were swept."""
    runs = [row for row in rows if row["kind"] == "run"]
    found: dict[tuple[str, str], float] = {}
    for row in runs:
        key = (SITUATIONS[row["situation"]][0], row["arm"])
        group = [r for r in runs if (SITUATIONS[r["situation"]][0], r["arm"]) == key]
        first = [
            r
            for r in group
            if (r["situation"], r["seed"]) == (group[0]["situation"], group[0]["seed"])
        ]
        swept = [r for r in first if r["validation_loss"] is not None]
        if swept:
            found[key] = min(swept, key=lambda r: float(r["validation_loss"]))["lr"]
    return found


def summaries(rows: Sequence[Row]) -> dict[str, list[Summary]]:
    """Situation -> its arms in the order of the table of arms, those that have runs."""
    rates = chosen_rates(rows)
    rows = [row for row in rows if row["kind"] == "run"]
    found: dict[str, list[Summary]] = {}
    for situation, (kind, _) in SITUATIONS.items():
        runs = {
            arm: {
                row["seed"]: row
                for row in rows
                if (row["situation"], row["arm"]) == (situation, arm)
                and row["lr"] == rates.get((kind, arm))
            }
            for arm in ARMS
        }
        runs = {arm: own for arm, own in runs.items() if own}
        if REFERENCE in runs:
            found[situation] = _situation(situation, runs)
    return found


def target_of(reference: Mapping[int, Row]) -> float:
    """The score that a run has to reach."""
    value = fmean(final(row) for row in reference.values())
    is_of_loss = is_loss(next(iter(reference.values())))
    return value * (1 + POINT) if is_of_loss else value - POINT


def _situation(situation: str, runs: Mapping[str, Mapping[int, Row]]) -> list[Summary]:
    reference = runs[REFERENCE]
    target = target_of(reference)
    places = {
        arm: {seed: reached_at(scores(row), target) for seed, row in own.items()}
        for arm, own in runs.items()
    }
    times = {arm: _costs(runs[arm], places[arm], "seconds") for arm in runs}
    whole = {
        arm: median(own.values())
        for arm, own in times.items()
        if ARMS[arm].role == "baseline" and len(own) == len(runs[arm])
    }
    best = min(whole, key=lambda arm: whole[arm], default=None)
    return [
        _summary(situation, arm, runs, places=places[arm], times=times, best=best) for arm in runs
    ]


def _costs(
    rows: Mapping[int, Row], places: Mapping[int, int | None], name: str
) -> dict[int, float]:
    """Seed -> seconds, bytes or joules to the target; without those that are censored."""
    return {
        seed: max(1e-12, rows[seed]["curve"][name][place])
        for seed, place in places.items()
        if place is not None
    }


def _summary(
    situation: str,
    arm: str,
    runs: Mapping[str, Mapping[int, Row]],
    *,
    places: Mapping[int, int | None],
    times: Mapping[str, Mapping[int, float]],
    best: str | None,
) -> Summary:
    own, reference = runs[arm], runs[REFERENCE]
    rows, shared = list(own.values()), [seed for seed in own if seed in reference]

    def difference(score: Any) -> Bounds | None:
        pairs = [score(own[seed]) - score(reference[seed]) for seed in shared]
        return bounds(pairs) if pairs and arm != REFERENCE else None

    def ratio(other: str | None) -> Bounds | None:
        if other is None or other == arm:
            return None
        seeds = [seed for seed in own if seed in runs[other]]
        complete = seeds and all(seed in times[arm] and seed in times[other] for seed in seeds)
        return ratio_bounds([times[other][s] / times[arm][s] for s in seeds]) if complete else None

    def to_target(name: str) -> float | None:
        costs = _costs(own, places, name)
        return median(costs.values()) if len(costs) == len(own) else None

    at_equal = [until(own[seed], reference[seed]["modelled_seconds"]) for seed in shared]
    peaks = [row["measured_peak_bytes"] for row in rows if row["measured_peak_bytes"] is not None]
    return Summary(
        arm=arm,
        situation=situation,
        lr=rows[0]["lr"],
        seeds=len(own),
        reached=len(times[arm]),
        final=bounds([final(row) for row in rows]),
        at_equal_time=bounds(at_equal) if at_equal else None,
        final_difference=difference(final),
        clients=bounds([client_score(row, "mean") for row in rows]),
        worst_decile=bounds([client_score(row, "worst_decile") for row in rows]),
        worst_decile_difference=difference(lambda row: client_score(row, "worst_decile")),
        seconds=to_target("seconds"),
        bytes=to_target("bytes"),
        joules=to_target("joules"),
        against_reference=ratio(REFERENCE),
        against_best=ratio(best),
        total_seconds=fmean(row["modelled_seconds"] for row in rows),
        total_bytes=fmean(row["bytes"] for row in rows),
        total_joules=fmean(row["modelled_joules"] for row in rows),
        cpu_seconds=fmean(row["cpu_seconds"] for row in rows),
        peak_bytes=(
            fmean(row["modelled_peak_bytes"]["mean"] for row in rows),
            max(row["modelled_peak_bytes"]["max"] for row in rows),
        ),
        measured_peak_bytes=max(peaks, default=None),
        strategy_share=fmean(
            row["strategy_seconds_per_round"] / max(1e-12, row["client_seconds_per_round"])
            for row in rows
        ),
    )


# --- what was aimed at ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One aim, what was found, and whether that meets it; None: not measured."""

    name: str
    wanted: str
    found: str
    is_met: bool | None


def goals(rows: Sequence[Row], *, method: str = "DropPEFT") -> list[Goal]:
    """The aims of the method, each against what was measured."""
    found = []
    for situation, arms in summaries(rows).items():
        own = next((s for s in arms if s.arm == method), None)
        if own is not None:
            found += _goals_of(situation, own, is_of_loss=SITUATIONS[situation][0] == "text")
    peaks = {row["arm"]: row["peak_bytes_above_loaded"] for row in rows if row["kind"] == "memory"}
    for rate, wanted in ((0.5, 0.4), (0.75, 0.6)):
        pair = peaks.get("all layers"), peaks.get(f"dropout {rate}")
        if pair[0] and pair[1]:
            saving = 1 - pair[1] / pair[0]
            found.append(
                Goal(
                    name=f"peak above the loaded model at rate {rate}",
                    wanted=f"{wanted:.0%} less",
                    found=f"{saving:.0%} less",
                    is_met=saving >= wanted,
                )
            )
    return found


def _goals_of(situation: str, own: Summary, *, is_of_loss: bool) -> list[Goal]:
    ratio, counted = own.against_best, f"{own.reached} of {own.seeds} seeds reach it"
    goals = [
        Goal(
            name=f"{situation}: time to target over the best that drops nothing (modelled)",
            wanted="1.3x",
            found=f"{ratio.value:.2f}x" if ratio else counted,
            is_met=ratio.value >= 1.3 if ratio else (False if own.reached < own.seeds else None),
        ),
        Goal(
            name=f"{situation}: strategy's share of the clients' time (measured)",
            wanted="< 5%",
            found=f"{own.strategy_share:.1%}",
            is_met=own.strategy_share < 0.05,
        ),
    ]
    if is_of_loss:
        return goals
    if own.final_difference is not None:
        value = own.final_difference.value
        goals.append(
            Goal(
                name=f"{situation}: final accuracy against {REFERENCE}",
                wanted="-1 point",
                found=f"{100 * value:+.1f} points",
                is_met=value >= -POINT,
            )
        )
    if own.worst_decile_difference is not None and situation != "alpha 10":
        value = own.worst_decile_difference.value
        goals.append(
            Goal(
                name=f"{situation}: worst decile of clients against {REFERENCE}",
                wanted="no worse",
                found=f"{100 * value:+.1f} points",
                is_met=value >= 0,
            )
        )
    return goals
