"""Pieces of Markdown that the sections of docs/results.md are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from record import without_json_option

Data = Mapping[str, Any]
"""One JSON file (:mod:`record`)."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(*files: Data) -> str:
    """What gave the figures of a table, in one line; several files are of one device."""
    machine = files[0]["environment"]
    threads = files[0].get("threads", machine.get("threads"))
    device = device_of(files[0])
    commits = dict.fromkeys(data["environment"]["commit"] or "not recorded" for data in files)
    parts = [
        ", ".join(_command(data, alone=len(files) == 1) for data in files),
        device if threads is None else f"{device} ({threads} torch threads)",
        f"torch {machine['packages']['torch']}",
        f"commit {', '.join(commits)}",
    ]
    if len(files) == 1 and not files[0].get("complete", True):
        parts.append("cut short: not all cases ran")
    return f"*{'; '.join(parts)}.*"


def device_of(data: Data) -> str:
    """What a benchmark ran on."""
    machine = data["environment"]
    return str(machine.get("device") or machine.get("cuda") or machine["cpu"])


def _command(data: Data, *, alone: bool) -> str:
    words = " ".join(without_json_option(data["command"].split()))
    was_cut = not alone and not data.get("complete", True)
    return f"`{words}`" + (" (cut short)" if was_cut else "")


def megabytes(value: float | None) -> str:
    """Bytes in MB; a dash where nothing was measured."""
    return "–" if value is None else f"{value / 1e6:,.0f}"


def error(predicted: float, measured: float) -> str:
    """How far a prediction is off, in percent of what was measured.

    A dash where that is nothing: a toy may fit into memory that its process held already.
    """
    if not measured:
        return "–"
    return f"{predicted / measured - 1:+.1%}".replace("-0.0%", "0.0%").replace("+0.0%", "0.0%")


def ratio(value: float, whole: float) -> str:
    """A part of a whole; a dash where there is none, as in :func:`error`."""
    return f"{value / whole:.2f}" if whole else "–"


def interval(bounds: Mapping[str, float], digits: int) -> str:
    """``value [low, high]``."""
    low, high = (f"{bounds[end]:.{digits}f}" for end in ("low", "high"))
    return f"{bounds['value']:.{digits}f} [{low}, {high}]"


def blocks(files: Iterable[Data], show: Callable[[Data], str]) -> str:
    """A table per file, each with where it comes from."""
    return "\n\n".join(f"{show(data)}\n\n{origin(data)}" for data in files)
