"""Task results on disk, and as a table.

A results folder holds ``task_results.json``, the scores with all that they depend on, and
``task_items.jsonl``, one line per scored row: enough to compare with another model's, row by row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samara.errors import CheckpointError
from samara.measure.task_metrics import METRICS, Item
from samara.runs import read_json, write_json, write_text

RESULTS_FILE, ITEMS_FILE = "task_results.json", "task_items.jsonl"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """Scores of one model: the summary as it is saved, and the items of each task."""

    summary: Mapping[str, Any]
    items: Mapping[str, Sequence[Item]]


def write_results(results: TaskResults, folder: Path) -> None:
    """Write both files of a results folder."""
    lines = [
        json.dumps({"task": task, **asdict(item)}, ensure_ascii=False)
        for task, items in results.items.items()
        for item in items
    ]
    write_text(folder / ITEMS_FILE, "".join(line + "\n" for line in lines))
    write_json(folder / RESULTS_FILE, results.summary)


def read_results(folder: Path) -> TaskResults:
    """Read a results folder.

    Raises:
        CheckpointError: If it holds no complete results.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder}: holds no {RESULTS_FILE}; give a folder that an evaluation on tasks wrote"
        )
    summary = read_json(path)
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: is not of schema {SCHEMA}; evaluate the model again")
    items: dict[str, list[Item]] = defaultdict(list)
    try:
        text = (folder / ITEMS_FILE).read_text(encoding="utf-8")
        for line in text.split("\n"):
            if line:
                fields = json.loads(line)
                items[fields.pop("task")].append(_item(fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / ITEMS_FILE}: cannot be read ({error}); evaluate the model again"
        ) from error
    for name, task in summary["tasks"].items():
        if len(items[name]) != task["num_items"]:
            raise CheckpointError(
                f"{folder / ITEMS_FILE}: holds {len(items[name])} rows of {name}, "
                f"{RESULTS_FILE} says {task['num_items']}; evaluate the model again"
            )
    return TaskResults(summary=summary, items=dict(items))


def _item(fields: dict[str, Any]) -> Item:
    sums = {name: (float(top), float(bottom)) for name, (top, bottom) in fields["sums"].items()}
    return Item(**{**fields, "sums": sums, "gold": tuple(fields["gold"])})


# --- tables -----------------------------------------------------------------------------------


def task_table(summary: Mapping[str, Any]) -> str:
    """The results as plain text: one line per score, then averages and what was not run."""
    rows = [("task", "shots", "score", "value", f"{summary['confidence']:.0%} interval", "rows")]
    for name, task in summary["tasks"].items():
        for metric, score in task["scores"].items():
            first = metric == task["metric"]
            rows.append(
                (
                    name if first else "",
                    str(task["num_fewshot"]) if first else "",
                    metric + ("" if score["better"] != "neither" else " (higher is not better)"),
                    shown(metric, score["value"]),
                    shown_interval(metric, score),
                    str(task["num_items"]) if first else "",
                )
            )
    for name, average in summary["averages"].items():
        cells = shown("acc", average["value"]), shown_interval("acc", average)
        rows.append((name, "", "", *cells, ""))
    return "\n".join([text_table(rows, right=(1, 3, 5)), *_remarks(summary)])


def _remarks(summary: Mapping[str, Any]) -> list[str]:
    remarks = []
    for name, task in summary["tasks"].items():
        if task["num_truncated"]:
            remarks.append(
                f"{name}: {task['num_truncated']} of {task['num_items']} prompts were longer than "
                f"the model's context ({summary['model']['max_length']} tokens) and lost their "
                "beginning"
            )
        if task["num_items"] < task["num_rows"]:
            remarks.append(f"{name}: {task['num_items']} of {task['num_rows']} rows, evenly spread")
        if task["num_fewshot"] and task["fewshot_data"] is None:
            remarks.append(f"{name}: solved examples come from the scored rows")
    for name, average in summary["averages"].items():
        if average["missing"]:
            remarks.append(f"{name}: without {', '.join(average['missing'])}, not run")
    remarks += [f"not run: {name}: {reason}" for name, reason in summary["not_run"].items()]
    return remarks


def text_table(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> str:
    """Aligned columns under the first row; ``right`` names the columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def shown(metric: str, value: float | None) -> str:
    """A score for people: a share in percent, another number as it is."""
    if value is None:
        return "-"
    return f"{value:.3f}" if METRICS[metric].better == "lower" else f"{100 * value:.2f} %"


def shown_interval(metric: str, score: Mapping[str, float | None]) -> str:
    """The interval of a score for people; a dash where there are too few rows for one."""
    if score["low"] is None or score["high"] is None:
        return "-"
    return f"{shown(metric, score['low'])} to {shown(metric, score['high'])}"
