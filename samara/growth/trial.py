"""One candidate: grown from the source, trained to a rung, measured there.

A trial is a run folder of its own. What growth gave is its first checkpoint, so that from there on
it is a pretraining job like any other: interrupted it goes on from its newest checkpoint, and when
it has won, its checkpoints move up and the job goes on to the end as if nothing had been.

    candidates/LABEL/
        growth.json           the operator, its layer map, exactness, warnings
        checkpoints/          the state; removed when another candidate has won
        metrics.jsonl         the log, its losses included
        rungs/00000064.json   what was measured after 64 steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samara.data.prepare import open_corpus
from samara.data.rows import Batch, Rows
from samara.data.training_data import CorpusData
from samara.errors import ConfigError
from samara.growth.config import GrowConfig
from samara.growth.grow_state import grow
from samara.growth.indicators import landscape
from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import check_growth
from samara.growth.race import Losses
from samara.growth.selection import Measurement
from samara.growth.source import Source, checkpoint_state, growth_state, newest_checkpoint
from samara.growth.stages import GrowthStage
from samara.growth.state import GrowthState
from samara.measure.loss import evaluate_loss, rows_within
from samara.model.config import ModelConfig
from samara.runs import RunFolder, hash_json, read_json, write_bytes, write_json
from samara.train.checkpoint import TrainingState, named_weights
from samara.train.objective import make_objective
from samara.train.origin import LanguageModel, Origin
from samara.train.parallel import Place, choose_place, uncompiled
from samara.train.pretrain import Job, cache_folder, open_tokenizer

LEAST_UNITS = 64
"""Rows that candidates are compared on, at least, where the validation split has so many."""
INDICATOR_ROWS = 16
"""Rows that gradient norm and sharpness are measured on."""
EXACTNESS = ("exact", "tolerance", "changes")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a candidate is made of: plain data, so that another process can train it.

    Attributes:
        config: The recipe.
        source: What the run started from.
        stage: Which growth this is.
        before: Folder of the stage before, whose newest checkpoint grows; None: the source does.
        history: Settings of the growths before this one.
        operator: How it grows.
        folder: Where it keeps everything.
    """

    config: GrowConfig
    source: Source
    stage: GrowthStage
    before: Path | None
    history: tuple[dict[str, Any], ...]
    operator: OperatorConfig
    folder: Path

    @property
    def growth(self) -> tuple[dict[str, Any], ...]:
        """Settings of all growths up to this one."""
        own = {
            "operator": self.operator.model_dump(mode="json"),
            "target": self.stage.target.model_dump(mode="json"),
            "step": self.stage.first_step,
            "seed": self.config.seed,
        }
        return (*self.history, own)

    def rung_path(self, step: int) -> Path:
        """Where the measurement after ``step`` steps is kept."""
        return self.folder / "rungs" / f"{step:08d}.json"

    def grown_from(self) -> tuple[GrowthState, TrainingState]:
        """The state to grow, and where the run stands."""
        optimizer = self.config.optimizer
        if self.before is None:
            state = growth_state(
                self.source.checkpoint, self.source.folder, self.stage.source, optimizer
            )
            return state, TrainingState()
        checkpoint = newest_checkpoint(self.before)
        assert checkpoint is not None, "a stage ends with a checkpoint"
        stood = checkpoint_state(checkpoint)
        assert stood.step == self.stage.first_step, "stages follow each other"
        return growth_state(checkpoint, self.before, self.stage.source, optimizer), stood


