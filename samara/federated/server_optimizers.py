"""What the server does with the mean of a round: take it, or step along it.

FedAdam, FedYogi and FedAdagrad (Reddi et al., arXiv 2003.00295) take the mean change Δ of a round
for the negative gradient of an optimizer on the server:

    m <- β1 m + (1 - β1) Δ                      FedAdagrad: β1 = 0
    v <- β2 v + (1 - β2) Δ²                     FedAdam
    v <- v - (1 - β2) Δ² sign(v - Δ²)           FedYogi
    v <- v + Δ²                                 FedAdagrad
    θ <- θ + η m / (√v + τ)

with η of FedAdam corrected for the bias of the moments. Operations, their order and their precision
are those of Flower's strategies of the same names, which demand the same tensors of all clients;
where every layer is sent in every round the results are equal bit for bit. Here a layer that nobody
sent keeps its value, its moments and its count of steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samara.federated.aggregation import Layout, Tensor
from samara.federated.methods_config import FedAdagrad, FedAdam, FedAvg, FedYogi, ServerUpdate


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What an optimizer of the server remembers; never changed in place.

    Attributes:
        mean, square: First and second moment by tensor name; a tensor without any is at zero.
        steps: Of each group of tensors, how often it was updated.
    """

    mean: Mapping[str, Tensor] = field(default_factory=dict)
    square: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The moments under names of their own, for a file."""
        return {
            **{f"{prefix}.mean/{name}": value for name, value in self.mean.items()},
            **{f"{prefix}.square/{name}": value for name, value in self.square.items()},
        }

    @classmethod
    def of(cls, prefix: str, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> Moments:
        """Put together what :meth:`tensors` gave, and the steps beside it."""
        return cls(
            mean=strip(f"{prefix}.mean/", tensors),
            square=strip(f"{prefix}.square/", tensors),
            steps=dict(steps),
        )


def strip(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def update(
    config: ServerUpdate,
    moments: Moments,
    *,
    previous: Mapping[str, Tensor],
    averaged: Mapping[str, Tensor],
    sent: Collection[str],
    layout: Layout,
) -> tuple[dict[str, Tensor], Moments]:
    """The new values after a round, and the new moments.

    Args:
        config: Which optimizer.
        moments: As after the last round.
        previous: The values that the clients were given.
        averaged: The mean of what they sent; the old value where nobody sent one.
        sent: Groups that somebody sent.
        layout: Which tensor is of which group.
    """
    if isinstance(config, FedAvg):
        return dict(averaged), moments
    values = dict(averaged)
    mean, square, steps = dict(moments.mean), dict(moments.square), dict(moments.steps)
    for group in sent:
        steps[group] = steps.get(group, 0) + 1
    for name, group in layout.groups.items():
        if group not in sent:
            continue
        change = averaged[name] - previous[name]
        zero = np.zeros_like(change)
        beta = 0.0 if isinstance(config, FedAdagrad) else config.betas[0]
        mean[name] = beta * mean.get(name, zero) + (1 - beta) * change
        square[name] = _square(config, square.get(name, zero), change)
        rate = _rate(config, steps[group])
        stepped: Any = previous[name] + rate * mean[name] / (np.sqrt(square[name]) + config.tau)
        values[name] = stepped.astype(np.float32)
    return values, Moments(mean=mean, square=square, steps=steps)


def _square(config: FedAdam | FedYogi | FedAdagrad, old: Tensor, change: Tensor) -> Tensor:
    """The second moment."""
    new: Tensor
    match config:
        case FedAdam():
            new = config.betas[1] * old + (1 - config.betas[1]) * (change**2)
        case FedYogi():
            new = old - (1.0 - config.betas[1]) * (change**2) * np.sign(old - change**2)
        case FedAdagrad():
            new = old + (change**2)
    return new


def _rate(config: FedAdam | FedYogi | FedAdagrad, step: int) -> Any:
    """The learning rate of a step, counted from 1.

    Flower's exponent is the round plus one, with rounds from 1: so it is here.
    """
    if not isinstance(config, FedAdam):
        return config.lr
    first, second = config.betas
    root = np.sqrt(1 - np.power(second, step + 1.0))
    return config.lr * root / (1 - np.power(first, step + 1.0))
