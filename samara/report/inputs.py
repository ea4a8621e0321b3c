"""What the page is made from: run folders read and checked, with what is missing said in words.

A file that is not there means that a stage has not run (yet); a file that cannot be read as what it
should be is an error that names it.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from samara.data.config import PrepareConfig
from samara.errors import CheckpointError
from samara.measure.budget import Budget, budget
from samara.model.config import ModelConfig
from samara.report.config import ReportConfig
from samara.runs import RunFolder, read_json

RecordT = TypeVar("RecordT", bound="Record")

_ABSOLUTE_PATH = re.compile(r"(?<![\w.~/])/(?:[^\s/:'\",]+/)+(?=[^\s/:'\",]+)")


class Record(BaseModel):
    """A file another stage wrote; keys that this page does not show are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Summary(Record):
    """``summary.json`` of a pretraining run."""

    parameters: PositiveInt
    embedding_parameters: NonNegativeInt
    flops_per_token: float
    steps: NonNegativeInt
    tokens: NonNegativeInt
    flops: float
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    mfu: float | None
    train_loss: float | None
    validation_loss: float | None
    energy_kwh: float | None
    cost: float | None
    currency: str
    device: str
    device_profile: str
    corpus_hash: str
    weights_hash: str
    design: ModelConfig


class Bounds(Record):
    """A value and its interval; the ends are None where there are too few documents for one."""

    value: float
    low: float | None
    high: float | None


class Sample(Record):
    """Text that a model wrote after a prompt."""

    prompt: str
    text: str


class Score(Record):
    """One model's part of ``results.json``."""

    weights_hash: str
    loss: Bounds
    perplexity: Bounds
    bits_per_byte: Bounds
    samples: tuple[Sample, ...] = ()


class Comparison(Record):
    """A model's loss minus the baseline's, on the same documents."""

    baseline: str
    model: str
    loss_difference: Bounds
    verdict: Literal["better", "worse", "unresolved"]


class EvaluatedObjective(Record):
    """What an evaluation's models were asked for; older results do not say: the next token."""

    objective: dict[str, Any] = {}


class Evaluation(Record):
    """``results.json`` of an evaluation."""

    corpus_hash: str
    split: str
    num_documents: NonNegativeInt
    num_tokens: NonNegativeInt
    confidence: float
    models: dict[str, Score] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()


class RaceCandidate(Record):
    """One candidate of a race between growth operators."""

    label: str
    layer_map: str
    exactness: Literal["exact", "tolerance", "changes"]
    proposed_from: str | None
    left_at: int | None
    failure: str | None
    losses: dict[int, float]
    """Validation loss by steps since growth."""
    flops: float


class RaceStage(Record):
    """One race of ``race.json``."""

    stage: PositiveInt
    steps: PositiveInt
    loss_before: float
    candidates: tuple[RaceCandidate, ...]
    settled_at: int | None
    k: NonNegativeInt
    k_tokens: NonNegativeInt
    k_share: float
    metric: str
    winner: str | None
    undecided: tuple[str, ...]
    spent_flops: float
    net_flops: float


class Races(Record):
    """``race.json`` of a growth."""

    stages: tuple[RaceStage, ...]


class SplitCounts(Record):
    """One split of a corpus."""

    documents: NonNegativeInt
    bytes: NonNegativeInt
    tokens: NonNegativeInt


class CorpusStatistics(Record):
    """What was counted while a corpus was prepared."""

    splits: dict[str, SplitCounts]
    dropped: dict[str, NonNegativeInt]
    """Documents read but not kept, by reason."""
    skipped: dict[str, NonNegativeInt] = {}
    """What was passed over before it became a document, by reason."""
    num_packages: NonNegativeInt
    packages: dict[str, NonNegativeInt]
    """Documents of the largest packages, largest first."""


class Corpus(Record):
    """``corpus.json`` of a prepared corpus."""

    hash: str
    vocab_size: PositiveInt
    statistics: CorpusStatistics
    settings: PrepareConfig