class TrialJob(Job):
    """The training of a grown model, which remembers its validation losses row by row."""

    def __init__(self, trial: Trial, run: RunFolder, *, place: Place) -> None:
        """Open a trial, in its own folder or in that of the run it won; grow it if it is new."""
        config = trial.config
        corpus = open_corpus(config.data.corpus, cache=cache_folder())
        settings = config.pretraining(trial.stage.target)
        data = CorpusData(
            corpus,
            config.data,
            objective=config.objective,
            tokenizer=open_tokenizer(settings, corpus, run),
            seed=config.seed,
        )
        self.trial = trial
        self.first_batch = trial.source.first_batch(config.training.batch_size)
        self.growth_summary: dict[str, Any] = {}
        self.measured: tuple[int, Losses] | None = None
        micro_batch_size = config.training.micro_batch_size or config.training.batch_size
        super().__init__(settings, run, data, _origin(trial), place, micro_batch_size)
        if self.validation_set is None:
            raise no_validation(corpus.folder)
        self.evaluation_rows = _first_rows(self.validation_set, config)
        if self.checkpoints.newest() is None:
            self._grow()
        self.resume()

    def _grow(self) -> None:
        """Make the first checkpoint: the grown state, at the step where the source's run stood."""
        state, stood = self.trial.grown_from()
        grown = grow(
            state,
            target=self.trial.stage.target,
            operator=self.trial.operator,
            seed=self.trial.config.seed,
        )
        put_weights(self.model, grown.state)
        self.optimizer.load_state_dict(grown.state.optimizer or {})
        if self.trial.before is not None:  # the log goes on where that of the stage before ends
            write_bytes(self.run.metrics_path, _metrics_of(self.trial.before))
        write_json(
            self.run.path / "growth.json",
            {
                "schema": 1,
                "label": self.trial.operator.label,
                "operator": self.trial.operator.model_dump(mode="json"),
                "layer_map": str(grown.layer_map),
                "exactness": grown.exactness,
                "warnings": list(grown.warnings),
            },
        )
        self.checkpoints.save(self.model, self.optimizer, stood)

    def _learning_rate(self, step: int) -> float:
        """The schedule's rate; after a later growth, climbing back to it."""
        rate, warmup = super()._learning_rate(step), self.trial.stage.rewarmup_steps
        since = step - self.trial.stage.first_step
        return rate * min(1.0, (since + 1) / (warmup + 1))

    def evaluate(self) -> float:
        """Validation loss of the weights as they are, kept row by row."""
        losses = row_losses(
            self.model,
            self.evaluation_rows,
            self.micro_batch_size,
            self.place,
            self.config.training.precision,
        )
        self.measured = (self.state.step, losses)
        return losses.mean

    def measure(self, *, start: TrainingState, with_indicators: bool) -> Measurement:
        """What there is to say of the weights as they are.

        Args:
            start: Where the run stood at the growth.
            with_indicators: Also look at the landscape.
        """
        if self.measured is None or self.measured[0] != self.state.step:
            self.evaluate()
        assert self.measured is not None
        rows, length = self.evaluation_rows, self.config.data.sequence_length
        flops, costs = self.budget.flops_per_token(length), self._costs()
        measuring = float(len(rows) * length * flops.forward)
        indicators: dict[str, float] = {}
        if with_indicators:
            batches = self._indicator_batches()
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            measuring += tokens * (flops.training + 2.0 * flops.forward)
            with uncompiled(self.model):
                indicators = landscape(
                    self.model,
                    optimizer=self.optimizer,
                    objective=make_objective(self.corpus.objective, z_loss=0.0),
                    batches=batches,
                    precision=self.config.training.precision,
                    lr=self.config.optimizer.lr,
                )
        plan = check_growth(self.trial.stage.source, self.trial.stage.target, self.trial.operator)
        return Measurement(
            losses=self.measured[1],
            flops_per_step=costs.flops_per_token * self.config.training.batch_size * length,
            training_flops=self.state.flops - start.flops,
            measuring_flops=measuring,
            tokens=self.state.tokens - start.tokens,
            seconds=self.state.seconds - start.seconds,
            exactness=EXACTNESS.index(plan.exactness),
            indicators=indicators,
        )

    def _indicator_batches(self) -> Sequence[Batch]:
        rows, size = min(INDICATOR_ROWS, len(self.evaluation_rows)), self.micro_batch_size
        return [
            self.evaluation_rows.batch(range(start, min(start + size, rows)))
            for start in range(0, rows, size)
        ]

    def _summary(self, averaged: float | None) -> dict[str, Any]:
        return {**super()._summary(averaged), "growth": self.growth_summary}


class RowUnits(Rows):
    """The first rows of a data set, each of them a unit of comparison."""

    def __init__(self, rows: Rows, number: int) -> None:
        self._rows, self._number = rows, number
        self.sequence_length = rows.sequence_length

    def __len__(self) -> int:
        return self._number

    def batch(self, rows: Sequence[int]) -> Batch:
        return self._rows.batch(rows)


