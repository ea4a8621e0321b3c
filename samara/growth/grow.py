"""Verb ``grow``: a trained model in, a larger one out that goes on training where it stood.

The run folder is that of a pretraining run (:mod:`samara.train.pretrain`), and holds besides

    race.json             every candidate of every stage: losses, ranks, costs, who won and why
    candidates/LABEL/     the trials of the last stage (:mod:`samara.growth.trial`)
    stages/N/             an earlier stage, with its own candidates/, checkpoints/ and metrics.jsonl

Nothing is remembered but what stands in files: run again, the race finds its measurements, takes
the same decisions, and goes on where it was interrupted.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from samara.data.prepare import open_corpus
from samara.errors import CheckpointError
from samara.growth.config import GrowConfig
from samara.growth.executor import Execute, on_ray, require_ray, sequential
from samara.growth.history import race_data, rung_lines, verdict_line
from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import check_growth
from samara.growth.proposals import propose
from samara.growth.selection import Failure, Measurement, Outcome, RaceRecord, run_race
from samara.growth.source import Source, open_source
from samara.growth.stages import GrowthStage, plan_stages
from samara.growth.trial import (
    EXACTNESS,
    LEAST_UNITS,
    Trial,
    TrialJob,
    loss_of_source,
    no_validation,
    run_trial,
)
from samara.measure.budget import budget
from samara.measure.devices import device_profile, estimated_cost
from samara.model.config import ModelConfig
from samara.progress import say
from samara.runs import Compute, RunFolder, read_json, write_bytes, write_json
from samara.train.memory import check_memory
from samara.train.origin import Origin
from samara.train.parallel import Place
from samara.train.pretrain import cache_folder, open_tokenizer, predict_memory, training_place


def grow_verb(config: GrowConfig, run: RunFolder) -> None:
    """Grow, race and train in ``run``; an interrupted run goes on.

    Raises:
        ConfigError: If source, target, operators, race and corpus do not fit together.
        CheckpointError: If the source, or what there is to go on from, is damaged.
        RaceError: If every candidate of a stage fails.
        DataError, ResourceError, NonFiniteLossError, Stopped: As in pretraining.
    """
    place = training_place(config.training)
    if config.executor == "ray":
        require_ray()
    corpus = open_corpus(config.data.corpus, cache=cache_folder())
    if not corpus.statistics["splits"]["validation"]["tokens"]:
        raise no_validation(corpus.folder)
    tokenizer = open_tokenizer(config.pretraining(config.model), corpus, run)
    source = open_source(config, corpus, tokenizer)
    stages = plan_stages(config, source.design)
    _check_memory(config, stages[-1], place)
    say(f"source {source.folder}: {source.data_note}")
    Growth(config, run, source=source, stages=stages, place=place).carry_out()


def _check_memory(config: GrowConfig, stage: GrowthStage, place: Place) -> None:
    settings = config.pretraining(stage.target)
    size = config.training.micro_batch_size or config.training.batch_size
    needed = predict_memory(settings, Origin(design=stage.target), place, micro_batch_size=size)
    check_memory(predicted=needed, device=place.device)


class Growth:
    """One run of the verb: stage after stage a race, then the winner's training."""

    def __init__(
        self,
        config: GrowConfig,
        run: RunFolder,
        *,
        source: Source,
        stages: Sequence[GrowthStage],
        place: Place,
    ) -> None:
        self.config, self.run, self.source = config, run, source
        self.stages, self.place = stages, place
        self.execute: Execute = sequential
        if config.executor == "ray":
            self.execute = functools.partial(on_ray, device=place.device)
        self.races: list[dict[str, Any]] = []
        self.losers = Compute()
        self.history: tuple[dict[str, Any], ...] = ()
        self.before: Path | None = None

    def carry_out(self) -> None:
        """Work off all stages."""
        design = self.source.design
        for planned in self.stages:
            stage = _following(planned, design)
            folder = self.run.path
            if not stage.is_last:
                folder = folder / "stages" / str(stage.number)
            winner = self._race(stage, folder)
            job = TrialJob(winner, RunFolder(folder), place=self.place)
            if job.state.step < stage.last_step:
                job.train(until=stage.last_step)
            if stage.is_last:
                job.growth_summary = self._summary()
                job.finish(beside=self.losers)
            self.before, self.history = folder, winner.growth
            design = check_growth(stage.source, stage.target, winner.operator).design

    def _race(self, stage: GrowthStage, folder: Path) -> Trial:
        """Find the stage's winner, and put its state where its training goes on."""
        contest = Contest(self, stage, folder)
        record = contest.run()
        self.losers += contest.spent_beside(record)
        winner = contest.trials[record.winner]
        _adopt(winner.folder, folder)
        for trial in contest.trials.values():
            shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
            shutil.rmtree(trial.folder / "averages", ignore_errors=True)
        return winner

    def write_race(self, race: Mapping[str, Any]) -> None:
        """Record the race of the stage in hand beside those before."""
        self.races = [*(r for r in self.races if r["stage"] != race["stage"]), dict(race)]
        write_json(
            self.run.path / "race.json",
            {"schema": 1, "source": str(self.source.folder), "stages": self.races},
        )

    def _summary(self) -> dict[str, Any]:
        """What the run's summary says of the growth."""
        batch_size = self.config.training.batch_size
        return {
            "source": str(self.source.folder),
            "first_row": self.source.first_batch(batch_size) * batch_size,
            "operators": [race["winner"] for race in self.races],
            "race_flops": sum(race["spent_flops"] for race in self.races),
            "beside_flops": self.losers.flops,
        }


