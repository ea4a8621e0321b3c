"""Scores of items as they are written, and the names of the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samara.adapt.config import FinetuneConfig, LabelsConfig
from samara.measure.task_metrics import METRICS, Item, Resampling, metric_interval
from samara.measure.task_scoring import task_metrics
from samara.runs import write_text

RESULTS, ITEMS = "results.json", "task_items.jsonl"
LABEL_METRICS = ("accuracy", "macro_f1", "macro_precision", "macro_recall")


def scores(config: FinetuneConfig, items: Sequence[Item]) -> dict[str, Any]:
    """The scores of items with their intervals, the main one first."""
    settings = config.task
    names = LABEL_METRICS if isinstance(settings, LabelsConfig) else task_metrics(settings)
    how = Resampling(confidence=config.confidence, seed=config.seed)
    found = {name: metric_interval(name, items, how) for name in names}
    return {
        name: {
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "better": METRICS[name].better,
        }
        for name, interval in found.items()
    }


def write_items(items: Sequence[Item], folder: Path) -> None:
    """Write ``task_items.jsonl``: one line a scored row."""
    lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
    write_text(folder / ITEMS, "".join(line + "\n" for line in lines))


def read_items(folder: Path) -> list[Item]:
    """Read what :func:`write_items` wrote."""
    found = []
    for line in (folder / ITEMS).read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        sums = {name: (top, bottom) for name, (top, bottom) in fields["sums"].items()}
        found.append(Item(**{**fields, "sums": sums, "gold": tuple(fields["gold"])}))
    return found