def run_trial(trial: Trial, *, step: int, with_indicators: bool) -> Measurement:
    """Take a candidate to ``step`` steps after growth and measure it; found again if it is there.

    Raises:
        The errors of :func:`samara.train.pretrain.pretrain`.
    """
    path = trial.rung_path(step)
    if path.exists():
        return read_measurement(path)
    job = TrialJob(trial, RunFolder(trial.folder), place=choose_place(trial.config.training.device))
    until = trial.stage.first_step + step
    if job.state.step < until:
        job.train(until=until)
    start = TrainingState() if trial.before is None else _stood(trial.before)
    measurement = job.measure(start=start, with_indicators=with_indicators)
    write_json(path, _plain(measurement))
    return measurement


def row_losses(
    model: LanguageModel, rows: Rows, batch_size: int, place: Place, precision: Any
) -> Losses:
    """Validation losses by row."""
    with uncompiled(model):
        result = evaluate_loss(
            model, rows, batch_size=batch_size, device=place.device, precision=precision
        )
    return Losses(nll_sum=result.nll_sum, num_targets=result.num_targets.astype(np.float64))


def loss_of_source(trial: Trial, *, place: Place) -> float:
    """Validation loss of the source as it is, on the rows that its candidates are measured on."""
    config = trial.config
    corpus = open_corpus(config.data.corpus, cache=cache_folder())
    data = CorpusData(
        corpus,
        config.data,
        objective=config.objective,
        tokenizer=open_tokenizer(
            config.pretraining(trial.stage.source), corpus, RunFolder(trial.folder)
        ),
        seed=config.seed,
    )
    validation = data.validation_rows()
    if validation is None:
        raise no_validation(corpus.folder)
    state, _ = trial.grown_from()
    model = Origin(design=state.design).build(data.objective, data.tokenizer)
    put_weights(model, state)
    model.to(place.device)  # type: ignore[arg-type] # transformers wraps it untyped
    return row_losses(
        model,
        _first_rows(validation, config),
        config.training.micro_batch_size or config.training.batch_size,
        place,
        config.training.precision,
    ).mean


def put_weights(model: LanguageModel, state: GrowthState) -> None:
    """Copy weights into a model of their design."""
    weights = named_weights(model)
    assert weights.keys() == state.weights.keys(), "weights are those of the design"
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(state.weights[name])


def no_validation(corpus: Path) -> ConfigError:
    """What to say where there is nothing to compare candidates on."""
    return ConfigError(
        f"data.corpus: {corpus} has no validation text, and candidates are compared on it; set "
        "split.validation_fraction, or give validation_paths"
    )


def read_measurement(path: Path) -> Measurement:
    """Read what :func:`run_trial` wrote."""
    data = dict(read_json(path))
    losses = Losses(
        nll_sum=np.asarray(data.pop("nll_sum"), dtype=np.float64),
        num_targets=np.asarray(data.pop("num_targets"), dtype=np.float64),
    )
    return Measurement(losses=losses, **data)


def _plain(measurement: Measurement) -> dict[str, Any]:
    losses = measurement.losses
    fields = {key: value for key, value in asdict(measurement).items() if key != "losses"}
    return {
        **fields,
        "nll_sum": losses.nll_sum.tolist(),
        "num_targets": losses.num_targets.tolist(),
    }


def _origin(trial: Trial) -> Origin:
    design: ModelConfig = check_growth(
        trial.stage.source, trial.stage.target, trial.operator
    ).design
    return Origin(
        design=design,
        parents={"source": trial.source.hash, "growth": hash_json(list(trial.growth))},
        inherited=trial.source.inherited,
    )


def _first_rows(validation: Rows, config: GrowConfig) -> RowUnits:
    wanted = rows_within(validation, config.training.evaluate_max_tokens)
    return RowUnits(validation, min(len(validation), max(LEAST_UNITS, wanted)))


def _metrics_of(folder: Path) -> bytes:
    path = RunFolder(folder).metrics_path
    return path.read_bytes() if path.exists() else b""


def _stood(folder: Path) -> TrainingState:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None, "a stage ends with a checkpoint"
    return checkpoint_state(checkpoint)