@dataclass(frozen=True, kw_only=True)
class Point:
    """A loss, and what had been spent by then."""

    step: int
    tokens: float
    flops: float
    seconds: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One pretraining run."""

    name: str
    index: int
    """Its place in the report: picks its colour everywhere."""
    run: RunFolder
    state: str
    """finished | running | stopped | failed | unfinished."""
    message: str
    """What the run said when it stopped or failed."""
    summary: Summary | None
    training: tuple[Point, ...]
    validation: tuple[Point, ...]
    environment: Mapping[str, Any]
    score: Score | None
    comparison: Comparison | None
    """Against the report's baseline, where the evaluation has it."""
    races: tuple[RaceStage, ...] = ()
    """Of a growth: how its operators were chosen."""
    total_flops: float = 0.0
    """Spent on the run, its trials and its ancestors; 0 until it has finished."""

    @functools.cached_property
    def budget(self) -> Budget | None:
        """Parameters and FLOPs, layer by layer."""
        return budget(self.summary.design) if self.summary else None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a section may show."""

    config: ReportConfig
    run: RunFolder
    arms: tuple[Arm, ...]
    evaluation: Evaluation | None
    evaluation_note: str
    """Why there is no evaluation; empty if there is one."""
    corpus: Corpus | None
    corpus_note: str

    @property
    def baseline(self) -> Arm | None:
        """The first arm."""
        return self.arms[0] if self.arms else None

    @property
    def finished(self) -> tuple[Arm, ...]:
        """The arms that have a summary."""
        return tuple(arm for arm in self.arms if arm.summary is not None)

    def shown_path(self, path: Path | str) -> str:
        """A path for the page: relative to the folder above the report's, never this machine's."""
        base = self.run.path.resolve().parent
        relative = Path(os.path.relpath(Path(path).resolve(), base))
        return relative.name if relative.parts[:1] == ("..",) else relative.as_posix()


def read_inputs(config: ReportConfig, run: RunFolder) -> Inputs:
    """Read everything that the report names.

    Raises:
        CheckpointError: If a folder does not exist, or a file in it is damaged.
    """
    evaluation, evaluation_note = _read_evaluation(config.evaluation)
    baseline = next(iter(config.pretraining), "")
    arms = tuple(
        _read_arm(name, index, folder, evaluation, baseline)
        for index, (name, folder) in enumerate(config.pretraining.items())
    )
    corpus, corpus_note = _read_corpus(config.corpus)
    return Inputs(
        config=config,
        run=run,
        arms=arms,
        evaluation=evaluation,
        evaluation_note=evaluation_note,
        corpus=corpus,
        corpus_note=corpus_note,
    )


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


def _folder(name: str, key: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise CheckpointError(f"report.{key}: {name}: no such folder; give a run folder")
    return path


def _read_evaluation(name: str | None) -> tuple[Evaluation | None, str]:
    if name is None:
        return None, "The report names no evaluation."
    folder = _folder(name, "evaluation")
    path = folder / "results.json"
    if not path.exists():
        state = _state(RunFolder(folder), finished=False)
        return None, f"The evaluation has no results yet ({_said(state)})."
    objective = read_record(EvaluatedObjective, path).objective.get("kind", "causal_lm")
    if objective != "causal_lm":
        return None, f"The evaluation is one of {objective}; its scores stand in {path.name}."
    return read_record(Evaluation, path), ""


def _read_corpus(name: str | None) -> tuple[Corpus | None, str]:
    if name is None:
        return None, "The report names no corpus."
    folder = _folder(name, "corpus")
    path = folder / "corpus.json"
    if not path.exists():
        state = _state(RunFolder(folder), finished=False)
        return None, f"The corpus is not prepared yet ({_said(state)})."
    return read_record(Corpus, path), ""


def _read_arm(
    name: str, index: int, folder: str, evaluation: Evaluation | None, baseline: str
) -> Arm:
    run = RunFolder(_folder(folder, f"pretraining.{name}"))
    path = run.path / "summary.json"
    summary = read_record(Summary, path) if path.exists() else None
    state = _state(run, finished=summary is not None)
    records = _read_metrics(run)
    training = _points(records, "loss")
    environment = run.path / "environment.json"
    score = evaluation.models.get(name) if evaluation else None
    compared = evaluation.comparisons if evaluation else ()
    return Arm(
        name=name,
        index=index,
        run=run,
        state=state["state"],
        message=without_paths(str(state.get("message", ""))),
        summary=summary,
        training=training,
        validation=_timed(_points(records, "validation_loss"), training),
        environment=dict(read_json(environment)) if environment.exists() else {},
        score=score,
        comparison=next(
            (c for c in compared if c.model == name and c.baseline == baseline),
            None,
        ),
        races=_read_races(run.path / "race.json"),
        total_flops=run.lineage().total.flops,
    )


def _read_races(path: Path) -> tuple[RaceStage, ...]:
    return read_record(Races, path).stages if path.exists() else ()


def _state(run: RunFolder, *, finished: bool) -> dict[str, Any]:
    return run.status() or {"state": "finished" if finished else "unfinished"}


def _said(state: Mapping[str, Any]) -> str:
    message = without_paths(str(state.get("message", "")))
    return f"{state['state']}: {message}" if message else str(state["state"])


def _read_metrics(run: RunFolder) -> list[dict[str, Any]]:
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


def _points(records: list[dict[str, Any]], key: str) -> tuple[Point, ...]:
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


def _timed(validation: tuple[Point, ...], training: tuple[Point, ...]) -> tuple[Point, ...]:
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
