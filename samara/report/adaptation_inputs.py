"""What the page shows of fine-tuning and of a registry, read from their run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from samara.report.run_files import (
    Bounds,
    Point,
    Record,
    points_of,
    read_metrics,
    read_record,
    run_folder,
    said,
    state_of,
    timed,
    without_paths,
)
from samara.runs import RunFolder

# --- fine-tuning ----------------------------------------------------------------------------------


class TunedScore(Bounds):
    """A score, and which end of it is the good one."""

    better: Literal["higher", "lower"] | None


class TunedTask(Record):
    """What was learnt."""

    name: str
    kind: str


class TunedSeconds(Record):
    """Where the time went."""

    selection: float
    training: float
    scoring: float


class TunedResults(Record):
    """``results.json`` of a fine-tuning."""

    task: TunedTask
    method: str
    scores: dict[str, TunedScore] = Field(min_length=1)
    """The main one first."""
    base_scores: dict[str, TunedScore] | None
    num_items: PositiveInt
    left_out: NonNegativeInt = 0
    confidence: float
    train_loss: float | None
    validation_loss: float | None
    steps: NonNegativeInt
    tokens: NonNegativeInt
    flops: float
    seconds: TunedSeconds
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    optimizer_bytes: NonNegativeInt
    trained_parameters: PositiveInt
    parameters: PositiveInt
    storage_bytes: PositiveInt


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One fine-tuning run."""

    name: str
    color: int
    """Of its curve, within its task."""
    results: TunedResults | None
    note: str
    """What became of a run without results."""
    training: tuple[Point, ...]
    validation: tuple[Point, ...]


def read_tuned(folders: Mapping[str, str]) -> tuple[Tuned, ...]:
    """Read the runs that the report names.

    Raises:
        CheckpointError: If a folder does not exist, or a file in it is damaged.
    """
    found: list[Tuned] = []
    for name, folder in folders.items():
        run = RunFolder(run_folder(folder, f"finetuning.{name}"))
        path = run.path / "results.json"
        results = read_record(TunedResults, path) if path.exists() else None
        records = read_metrics(run)
        training = points_of(records, "loss")
        of_task = [r for r in found if results and r.results and r.results.task == results.task]
        found.append(
            Tuned(
                name=name,
                color=len(of_task) % 8,
                results=results,
                note="" if results else said(state_of(run, finished=False)),
                training=training,
                validation=timed(points_of(records, "validation_loss"), training),
            )
        )
    return tuple(found)


# --- audits ---------------------------------------------------------------------------------------


class AuditRow(Record):
    """One verdict."""

    suite: str
    before: float | None
    after: float | None
    ci_of_change: tuple[float, float] | None
    verdict: Literal["pass", "fail", "inconclusive"]


class AuditScope(Record):
    """What was looked at."""

    templates: str
    language: str
    attributes: tuple[str, ...]
    confidence: float
    unit: Literal["nats", "probability"] | None = None
    pairs_of_texts: NonNegativeInt | None = None
    prompts: NonNegativeInt | None = None
    pairs_of_wordings: NonNegativeInt | None = None
    batch_sizes: tuple[PositiveInt, ...] = ()
    repeats: PositiveInt | None = None
    extreme_inputs: NonNegativeInt | None = None
    other_seeds: NonNegativeInt | None = None


class AuditSummary(Record):
    """``summary.json`` of an audit."""

    identity: str
    audits: tuple[AuditRow, ...] = Field(min_length=1)
    scope: AuditScope


@dataclass(frozen=True, kw_only=True)
class AuditedModel:
    """One audit run."""

    name: str
    summary: AuditSummary | None
    note: str
    """What became of a run without a summary."""


def read_audited(folders: Mapping[str, str]) -> tuple[AuditedModel, ...]:
    """Read the audits that the report names.

    Raises:
        CheckpointError: If a folder does not exist, or a file in it is damaged.
    """
    found = []
    for name, folder in folders.items():
        run = RunFolder(run_folder(folder, f"audits.{name}"))
        path = run.path / "summary.json"
        summary = read_record(AuditSummary, path) if path.exists() else None
        note = "" if summary else said(state_of(run, finished=False))
        found.append(AuditedModel(name=name, summary=summary, note=note))
    return tuple(found)


# --- the registry ---------------------------------------------------------------------------------


class ReleasedScore(Record):
    """One score of a version."""

    task: str
    metric: str
    value: float
    ci: tuple[float, float] | None
    n: int | None


class ReleasedAudit(Record):
    """One audit of a version."""

    suite: str
    verdict: str


class ReleasedVersion(Record):
    """One version of a model line."""

    number: PositiveInt
    kind: str
    identity: str
    made_from: tuple[str, ...]
    files: dict[str, NonNegativeInt]
    """Name -> bytes."""
    evaluations: tuple[ReleasedScore, ...]
    audits: tuple[ReleasedAudit, ...]


class ReleaseEntry(Record):
    """One entry of the registry's log."""

    number: PositiveInt
    at: str
    actor: str
    action: str
    details: dict[str, Any]
    sha256: str


class Release(Record):
    """``summary.json`` of a release."""

    line: str
    versions: dict[str, ReleasedVersion] = Field(min_length=1)
    aliases: dict[str, PositiveInt]
    log: tuple[ReleaseEntry, ...]
    problems: tuple[str, ...]


def read_release(name: str | None) -> tuple[Release | None, str]:
    """The release that the report names, or why there is none.

    Raises:
        CheckpointError: If the folder does not exist, or its file is damaged.
    """
    if name is None:
        return None, ""
    folder = run_folder(name, "release")
    path = folder / "summary.json"
    if not path.exists():
        state = said(state_of(RunFolder(folder), finished=False))
        return None, f"The release has not finished yet ({without_paths(state)})."
    return read_record(Release, path), ""
