"""Growth of a model sharded by FSDP2 (``fully_shard``): full state out, full state in.

The first process gathers weights and moments on its CPU and grows them there; the larger model,
sharded in turn, takes them from it. All processes call both functions. The state is that of
``torch.distributed.checkpoint.state_dict``, by parameter names, so what a distributed checkpoint
holds goes the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


@dataclass(frozen=True, kw_only=True)
class FullState:
    """Weights and optimizer state as :class:`samara.growth.state.GrowthState` holds them.

    Empty on all processes but the first.

    Attributes:
        weights: By parameter name, a tied one once.
        optimizer: ``{parameter name}.{key}``.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> FullState:
    """Collect the full state of a sharded model on the first process.

    Args:
        model: After ``fully_shard``.
        optimizer: AdamW on its parameters, one that has taken a step.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    moments: Any = get_optimizer_state_dict(model, optimizer, options=options)
    names = {name for name, _ in model.named_parameters()}  # a tied one under its first name only
    return FullState(
        weights={name: weight for name, weight in weights.items() if name in names},
        optimizer={
            f"{name}.{key}": value
            for name, entries in moments.get("state", {}).items()
            for key, value in entries.items()
        },
    )


def scatter(state: FullState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a full state, which the first process has, into a sharded model and its optimizer.

    A parameter without entries starts afresh: with zero moments at step 0. The optimizer keeps the
    settings of its own groups.

    Args:
        state: From the first process; on the others it is not looked at.
        model: After ``fully_shard``, of the state's design.
        optimizer: AdamW on its parameters, new.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    if distributed.get_rank() == 0:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        every = model.named_parameters(remove_duplicate=False)
        weights = {name: state.weights[names[id(parameter)]] for name, parameter in every}
        moments = {
            "state": {name: _entries(state, name) for name in names.values()},
            "param_groups": [
                {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
                for group in optimizer.param_groups
            ],
        }
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, optimizer, moments, options=options)


def _entries(state: FullState, name: str) -> dict[str, Tensor]:
    weight = state.weights[name]
    fresh = {
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        "step": torch.tensor(0.0),
    }
    return {key: state.optimizer.get(f"{name}.{key}", value) for key, value in fresh.items()}
