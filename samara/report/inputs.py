"""What the page is made from: run folders read and checked, with what is missing said in words."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from samara.data.config import PrepareConfig
from samara.measure.budget import Budget, budget
from samara.model.config import ModelConfig
from samara.report.adaptation_inputs import (
    AuditedModel,
    Release,
    Tuned,
    read_audited,
    read_release,
    read_tuned,
)
from samara.report.config import ReportConfig
from samara.report.federation_inputs import Federation, read_federations
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
from samara.runs import Compute, RunFolder, read_json


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

    objective: dict[str, Any] = Field(default_factory=dict)


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
    skipped: dict[str, NonNegativeInt] = Field(default_factory=dict)
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
    total: Compute = field(default_factory=Compute)
    """Spent on the run, its trials and its ancestors; zeros until it has finished."""

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the run, its trials and its ancestors."""
        return self.total.flops

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
    tuned: tuple[Tuned, ...]
    """The fine-tuning runs."""
    audited: tuple[AuditedModel, ...]
    federations: tuple[Federation, ...]
    release: Release | None
    release_note: str

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
    release, release_note = read_release(config.release)
    return Inputs(
        config=config,
        run=run,
        arms=arms,
        evaluation=evaluation,
        evaluation_note=evaluation_note,
        corpus=corpus,
        corpus_note=corpus_note,
        tuned=read_tuned(config.finetuning),
        audited=read_audited(config.audits),
        federations=read_federations(config.federated),
        release=release,
        release_note=release_note,
    )


def _read_evaluation(name: str | None) -> tuple[Evaluation | None, str]:
    if name is None:
        return None, "The report names no evaluation."
    folder = run_folder(name, "evaluation")
    path = folder / "results.json"
    if not path.exists():
        state = state_of(RunFolder(folder), finished=False)
        return None, f"The evaluation has no results yet ({said(state)})."
    objective = read_record(EvaluatedObjective, path).objective.get("kind", "causal_lm")
    if objective != "causal_lm":
        return None, f"The evaluation is one of {objective}; its scores stand in {path.name}."
    return read_record(Evaluation, path), ""


def _read_corpus(name: str | None) -> tuple[Corpus | None, str]:
    if name is None:
        return None, "The report names no corpus."
    folder = run_folder(name, "corpus")
    path = folder / "corpus.json"
    if not path.exists():
        state = state_of(RunFolder(folder), finished=False)
        return None, f"The corpus is not prepared yet ({said(state)})."
    return read_record(Corpus, path), ""


def _read_arm(
    name: str, index: int, folder: str, evaluation: Evaluation | None, baseline: str
) -> Arm:
    run = RunFolder(run_folder(folder, f"pretraining.{name}"))
    path = run.path / "summary.json"
    summary = read_record(Summary, path) if path.exists() else None
    state = state_of(run, finished=summary is not None)
    records = read_metrics(run)
    training = points_of(records, "loss")
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
        validation=timed(points_of(records, "validation_loss"), training),
        environment=dict(read_json(environment)) if environment.exists() else {},
        score=score,
        comparison=next(
            (c for c in compared if c.model == name and c.baseline == baseline),
            None,
        ),
        races=_read_races(run.path / "race.json"),
        total=run.lineage().total,
    )


def _read_races(path: Path) -> tuple[RaceStage, ...]:
    return read_record(Races, path).stages if path.exists() else ()
