"""Files of run folders, read and checked: what they lack is said in words.

A file that is not there means that a stage has not run (yet); a file that cannot be read as what it
should be is an error that names it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from samara.errors import CheckpointError
from samara.runs import RunFolder, read_json

RecordT = TypeVar("RecordT", bound="Record")

_ABSOLUTE_PATH = re.compile(r"(?<![\w.~/])/(?:[^\s/:'\",]+/)+(?=[^\s/:'\",]+)")


class Record(BaseModel):
    """A file another stage wrote; keys that this page does not show are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Bounds(Record):
    """A value and its interval; the ends are None where there are too few documents for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss, and what had been spent by then."""

    step: int
    tokens: float
    flops: float
    seconds: float
    loss: float


def read_record(record_type: type[RecordT], path: Path) -> RecordT:
    """Read a JSON file another stage wrote.

    Raises:
        CheckpointError: If it is missing, not JSON, or lacks something.
    """
    data = read_json(path)
    try:
        return record_type.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(
            f"{path}: {where}: {first['msg'].lower()}; the file is damaged or of another version, "
            "run its stage again"
        ) from None


def without_paths(text: str) -> str:
    """``text`` with the folders of absolute paths left out: a page is given to others."""
    return _ABSOLUTE_PATH.sub("…/", text)


def run_folder(name: str, key: str) -> Path:
    """A folder that the report names.

    Raises:
        CheckpointError: If it does not exist.
    """
    path = Path(name)
    if not path.is_dir():
        raise CheckpointError(f"report.{key}: {name}: no such folder; give a run folder")
    return path


def state_of(run: RunFolder, *, finished: bool) -> dict[str, Any]:
    """The recorded status, or a guess by whether there is a result."""
    return run.status() or {"state": "finished" if finished else "unfinished"}


def said(state: Mapping[str, Any]) -> str:
    """A status in words."""
    message = without_paths(str(state.get("message", "")))
    return f"{state['state']}: {message}" if message else str(state["state"])


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``.

    Raises:
        CheckpointError: If a line before the last is damaged (the last may be cut off by a crash).
    """
    records = run.metrics()
    if not run.metrics_path.exists():
        return records
    lines = run.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(records) < len(lines) - 1:
        raise CheckpointError(
            f"{run.metrics_path}: line {len(records) + 1} is not JSON; the file is damaged, "
            "run its stage again"
        )
    return records


def points_of(records: list[dict[str, Any]], key: str) -> tuple[Point, ...]:
    """The finite losses called ``key``, in order."""
    points = []
    for record in records:
        loss = record.get(key)
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            points.append(
                Point(
                    step=int(record.get("step", 0)),
                    tokens=float(record.get("tokens", 0)),
                    flops=float(record.get("flops", 0)),
                    seconds=float(record.get("seconds") or 0.0),
                    loss=float(loss),
                )
            )
    return tuple(points)


def timed(validation: tuple[Point, ...], training: tuple[Point, ...]) -> tuple[Point, ...]:
    """Give validation points, which record no time, the training time at their tokens."""
    start = Point(step=0, tokens=0, flops=0, seconds=0, loss=0)
    known = [start, *training]
    return tuple(
        Point(
            step=point.step,
            tokens=point.tokens,
            flops=point.flops,
            seconds=_seconds_at(point.tokens, known),
            loss=point.loss,
        )
        for point in validation
    )


def _seconds_at(tokens: float, known: list[Point]) -> float:
    for before, after in itertools.pairwise(known):
        if before.tokens <= tokens <= after.tokens and after.tokens > before.tokens:
            share = (tokens - before.tokens) / (after.tokens - before.tokens)
            return before.seconds + share * (after.seconds - before.seconds)
    return known[-1].seconds
