"""The decision table for people: what ``benchmarks/results.py`` shows of a file of figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markdown_parts import Data, blocks, table

DASH = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with what stands over it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def section(files: Sequence[Data]) -> str:
    """The section of docs/results.md."""

    def show(data: Data) -> str:
        return "\n\n".join(
            f"**{found.title}**\n\n{table(found.header, found.rows)}" for found in tables(data)
        )

    return (
        "## Which method to adapt with\n\n"
        "Every method got as many learning rates, judged by validation loss; *(edge)*: the best\n"
        "was the first or last of them. Scores in points with 95 % intervals over rows and seeds;\n"
        "*no signal*: full fine-tuning gained less than 5 points over the base, so that the task\n"
        "tells no method from another; *return*: gain at its price less cost, over cost.\n\n"
        + blocks(files, show)
    )


def tables(data: Data) -> Iterator[Table]:
    """All tables of one file: the verdicts over all tasks, then four for each task."""
    summaries = [row for row in data["rows"] if row["kind"] == "summary"]
    yield _verdicts([row for row in data["rows"] if row["kind"] == "pooled"])
    for task in dict.fromkeys(row["task"] for row in summaries):
        own = [row for row in summaries if row["task"] == task]
        yield _quality(task, own)
        yield _expense(task, own)
        yield _ownership(task, own, data["settings"]["prices"])
        yield _audits(task, own)


def _verdicts(rows: Sequence[Data]) -> Table:
    def cells(row: Data) -> list[str]:
        against = row["against"]
        return [
            row["arm"],
            str(len(row["tasks"])),
            points(against.get("full")),
            row["verdict"],
            points(against.get("lora")),
        ]

    margin = f"{100 * rows[0]['margin']:.0f}" if rows else "1"
    header = ("method", "tasks", "against full, points", f"at {margin} point", "against LoRA")
    return Table(title="All tasks with a signal", header=header, rows=[cells(r) for r in rows])


def _quality(task: str, rows: Sequence[Data]) -> Table:
    names = list(rows[0]["scores"])
    signal = {True: "signal", False: "no signal", None: "full fine-tuning is not in"}
    title = (
        f"{task}: quality ({rows[0]['num_items']} rows, {rows[0]['num_seeds']} seeds, "
        f"{rows[0]['metric']} of the base {100 * rows[0]['base_score']:.1f}; "
        f"{signal[rows[0]['has_signal']]})"
    )
    header = ("method", "rate", *names, "against full", "spread of seeds", "equal answers")
    found = [
        [
            row["arm"],
            f"{row['lr']:g}{' (edge)' if row['is_at_edge'] else ''}",
            *(points(row["scores"][name], sign="") for name in names),
            points(row["against"].get("full")),
            f"{100 * row['spread_of_seeds']:.1f}",
            f"{row['agreement_of_seeds']:.0%}",
        ]
        for row in rows
    ]
    return Table(title=title, header=header, rows=found)


def _expense(task: str, rows: Sequence[Data]) -> Table:
    header = (
        "method",
        "weights trained",
        "selection, s",
        "training, s",
        "tokens/s",
        "peak memory, MB",
        "optimizer, MB",
        "stored, MB",
        "switch, ms",
    )
    found = [
        [
            row["arm"],
            f"{row['trained_parameters']:,.0f}",
            f"{row['selection_seconds']:.1f}",
            f"{row['training_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            _scaled(row["peak_memory_bytes"], 1e6, 0),
            _scaled(row["optimizer_bytes"], 1e6, 2),
            _scaled(row["storage_bytes"], 1e6, 2),
            _scaled(row["switch_seconds"], 1e-3, 1),
        ]
        for row in rows
    ]
    return Table(title=f"{task}: time, memory, storage", header=header, rows=found)


def _ownership(task: str, rows: Sequence[Data], prices: Data) -> Table:
    parts = ("training", "evaluation", "storage", "switching", "total")
    full = next((r["ownership"] for r in rows if r["arm"] == "full"), None)
    found = []
    for row in rows:
        sheet = row["ownership"]
        if sheet is None:
            found.append([row["arm"], *[DASH] * (len(parts) + 2)])
            continue
        share = sheet["total"] / full["total"] if full and full["total"] else None
        gain = sheet["return"]
        found.append(
            [
                row["arm"],
                *(f"{sheet[part]:,.2f}" for part in parts),
                DASH if share is None else f"{share:.0%}",
                DASH if gain is None else _range(gain, 1.0, 1, "+"),
            ]
        )
    header = ("method", *parts, "of full's", "return")
    title = f"{task}: cost of a version, {prices['currency']} (estimated from the price file)"
    return Table(title=title, header=header, rows=found)


def _audits(task: str, rows: Sequence[Data]) -> Table:
    def shown(audits: Sequence[Data], suite: str) -> str:
        own = [audit for audit in audits if audit["suite"] == suite]
        if not own:
            return DASH
        words = {audit["verdict"] for audit in own}
        word = next(w for w in ("fail", "inconclusive", "pass") if w in words)
        first = own[0]
        if first["before"] is None or first["after"] is None:
            return word
        return f"{first['after'] - first['before']:+.3f}, {word}"

    suites = ("bias", "stability", "stability/extremes", "forgetting")
    found = [[row["arm"], *(shown(row["audits"], suite) for suite in suites)] for row in rows]
    header = ("method", "bias gap", "likeness of wordings", "extreme inputs", "loss, nats")
    return Table(title=f"{task}: audits, change against the base", header=header, rows=found)


def points(bounds: Data | None, *, sign: str = "+") -> str:
    """A share and its interval in percentage points."""
    return DASH if bounds is None else _range(bounds, 100.0, 1, sign)


def _range(bounds: Data, scale: float, digits: int, sign: str) -> str:
    value, low, high = (bounds[name] for name in ("value", "low", "high"))
    text = f"{scale * value:{sign}.{digits}f}"
    if low is None or high is None:  # too few rows for an interval
        return text
    return f"{text} [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return DASH if value is None else f"{value / unit:,.{digits}f}"
