"""Settings of verb `grow`: what grows into what, by which operators, and how one is chosen."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from samara.config import Config
from samara.data.config import DataConfig
from samara.data.objectives import CausalObjective, Objective
from samara.errors import ConfigError
from samara.growth.operator_config import OperatorConfig
from samara.model.config import ModelConfig
from samara.train.config import (
    CheckpointConfig,
    Cosine,
    LoggingConfig,
    Optimizer,
    PretrainConfig,
    Schedule,
    TrainingConfig,
    check_fits,
)


class FixedRace(Config):
    """All candidates train k steps, then the best goes on (LAG, arXiv 2406.02469)."""

    kind: Literal["fixed"] = "fixed"
    k: NonNegativeInt
    """Steps before the choice. 0: choose by the loss right after growth."""
    measurements: PositiveInt = 3
    """Losses are measured after k, k/2, k/4, … steps, so many times, for the record."""


class HalvingRace(Config):
    """Successive halving: at k0, 2·k0, 4·k0, … steps the worse half leaves."""

    kind: Literal["halving"] = "halving"
    cap: PositiveFloat
    """The most that all candidates together may spend, measuring included, as a share of the
    stage's training FLOPs."""
    first_rung: PositiveInt | None = None
    """k0. Left out: the warm-up, 1 / (1 - beta2), or 50, whichever is longest."""


class PairedRace(Config):
    """At k0, 2·k0, 4·k0, … steps those leave that cannot catch up with the leader any more."""

    kind: Literal["paired"] = "paired"
    cap: PositiveFloat
    """The most that all candidates together may spend, measuring included, as a share of the
    stage's training FLOPs. 0.1 costs little, but does no better than a fixed k of the same cost;
    0.25 to 0.5 leave room."""
    gamma: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.8
    """How fast gaps are expected to stop closing, per doubling of the steps. Lower: candidates are
    ruled out earlier. 0: no guard."""
    first_rung: PositiveInt | None = None
    """k0. Left out: the warm-up, 1 / (1 - beta2), or 50, whichever is longest."""


Race = Annotated[FixedRace | HalvingRace | PairedRace, Field(discriminator="kind")]


class ProposalsConfig(Config):
    """New candidates during the race: the leader with one thing changed, most promising first."""

    count: PositiveInt = 2
    """How many."""
    at_rung: PositiveInt = 1
    """After which rung, counted from 1; they train up to it and then race with the others."""


class StagesConfig(Config):
    """Successive growth: a race at every stage (adaptive gradual stacking)."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    """The models on the way to `model`, smallest first."""
    alpha: NonNegativeFloat = 1.0
    """PROP-alpha: stage i of the training steps gets a share of i^alpha. 0: equal shares."""
    rewarmup_steps: NonNegativeInt = 0
    """After each growth but the first, the learning rate climbs back to its schedule over so many
    steps."""


class GrowConfig(Config):
    """Verb `grow`: a trained model in, a larger one out that goes on training where it stood.

    Every candidate grows from the same checkpoint and trains on the same batches. The best goes on
    from its trial, with data order and schedule as if there had been no trial. Resumes by itself.
    """

    seed: NonNegativeInt = 0
    """Of the order of the data and of what growth draws. The source's own seed, on the source's
    corpus with its sequence length, lets the data go on where the source stopped."""
    source: str
    """A run folder of pretrain or grow (its newest checkpoint, with the optimizer's state),
    `stage:NAME`, or a model folder (then every candidate needs `moments: reset`)."""
    model: ModelConfig
    """The larger design."""
    stages: StagesConfig | None = None
    """Grow in several steps. Left out: at once."""
    candidates: tuple[OperatorConfig, ...] = Field(min_length=1)
    """The growth operators to choose from; one: no race."""
    race: Race | None = None
    """How one is chosen; needed where there is a choice. Losses are compared on the validation rows
    of training.evaluate_max_tokens, on 64 at least."""
    metric: Literal["auto", "loss", "extrapolation", "loss_drop", "gradient_norm", "sharpness"] = (
        "loss"
    )
    """What those that are left at the end of the race are ranked by. `auto`: the one that foretold
    later losses best in this race."""
    proposals: ProposalsConfig | None = None
    """Add candidates that early results suggest. Left out: none."""
    executor: Literal["sequential", "ray"] = "sequential"
    """`ray`: candidates side by side, one per device (extra `parallel`); the same results."""
    data: DataConfig
    objective: Objective = CausalObjective()
    """What the model learns to predict: as the source did."""
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    """Over all steps of this run, trials included."""
    training: TrainingConfig
    """The steps of the larger model, or over all stages."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.race is None and (len(self.candidates) > 1 or self.proposals is not None):
            raise ConfigError(
                f"race: is required to choose among {len(self.candidates)} candidates and their "
                "proposals, as {kind: fixed, k: 500} or {kind: paired, cap: 0.25}"
            )
        for number, operator in enumerate(self.candidates):
            same = [one.label for one in self.candidates[:number]]
            if operator.label in same:
                raise ConfigError(
                    f"candidates.{number}: is the same as candidates.{same.index(operator.label)} "
                    f"({operator.label}); remove one"
                )
        for model in self.targets:
            check_fits(model, data=self.data, objective=self.objective, training=self.training)
        return self

    @property
    def targets(self) -> tuple[ModelConfig, ...]:
        """The designs to grow to, one after the other."""
        return (*(self.stages.models if self.stages else ()), self.model)

    def pretraining(self, model: ModelConfig) -> PretrainConfig:
        """The same training as settings of verb `pretrain`."""
        return PretrainConfig(
            seed=self.seed,
            model=model,
            data=self.data,
            objective=self.objective,
            optimizer=self.optimizer,
            schedule=self.schedule,
            training=self.training,
            checkpoint=self.checkpoint,
            logging=self.logging,
        )

    def resolved(self) -> GrowConfig:
        """The same settings with every design expanded to one entry per layer."""
        stages = self.stages and self.stages.model_copy(
            update={"models": tuple(model.resolved() for model in self.stages.models)}
        )
        return self.model_copy(update={"model": self.model.resolved(), "stages": stages})
