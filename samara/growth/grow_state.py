"""Grow a model in training: weights and optimizer state of the larger one, as pure functions.

:func:`grow` is the only door. Depth comes first, layer by layer of the map; then each layer is
widened to its place in the target. Nothing of the source is changed or shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samara.errors import CheckpointError
from samara.growth.axes import Noise, grow_weight
from samara.growth.layer_map import LayerMap
from samara.growth.moments import grow_optimizer_entries
from samara.growth.operator_config import OperatorConfig
from samara.growth.parameters import GrownParameter, grown_parameters
from samara.growth.plan import Exactness, check_growth
from samara.growth.state import GrowthState
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM
from samara.train.checkpoint import named_weights


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A larger model.

    Attributes:
        state: The larger model in training.
        exactness: Whether it computes what the source does: ``exact`` bit for bit, ``tolerance`` up
            to rounding, or it ``changes``.
        layer_map: Where its layers come from.
        warnings: What the user should know, one sentence each.
    """

    state: GrowthState
    exactness: Exactness
    layer_map: LayerMap
    warnings: tuple[str, ...]


def grow(state: GrowthState, *, target: ModelConfig, operator: OperatorConfig, seed: int) -> Grown:
    """Make a larger model of a smaller one.

    Args:
        state: The smaller model.
        target: The larger design; ``vocab_size`` may be left out.
        operator: How.
        seed: Of fresh weights and noise, which depend on nothing else but target and operator.

    Raises:
        ConfigError: If this growth cannot be (:func:`samara.growth.plan.check_growth`).
        CheckpointError: If weights or optimizer state are not those of the design.
    """
    plan = check_growth(state.design, target, operator)
    parameters = list(grown_parameters(state.design, plan, operator))
    _check_state(state, parameters, operator)
    fresh = fresh_weights(plan.design, seed) if any(map(_needs_fresh, parameters)) else {}
    noise = None
    if operator.noise:
        generator = torch.Generator().manual_seed(seed)
        noise = Noise(strength=operator.noise, generator=generator)
    weights = {
        parameter.name: _grow_parameter(parameter, state.weights, fresh=fresh, noise=noise)
        for parameter in parameters
    }
    optimizer: dict[str, Tensor] | None = None
    if state.optimizer is not None:
        assert state.betas is not None
        optimizer = {
            f"{parameter.name}.{key}": value
            for parameter in parameters
            for key, value in grow_optimizer_entries(
                parameter, state.optimizer, operator=operator, betas=state.betas
            ).items()
        }
    return Grown(
        state=GrowthState(
            design=plan.design, weights=weights, optimizer=optimizer, betas=state.betas
        ),
        exactness=plan.exactness,
        layer_map=plan.layer_map,
        warnings=plan.warnings,
    )


def fresh_weights(design: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The weights of a design as its own initialisers draw them; the same on every machine.

    Drawn on the CPU; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamaraForCausalLM(SamaraConfig.from_design(design))
    return {name: weight.detach() for name, weight in named_weights(model).items()}


def _needs_fresh(parameter: GrownParameter) -> bool:
    return parameter.rule is None or parameter.rule.has_new_units


def _grow_parameter(
    parameter: GrownParameter,
    weights: Mapping[str, Tensor],
    *,
    fresh: Mapping[str, Tensor],
    noise: Noise | None,
) -> Tensor:
    if parameter.rule is None:
        like = next(iter(weights.values()))
        grown = fresh[parameter.name].to(like, copy=True)
    else:
        found = [weights[name] for name in parameter.sources]
        weight = found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)
        grown = grow_weight(
            weight.detach(), parameter.rule, fresh=fresh.get(parameter.name), noise=noise
        )
    return torch.zeros_like(grown) if parameter.is_zero else grown


def _check_state(
    state: GrowthState, parameters: list[GrownParameter], operator: OperatorConfig
) -> None:
    missing = [s for p in parameters for s in p.sources if s not in state.weights]
    if missing:
        raise CheckpointError(
            f"weights: lack {missing[0]}, which the design has; they are of another model"
        )
    if not state.optimizer and operator.moments != "reset":
        raise CheckpointError(
            f"optimizer state: is missing, and moments: {operator.moments} needs it; grow from a "
            "checkpoint that holds it, or set moments: reset"
        )
