"""Grow a model in training: weights and optimizer state of the larger one, as pure functions.

:func:`grow` is the only door. Depth comes first, layer by layer of the map; then each layer is
widened to its place in the target. Nothing of the source is changed or shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samara.errors import CheckpointError
from samara.growth.axes import Noise, grow_weight
from samara.growth.layer_map import LayerMap
from samara.growth.moments import grow_optimizer
from samara.growth.operator_config import OperatorConfig
from samara.growth.parameters import GrownParameter, grown_parameters
from samara.growth.plan import Exactness, check_growth
from samara.growth.state import GrowthState
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.stored_model import expected_tensors
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
    _check_state(state, operator)
    parameters = list(grown_parameters(state.design, plan, operator))
    needs_fresh = any(parameter.needs_fresh for parameter in parameters)
    fresh = fresh_weights(plan.design, seed) if needs_fresh else {}
    weights = grow_weights(parameters, state.weights, fresh=fresh, operator=operator, seed=seed)
    optimizer: dict[str, Tensor] | None = None
    if state.optimizer is not None:
        assert state.betas is not None
        optimizer = grow_optimizer(
            parameters, state.optimizer, operator=operator, betas=state.betas
        )
    grown = GrowthState(design=plan.design, weights=weights, optimizer=optimizer, betas=state.betas)
    return Grown(
        state=grown,
        exactness=plan.exactness,
        layer_map=plan.layer_map,
        warnings=plan.warnings,
    )


def grow_weights(
    parameters: Sequence[GrownParameter],
    weights: Mapping[str, Tensor],
    *,
    fresh: Mapping[str, Tensor],
    operator: OperatorConfig,
    seed: int,
) -> dict[str, Tensor]:
    """Make the larger model's weights, on storage of their own and in the dtype they had.

    Args:
        parameters: The larger model's.
        weights: The smaller model's, by name.
        fresh: The larger model's as initialised; only those that have new entries are needed.
        operator: Which noise is added.
        seed: Of the noise.
    """
    noise = None
    if operator.noise:
        noise = Noise(operator.noise, generator=torch.Generator().manual_seed(seed))
    like = next(iter(weights.values()))
    grown: dict[str, Tensor] = {}
    for parameter in parameters:
        name, found = parameter.name, [weights[source].detach() for source in parameter.sources]
        if parameter.rule is None:
            grown[name] = fresh[name].to(like, copy=True)
        else:
            weight = found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)
            grown[name] = grow_weight(weight, parameter.rule, fresh=fresh.get(name), noise=noise)
        if parameter.is_zero:
            grown[name].zero_()
    return grown


def fresh_weights(design: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The weights of a design as its own initialisers draw them; the same on every machine.

    Drawn on the CPU; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        model = SamaraForCausalLM(SamaraConfig.from_design(design))
    return {name: weight.detach() for name, weight in named_weights(model).items()}


def _check_state(state: GrowthState, operator: OperatorConfig) -> None:
    wanted = expected_tensors(SamaraConfig.from_design(state.design))
    for name in [*wanted, *state.weights]:
        if name not in wanted or name not in state.weights:
            problem = "lack" if name in wanted else "hold"
            raise CheckpointError(
                f"weights: {problem} {name}, unlike the design; they are of another model"
            )
        shape, there = wanted[name].shape, tuple(state.weights[name].shape)
        if shape != there:
            raise CheckpointError(
                f"weights: {name} has shape {there}, the design asks for {shape}; they are of "
                "another model"
            )
    if not state.optimizer and operator.moments != "reset":
        raise CheckpointError(
            f"optimizer state: is missing, and moments: {operator.moments} needs it; grow from a "
            "checkpoint that holds it, or set moments: reset"
        )
