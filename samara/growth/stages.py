"""The stages of a growth, from the settings and the source's design: all checked before any work.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from samara.errors import ConfigError
from samara.growth.config import FixedRace, GrowConfig
from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import check_growth
from samara.growth.race import first_rung, stage_steps
from samara.growth.selection import rungs_of
from samara.model.config import ModelConfig
from samara.train.config import AdamW
from samara.train.schedule import warmup_steps


@dataclass(frozen=True, kw_only=True)
class GrowthStage:
    """One growth and the training after it.

    Attributes:
        number: Counted from 1.
        is_last: Whether the run ends with it.
        source: The design it grows from, expanded.
        target: The design it grows to, expanded.
        first_step: Steps of the run before it.
        last_step: Steps of the run at its end.
        rewarmup_steps: Over which the learning rate climbs back.
        first_rung: The first comparison where the race names none.
        candidates: The operators that fit, by label.
        left_out: Why others do not, by label.
    """

    number: int
    is_last: bool
    source: ModelConfig
    target: ModelConfig
    first_step: int
    last_step: int
    rewarmup_steps: int
    first_rung: int
    candidates: Mapping[str, OperatorConfig]
    left_out: Mapping[str, str]

    @property
    def horizon(self) -> int:
        """Steps of this stage."""
        return self.last_step - self.first_step


def plan_stages(config: GrowConfig, source: ModelConfig) -> tuple[GrowthStage, ...]:
    """Lay out the run.

    Raises:
        ConfigError: If a stage has no step or no candidate that fits, a candidate fits no stage
            (with a single stage: the reason), or the race does not fit the steps.
    """
    total = config.training.num_steps(config.data.sequence_length)
    targets = [_expanded(target, source) for target in config.targets]
    alpha = config.stages.alpha if config.stages else 1.0
    lengths = stage_steps(total, stages=len(targets), alpha=alpha)
    if min(lengths) < 1:
        raise ConfigError(
            f"stages: {total} steps leave none for one of {len(targets)} stages; raise "
            "training.max_steps, or lower stages.alpha"
        )
    stages: list[GrowthStage] = []
    for number, (target, length) in enumerate(zip(targets, lengths, strict=True), start=1):
        design = stages[-1].target if stages else source
        first = stages[-1].last_step if stages else 0
        fitting, left_out = _fitting(config, design, target)
        warmup = config.stages.rewarmup_steps if config.stages and stages else 0
        stages.append(
            GrowthStage(
                number=number,
                is_last=number == len(targets),
                source=design,
                target=target,
                first_step=first,
                last_step=first + length,
                rewarmup_steps=warmup,
                first_rung=first_rung(
                    warmup_steps=warmup
                    if stages
                    else warmup_steps(config.schedule, num_steps=total),
                    beta2=_beta2(config),
                ),
                candidates=fitting,
                left_out=left_out,
            )
        )
    _check_candidates(config, stages)
    for stage in stages:
        _check_race(config, stage)
    return tuple(stages)


def _check_candidates(config: GrowConfig, stages: Sequence[GrowthStage]) -> None:
    """Each fits somewhere, and each stage has one that fits."""
    if len(stages) > 1:
        for stage in stages:
            if not stage.candidates:
                label, reason = next(iter(stage.left_out.items()))
                raise ConfigError(
                    f"candidates: none fits stage {stage.number} of {len(stages)}; {label}: "
                    f"{reason}"
                )
    for number, operator in enumerate(config.candidates):
        if all(operator.label in stage.left_out for stage in stages):
            reason = stages[0].left_out[operator.label]
            raise ConfigError(f"candidates.{number} ({operator.label}): {reason}")


def _expanded(target: ModelConfig, source: ModelConfig) -> ModelConfig:
    return target.expand(vocab_size=None if target.vocab_size else source.vocab_size)


def _fitting(
    config: GrowConfig, source: ModelConfig, target: ModelConfig
) -> tuple[dict[str, OperatorConfig], dict[str, str]]:
    fitting, left_out = {}, {}
    for operator in config.candidates:
        try:
            check_growth(source, target, operator)
        except ConfigError as error:
            left_out[operator.label] = str(error)
        else:
            fitting[operator.label] = operator
    return fitting, left_out


def _beta2(config: GrowConfig) -> float:
    optimizer = config.optimizer
    return optimizer.betas[1] if isinstance(optimizer, AdamW) else optimizer.adamw_betas[1]


def _check_race(config: GrowConfig, stage: GrowthStage) -> None:
    where = f"stage {stage.number} of {len(config.targets)}"
    race, proposals = config.race, config.proposals
    if race is None:
        return
    if isinstance(race, FixedRace) and race.k > stage.horizon:
        raise ConfigError(
            f"race.k: {race.k} exceeds the {stage.horizon} steps of {where}; lower it, or raise "
            "training.max_steps"
        )
    rungs = rungs_of(race, horizon=stage.horizon, first=stage.first_rung)
    if not isinstance(race, FixedRace) and not rungs:
        first = race.first_rung or stage.first_rung
        raise ConfigError(
            f"race.first_rung: the first comparison is after {first} steps, {where} has "
            f"{stage.horizon}; lower it, or raise training.max_steps"
        )
    if proposals is not None and proposals.at_rung > len(rungs):
        raise ConfigError(
            f"proposals.at_rung: {proposals.at_rung} exceeds the {len(rungs)} rungs of {where}; "
            "lower it"
        )
