"""Is model B better than model A, and by how much? The same rows, compared one by one.

For a score of zeros and ones McNemar's exact test decides: it counts only the rows on which the two
disagree, and holds for any number of rows. Other scores are decided by the paired bootstrap
interval of their difference. Differences come with that interval in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samara.errors import ConfigError
from samara.measure.compare import Interval
from samara.measure.task_metrics import (
    METRICS,
    Item,
    Resampling,
    mcnemar_p,
    paired_mean_over_tasks,
    paired_metric,
)
from samara.measure.task_results import TaskResults, read_results, text_table


def paired_report(a: Path, b: Path, *, confidence: float = 0.95) -> dict[str, Any]:
    """Compare the results folders of two models.

    Args:
        a: Results of the baseline.
        b: Results of the model that may be better.
        confidence: Of intervals and verdicts.

    Raises:
        CheckpointError: If a folder holds no complete results.
        ConfigError: If the two have no task in common, or were asked different things.
    """
    return compare_paired(read_results(a), read_results(b), confidence=confidence)


def compare_paired(
    results_a: TaskResults, results_b: TaskResults, *, confidence: float = 0.95
) -> dict[str, Any]:
    """Compare two models task by task, score by score; ``b - a`` throughout.

    Returns:
        Plain data. Per score: both values, ``difference`` (for a perplexity: of its logarithm) with
        its interval, ``mcnemar`` where the score is of zeros and ones, and the ``verdict`` on B:
        ``better``, ``worse``, ``unresolved``, or ``not ranked`` where neither way is better.

    Raises:
        ConfigError: If the two have no task in common, or were asked different things.
    """
    first, second = results_a.summary["tasks"], results_b.summary["tasks"]
    shared = [name for name in first if name in second]
    if not shared:
        raise ConfigError(
            f"the results of {results_a.summary['model']['path']} and "
            f"{results_b.summary['model']['path']} have no task in common"
        )
    for name in shared:
        _check_same(name, first[name], second[name])
    how = Resampling(confidence=confidence, seed=int(results_a.summary["seed"]))
    return {
        "schema": 1,
        "a": results_a.summary["model"],
        "b": results_b.summary["model"],
        "confidence": confidence,
        "tasks": {
            name: {
                "num_items": len(results_a.items[name]),
                "metric": first[name]["metric"],
                "scores": {
                    metric: _compare(metric, results_a.items[name], results_b.items[name], how)
                    for metric in first[name]["scores"]
                },
            }
            for name in shared
        },
        "average": _average(shared, results_a, results_b, how),
        "only_a": [name for name in first if name not in second],
        "only_b": [name for name in second if name not in first],
    }


def _check_same(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    if a["task_hash"] == b["task_hash"]:
        return
    causes = {
        "data": (a["data"]["hash"], b["data"]["hash"]),
        "num_fewshot": (a["num_fewshot"], b["num_fewshot"]),
        "number of rows": (a["num_items"], b["num_items"]),
    }
    changed = [cause for cause, (one, other) in causes.items() if one != other]
    what = " and ".join(changed) or "the task file, the solved examples or the seed"
    raise ConfigError(
        f"task '{name}': the two models were not asked the same ({what} differ); evaluate both "
        "with the same files and settings"
    )


def _compare(metric: str, a: Sequence[Item], b: Sequence[Item], how: Resampling) -> dict[str, Any]:
    difference = paired_metric(metric, b, a, how)
    record: dict[str, Any] = {
        "difference": _bounds(difference),
        "better": METRICS[metric].better,
        "mcnemar": None,
    }
    p = None
    if METRICS[metric].kind == "binary":
        only_b = sum(y.scores[metric] > x.scores[metric] for x, y in zip(a, b, strict=True))
        only_a = sum(x.scores[metric] > y.scores[metric] for x, y in zip(a, b, strict=True))
        p = mcnemar_p(only_b, only_a)
        record["mcnemar"] = {"only_a": only_a, "only_b": only_b, "p": p}
    record["verdict"] = _verdict(metric, difference, p)
    return record


def _verdict(metric: str, difference: Interval, p: float | None) -> str:
    better = METRICS[metric].better
    if better == "neither":
        return "not ranked"
    sign = 1.0 if better == "higher" else -1.0
    if p is not None:
        if p > 1 - difference.confidence:
            return "unresolved"
        return "better" if sign * difference.value > 0 else "worse"
    if difference.low <= 0 <= difference.high:
        return "unresolved"
    return "better" if sign * difference.value > 0 else "worse"


def _average(
    shared: Sequence[str], a: TaskResults, b: TaskResults, how: Resampling
) -> dict[str, Any] | None:
    """The mean difference over the tasks whose main score is a share that should be high."""
    metrics = {name: str(a.summary["tasks"][name]["metric"]) for name in shared}
    ranked = [
        name
        for name in shared
        if METRICS[metrics[name]].better == "higher" and METRICS[metrics[name]].kind != "classes"
    ]
    if len(ranked) < 2:
        return None
    difference = paired_mean_over_tasks(
        [(metrics[name], b.items[name]) for name in ranked],
        [(metrics[name], a.items[name]) for name in ranked],
        how,
    )
    return {
        "tasks": ranked,
        "difference": _bounds(difference),
        "verdict": _verdict("f1", difference, None),
    }


def _bounds(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def paired_table(report: Mapping[str, Any]) -> str:
    """A comparison as plain text: one line per score, B against A."""
    rows = [("task", "score", "B - A", f"{report['confidence']:.0%} interval", "p", "B is")]
    for name, task in report["tasks"].items():
        for metric, score in task["scores"].items():
            test = score["mcnemar"]
            rows.append(
                (
                    name if metric == task["metric"] else "",
                    metric,
                    *_cells(metric, score["difference"]),
                    "" if test is None else f"{test['p']:.3g}",
                    score["verdict"],
                )
            )
    average = report["average"]
    if average is not None:
        cells = _cells("f1", average["difference"])
        rows.append((f"average of {len(average['tasks'])}", "", *cells, "", average["verdict"]))
    remarks = [
        f"A: {report['a']['path']}",
        f"B: {report['b']['path']}",
        "pt: percentage points; ln: difference of logarithms; p: McNemar's exact test",
    ]
    for side in ("a", "b"):
        if report[f"only_{side}"]:
            remarks.append(f"only {side.upper()} has {', '.join(report[f'only_{side}'])}")
    return "\n".join([text_table(rows, right=(2, 4)), *remarks])


def _cells(metric: str, difference: Mapping[str, float]) -> tuple[str, str]:
    """A difference and its interval, in the unit of the score."""
    scale, unit = {"exp_ratio": (1.0, " ln"), "ratio": (1.0, "")}.get(
        METRICS[metric].kind, (100.0, " pt")
    )
    value, low, high = (scale * difference[name] for name in ("value", "low", "high"))
    return f"{value:+.2f}{unit}", f"{low:+.2f} to {high:+.2f}{unit}"