def _following(stage: GrowthStage, design: ModelConfig) -> GrowthStage:
    """The stage on the design that the one before left, whose eps zero-padding may have scaled."""
    if stage.number == 1:
        return stage
    target = stage.target.model_copy(update={"rms_norm_eps": design.rms_norm_eps})
    return replace(stage, source=design, target=target)


def _adopt(trial: Path, folder: Path) -> None:
    """Move the winner's state and log to where its training goes on; again and again is once."""
    if (folder / "checkpoints").exists() or not (trial / "checkpoints").exists():
        return
    write_bytes(folder / "growth.json", (trial / "growth.json").read_bytes())
    write_bytes(folder / "metrics.jsonl", (trial / "metrics.jsonl").read_bytes())
    if (trial / "averages").exists():
        shutil.rmtree(folder / "averages", ignore_errors=True)
        shutil.copytree(trial / "averages", folder / "averages")
    os.replace(trial / "checkpoints", folder / "checkpoints")


class Contest:
    """The race of one stage: its trials, and how they are measured."""

    def __init__(self, growth: Growth, stage: GrowthStage, folder: Path) -> None:
        self.growth, self.stage, self.folder = growth, stage, folder
        self.trials = {label: self._trial(operator) for label, operator in stage.candidates.items()}
        self.proposed: dict[str, str] = {}
        self.loss_before = 0.0

    def _trial(self, operator: OperatorConfig) -> Trial:
        growth = self.growth
        return Trial(
            config=growth.config,
            source=growth.source,
            stage=self.stage,
            before=growth.before,
            history=growth.history,
            operator=operator,
            folder=self.folder / "candidates" / operator.label,
        )

    def run(self) -> RaceRecord:
        """Race; say what is found, and record it after every rung."""
        config, stage = self.growth.config, self.stage
        for label, reason in stage.left_out.items():
            say(f"stage {stage.number}: {label} does not fit and is left out: {reason}")
        for label, operator in stage.candidates.items():
            for warning in check_growth(stage.source, stage.target, operator).warnings:
                say(f"stage {stage.number}: {label}: {warning}")
        self.loss_before = self._loss_before()
        length = config.data.sequence_length
        costs = budget(stage.target)
        rates = config.training.layer_rates(stage.target.num_hidden_layers)
        per_token: float = costs.flops_per_token(length).training
        per_token -= costs.saved_flops_per_token(length, None if rates is None else rates.keep)
        record = run_race(
            list(self.trials),
            rule=config.race,
            horizon=stage.horizon,
            first=stage.first_rung,
            step_flops=per_token * length * config.training.batch_size,
            metric=None if config.metric == "auto" else config.metric,
            measure=self._measure,
            proposals=config.proposals,
            propose=self._propose,
            on_rung=self._tell,
        )
        self._record(record)
        if len(self.trials) > 1:
            say(f"stage {stage.number}: {verdict_line(record)}")
        return record

    def _loss_before(self) -> float:
        """The source's validation loss, measured once.

        Raises:
            CheckpointError: If the source is no more what it was when the race began.
        """
        path, known = self.folder / "candidates" / "source.json", self.growth.source.hash
        if not path.exists():
            trial = next(iter(self.trials.values()))
            loss = loss_of_source(trial, place=self.growth.place)
            write_json(path, {"loss": loss, "hash": known})
        recorded = read_json(path)
        if recorded["hash"] != known:
            raise CheckpointError(
                f"{self.folder}: its race began from another state of source "
                f"{self.growth.source.folder}; give another folder with --out"
            )
        return float(recorded["loss"])

    def _measure(self, names: Sequence[str], step: int) -> dict[str, Outcome]:
        """Take candidates to a rung; who failed once has failed."""
        outcomes: dict[str, Outcome] = {}
        going = {}
        for name in names:
            failed = self._failure(name)
            if failed is not None and failed["step"] <= step:
                outcomes[name] = Failure(reason=str(failed["reason"]))
            else:
                going[name] = functools.partial(
                    run_trial, self.trials[name], step=step, with_indicators=self._with_indicators
                )
        for name, outcome in self.growth.execute(going).items():
            outcomes[name] = outcome
            if isinstance(outcome, Failure):
                write_json(self._failure_path(name), {"step": step, "reason": outcome.reason})
        for name in names:
            self._say_outcome(name, step, outcomes[name])
        self._say_few_rows(outcomes, step)
        return outcomes

    def _failure_path(self, name: str) -> Path:
        return self.trials[name].folder / "failed.json"

    def _failure(self, name: str) -> dict[str, Any] | None:
        """At which rung and why a candidate failed before an interruption."""
        path = self._failure_path(name)
        return dict(read_json(path)) if path.exists() else None

    @property
    def _with_indicators(self) -> bool:
        return self.growth.config.metric in ("auto", "gradient_norm", "sharpness")

    def _say_outcome(self, name: str, step: int, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            say(f"stage {self.stage.number}: {name} is out: {outcome.reason}")
        elif step == 0:
            say(
                f"stage {self.stage.number}: {name}: loss {self.loss_before:.4f} before, "
                f"{outcome.losses.mean:.4f} after growth ({EXACTNESS[outcome.exactness]})"
            )

    def _say_few_rows(self, outcomes: Mapping[str, Outcome], step: int) -> None:
        rows = [len(o.losses.num_targets) for o in outcomes.values() if isinstance(o, Measurement)]
        if step == 0 and len(rows) > 1 and rows[0] < LEAST_UNITS:
            say(
                f"stage {self.stage.number}: candidates are compared on {rows[0]} validation rows, "
                f"all there are; {LEAST_UNITS} or more would tell them apart better"
            )

    def _propose(self, record: RaceRecord, count: int) -> list[str]:
        step = max(step for one in record.live for step in one.measured)
        losses = {one.name: one.measured[step].losses.mean for one in record.live}
        leader = min(losses, key=lambda name: (losses[name], name))
        found = propose(
            {name: trial.operator for name, trial in self.trials.items()},
            losses,
            leader=leader,
            source=self.stage.source,
            target=self.stage.target,
            count=count,
            has_moments=self.growth.source.checkpoint is not None or self.growth.before is not None,
        )
        for operator in found:
            say(f"stage {self.stage.number}: {operator.label} joins, as a neighbour of {leader}")
            self.trials[operator.label] = self._trial(operator)
            self.proposed[operator.label] = leader
        return [operator.label for operator in found]

    def _tell(self, record: RaceRecord) -> None:
        for line in rung_lines(record):
            say(f"stage {self.stage.number}: {line}")
        self._record(record)

    def _record(self, record: RaceRecord) -> None:
        self.growth.write_race(
            race_data(
                record,
                stage=self.stage,
                operators={name: trial.operator for name, trial in self.trials.items()},
                proposed=self.proposed,
                loss_before=self.loss_before,
                rule=self.growth.config.race,
                step_tokens=self.growth.config.training.batch_size
                * self.growth.config.data.sequence_length,
            )
        )

    def spent_beside(self, record: RaceRecord) -> Compute:
        """Compute of the race that is not part of the winner's training: trials lost, measuring."""
        profile = device_profile(
            self.growth.config.logging.device_profile, device=self.growth.place.device.type
        )
        losers = [
            one.last for n, one in record.entrants.items() if n != record.winner and one.measured
        ]
        seconds = sum(one.seconds for one in losers)
        winner = record.entrants[record.winner].last
        return Compute(
            tokens=sum(one.tokens for one in losers),
            flops=record.spent - winner.training_flops,
            seconds=seconds,
            joules=estimated_cost(profile, seconds=seconds).joules,
        )
