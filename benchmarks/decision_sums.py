"""Sums over the runs of the decision table: scores with intervals, differences, cost, verdicts.

Rows of kind ``summary`` hold one method on one task, those of kind ``pooled`` one method over all
tasks on which full fine-tuning gained :data:`SIGNAL` over the base; a method is compared with full
fine-tuning there at a margin of :data:`MARGIN`. Intervals are over rows and seeds
(:mod:`samara.measure.seeds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from samara.adapt.results import read_items
from samara.measure.compare import Interval
from samara.measure.ownership import Prices, return_on_investment, version_cost
from samara.measure.seeds import (
    agreement,
    non_inferiority,
    pooled_difference,
    score_over_seeds,
    score_table,
    spread,
)
from samara.measure.task_metrics import Item, Resampling

SUMS = ("summary", "pooled")
SIGNAL, MARGIN = 0.05, 0.01
HOW = Resampling()

Row = Mapping[str, Any]
Runs = list[list[Item]]


def sums(
    rows: Sequence[Row],
    out: Path,
    best: Mapping[tuple[str, str], float],
    *,
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[float]],
    prices: Prices,
) -> Iterator[dict[str, Any]]:
    """All sums that the finished runs allow.

    Args:
        rows: Of the runs.
        out: Their folders.
        best: (task, arm) -> learning rate.
        seeds: That a method must have run with to be summed up.
        rates: By arm, the learning rates tried.
        prices: For the ownership sheet.
    """
    items: dict[tuple[str, str], Runs] = {}
    chosen: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = (row["task"], row["arm"])
        is_best = row["kind"] == "run" and best.get(key) == row["lr"]
        is_best = is_best and row["seed"] in seeds
        if (row["kind"] == "base" or is_best) and (out / row["name"]).exists():
            items.setdefault(key, []).append(read_items(out / row["name"]))
            chosen.setdefault(key, []).append(row)
    whole = {key for key, own in chosen.items() if len(own) == len(seeds)}
    for task, arm in best:
        if (task, arm) in whole and (task, "base") in items:
            own = chosen[task, arm]
            audits = [
                row
                for row in rows
                if row["kind"] == "audit"
                and (row["task"], row["arm"], row["lr"]) == (task, arm, best[task, arm])
            ]
            yield {
                "name": f"summary {task} {arm}",
                "kind": "summary",
                "task": task,
                "arm": arm,
                "lr": best[task, arm],
                "is_at_edge": best[task, arm] in (min(rates[arm]), max(rates[arm])),
                "num_seeds": len(own),
                **_quality(task, arm, items, whole, next(iter(own[0]["scores"]))),
                **_expense(own, audits),
                **_ownership(own, audits, _gain(task, arm, items, own), prices),
                "audits": [audit for row in audits for audit in row["audits"]],
            }
    yield from _pooled(items, whole, {key: own[0]["scores"] for key, own in chosen.items()})


def _quality(
    task: str,
    arm: str,
    items: Mapping[tuple[str, str], Runs],
    whole: set[tuple[str, str]],
    metric: str,
) -> dict[str, Any]:
    runs = items[task, arm]
    table = score_table(metric, runs)
    against = {
        other: bounds(_difference(metric, runs, items[task, other]))
        for other in ("base", "full", "lora")
        if other != arm and (other == "base" or (task, other) in whole)
    }
    has_signal = None
    if (task, "full") in whole:
        has_signal = _signal(metric, items[task, "full"], items[task, "base"])
    return {
        "metric": metric,
        "num_items": len(runs[0]),
        "scores": {name: bounds(score_over_seeds(name, runs, HOW)) for name in _metrics(runs)},
        "base_score": float(score_table(metric, items[task, "base"]).mean()),
        "against": against,
        "has_signal": has_signal,
        "spread_of_seeds": spread(table),
        "agreement_of_seeds": agreement(runs),
    }


def _metrics(runs: Runs) -> list[str]:
    """The scores of the items; of labels the macro averages, too."""
    names = list(runs[0][0].scores)
    if names == ["accuracy"]:
        names += ["macro_recall", "macro_f1"]
    return names


def _signal(metric: str, full: Runs, base: Runs) -> bool:
    """Whether full fine-tuning gained enough for the others to be told apart."""
    return _difference(metric, full, base).value >= SIGNAL


def _difference(metric: str, runs: Runs, others: Runs) -> Interval:
    return pooled_difference([score_table(metric, runs)], [score_table(metric, others)], HOW)


def _gain(
    task: str, arm: str, items: Mapping[tuple[str, str], Runs], own: Sequence[Row]
) -> Interval:
    metric = next(iter(own[0]["scores"]))
    return _difference(metric, items[task, arm], items[task, "base"])


def _expense(own: Sequence[Row], audits: Sequence[Row]) -> dict[str, Any]:
    """Means over the seeds; of memory the most."""
    figures: dict[str, Any] = {
        name: fmean(row[name] for row in own)
        for name in ("tokens_per_second", "optimizer_bytes", "storage_bytes", "trained_parameters")
    }
    peaks = [row["peak_memory_bytes"] for row in own if row["peak_memory_bytes"] is not None]
    figures["peak_memory_bytes"] = max(peaks, default=None)
    for name in ("selection", "training", "scoring"):
        figures[f"{name}_seconds"] = fmean(row["seconds"][name] for row in own)
    figures["switch_seconds"] = _switch(audits)
    return figures


def _switch(audits: Sequence[Row]) -> float | None:
    return next((row["switch_seconds"] for row in audits if "switch_seconds" in row), None)


def _ownership(
    own: Sequence[Row], audits: Sequence[Row], gain: Interval, prices: Prices
) -> dict[str, Any]:
    """Money for one version; None as long as the switching time is not measured."""
    switch = _switch(audits)
    if switch is None:
        return {"ownership": None}
    seconds = {name: fmean(row["seconds"][name] for row in own) for name in own[0]["seconds"]}
    cost = version_cost(
        prices,
        training_seconds=seconds["selection"] + seconds["training"],
        evaluation_seconds=seconds["scoring"] + max(row["wall"] for row in audits),
        storage_bytes=fmean(row["storage_bytes"] for row in own),
        switch_seconds=switch,
    )
    found = return_on_investment(gain, cost, prices)
    return {
        "ownership": {
            "currency": prices.currency,
            "training": cost.training,
            "evaluation": cost.evaluation,
            "storage": cost.storage,
            "switching": cost.switching,
            "total": cost.total,
            "return": None if found is None else bounds(found),
        }
    }


def _pooled(
    items: Mapping[tuple[str, str], Runs],
    whole: set[tuple[str, str]],
    scores: Mapping[tuple[str, str], Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Every method against full fine-tuning and LoRA, over the tasks with a signal."""
    tasks = [
        task
        for task, arm in sorted(whole)
        if arm == "full"
        and (task, "base") in items
        and _signal(next(iter(scores[task, arm])), items[task, arm], items[task, "base"])
    ]
    for arm in dict.fromkeys(arm for _, arm in items if arm not in ("base", "full")):
        shared = [task for task in tasks if (task, arm) in whole]
        row: dict[str, Any] = {
            "name": f"pooled {arm}",
            "kind": "pooled",
            "task": "",
            "arm": arm,
            "tasks": shared,
            "margin": MARGIN,
            "against": {},
            "verdict": "no signal",
        }
        for other in ("full", "lora"):
            both = [task for task in shared if (task, other) in whole and other != arm]
            if both:
                metrics = [next(iter(scores[task, arm])) for task in both]
                difference = pooled_difference(
                    [score_table(m, items[t, arm]) for m, t in zip(metrics, both, strict=True)],
                    [score_table(m, items[t, other]) for m, t in zip(metrics, both, strict=True)],
                    HOW,
                )
                row["against"][other] = bounds(difference)
                if other == "full":
                    row["verdict"] = non_inferiority(difference, MARGIN)
        yield row


def bounds(interval: Interval) -> dict[str, float]:
    """An interval as plain data."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}
