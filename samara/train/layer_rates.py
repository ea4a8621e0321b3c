"""How often each layer is left out in training: the settings of layer dropout and their arithmetic.

Stochastic transformer layer dropout (STLD) is the part of DropPEFT (arXiv 2503.10217) that runs on
one machine; :mod:`samara.train.layer_dropout` applies it. The paper's abstract says that layers are
switched off at random by rates that are to be chosen; shapes, budget and scaling here are ours.

Names: L layers; P_l the rate at which layer l (from 1) is dropped; p their mean over all layers.
Plain Python, without numpy and torch: recipes are checked with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from samara.config import Config
from samara.errors import ConfigError
from samara.measure.budget import ActiveLayers

Shape = Literal["uniform", "incremental", "decay", "normal"]

LARGEST_RATE = 0.95
LARGEST_SCALED_RATE = 0.75
"""With 1 / (1 - P_l), so that no layer's branch is scaled by more than 4."""
NORMAL_WIDTH = 0.2
"""Standard deviation of the normal shape, in parts of the depth."""
CERTAIN = 1e-9
"""A layer that is kept with probability 1 up to this is always kept."""


class LayerDropoutConfig(Config):
    """STLD (DropPEFT, arXiv 2503.10217): randomly chosen layers are left out in training.

    A pass costs the time and the activations of the others only. Afterwards all are present.
    """

    rate: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Mean share of the layers that a pass leaves out."""
    shape: Shape = "incremental"
    """How the rate changes over depth: `incremental` grows linearly, `decay` falls, `normal` is
    largest in the middle."""
    gate: Literal["budgeted", "bernoulli"] = "budgeted"
    """`budgeted`: the same number of layers in every pass, so that the peak of memory is known.
    `bernoulli`: each layer by itself; memory is that of the worst pass."""
    scale: Literal["none", "inverse_keep", "survival_at_eval"] = "none"
    """What makes up for missing layers, on pre-norm models. `inverse_keep`: a layer that runs adds
    1 / (its probability to run) of its change. `survival_at_eval`: evaluation adds that
    probability of it (stochastic depth, arXiv 1603.09382); only where the model stays in hand."""
    protect_first: NonNegativeInt = 0
    """Layers at the bottom that always run."""
    protect_last: NonNegativeInt = 0
    """Layers at the top that always run."""
    max_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Largest rate of one layer. Left out: 0.95, with inverse_keep 0.75."""

    def rates(self, num_layers: int) -> LayerRates:
        """The rate of each layer of a model.

        Raises:
            ConfigError: If the rate is too large or too small for so many layers.
        """
        return layer_rates(self, num_layers)


@dataclass(frozen=True, kw_only=True)
class LayerRates:
    """What layer dropout does to a model of L layers.

    Attributes:
        drop: The rates P_l asked for; their mean is exactly the one of the settings.
        keep: Each layer's probability to run in a pass. Of a budgeted gate they add up to the
            budget, which is rounded to whole layers, so they are near 1 - P_l and not equal to it.
        budget: Layers that run in every pass; None: not the same number in every pass.
    """

    drop: tuple[float, ...]
    keep: tuple[float, ...]
    budget: int | None

    @property
    def mean_active(self) -> float:
        """Layers that run in a pass, on average."""
        return math.fsum(self.keep)

    @property
    def active_layers(self) -> ActiveLayers | None:
        """What a pass holds at most; None: all, as independent gates promise nothing less."""
        if self.budget is None:
            return None
        return ActiveLayers(count=self.budget, always=self.always)

    @property
    def always(self) -> frozenset[int]:
        """Layers that run in every pass, counted from 0."""
        return frozenset(layer for layer, keep in enumerate(self.keep) if keep == 1.0)


def layer_rates(config: LayerDropoutConfig, num_layers: int) -> LayerRates:
    """Spread the mean rate over the layers.

    P_l = min(c w_l, max_rate) on layers that are not protected, with the c that makes the mean over
    all layers p.

    Raises:
        ConfigError: If no such c exists, or if a budgeted gate would drop nothing.
    """
    protected = _protected(config, num_layers)
    free = [layer for layer in range(num_layers) if layer not in protected]
    largest = config.max_rate
    if largest is None:
        largest = LARGEST_SCALED_RATE if config.scale == "inverse_keep" else LARGEST_RATE
    wanted = config.rate * num_layers
    most = largest * len(free)
    if wanted > most * (1 + CERTAIN):
        raise ConfigError(
            f"layer_dropout.rate: {config.rate:g} is more than the {most / num_layers:.3g} that "
            f"{len(free)} of {num_layers} layers give at {largest:g} each; lower it, protect fewer "
            "layers, or raise layer_dropout.max_rate"
        )
    weights = [_weight(config.shape, layer + 1, num_layers) for layer in free]
    drop = [0.0] * num_layers
    for layer, rate in zip(
        free, _capped(weights, total=min(wanted, most), cap=largest), strict=True
    ):
        drop[layer] = rate
    if config.gate == "bernoulli":
        return LayerRates(drop=tuple(drop), keep=tuple(1 - rate for rate in drop), budget=None)
    # Half a layer runs: int() after adding a half, since round() would go to the even number.
    budget = max(1, len(protected), int(num_layers - math.fsum(drop) + 0.5 + CERTAIN))
    if config.rate > 0 and budget == num_layers:
        raise ConfigError(
            f"layer_dropout.rate: {config.rate:g} of {num_layers} layers rounds to no layer; use "
            f"{1 / num_layers:.2g} or more, or gate: bernoulli"
        )
    keep = [1.0] * num_layers
    moved = _shifted([1 - drop[layer] for layer in free], total=budget - len(protected))
    for layer, probability in zip(free, moved, strict=True):
        keep[layer] = probability
    return LayerRates(drop=tuple(drop), keep=tuple(keep), budget=budget)


def _protected(config: LayerDropoutConfig, num_layers: int) -> set[int]:
    first, last = config.protect_first, config.protect_last
    if first + last >= num_layers and config.rate > 0:
        raise ConfigError(
            f"layer_dropout.protect_first: {first} and protect_last {last} leave none of "
            f"{num_layers} layers to drop; protect fewer"
        )
    return {*range(min(first, num_layers)), *range(max(0, num_layers - last), num_layers)}


def _weight(shape: Shape, layer: int, depth: int) -> float:
    """Relative rate of a layer, counted from 1."""
    match shape:
        case "uniform":
            return 1.0
        case "incremental":
            return (2 * layer - 1) / depth
        case "decay":
            return (2 * (depth - layer) + 1) / depth
        case "normal":
            distance = (layer - (depth + 1) / 2) / (NORMAL_WIDTH * depth)
            return math.exp(-(distance**2) / 2)


def _capped(weights: Sequence[float], *, total: float, cap: float) -> list[float]:
    """min(c w, cap) for the c with the given sum: what exceeds the cap is spread over the others.

    Each round fixes the values over the cap for good, since c only grows: no search is needed.
    """
    values = [0.0] * len(weights)
    open_ = list(range(len(weights)))
    while open_:
        left = total - cap * (len(weights) - len(open_))
        factor = left / math.fsum(weights[i] for i in open_)
        over = [i for i in open_ if factor * weights[i] > cap]
        for i in over or open_:
            values[i] = cap if over else factor * weights[i]
        open_ = [i for i in open_ if i not in over] if over else []
    return values


def _shifted(values: Sequence[float], *, total: int) -> list[float]:
    """clip(v + d, 0, 1) for the d with the given sum, found as :func:`_capped` finds its factor.

    Multiplying all values by one number and clipping would miss the sum where one reaches 1.
    """
    result = list(values)
    open_ = list(range(len(values)))
    left = float(total)
    while open_:
        shift = (left - math.fsum(values[i] for i in open_)) / len(open_)
        bound = 1.0 if shift >= 0 else 0.0
        over = [i for i in open_ if abs(bound - values[i]) <= abs(shift) + CERTAIN]
        for i in over or open_:
            result[i] = bound if over else values[i] + shift
        left -= bound * len(over)
        open_ = [i for i in open_ if i not in over] if over else []
    return [1.0 if value > 1 - CERTAIN else value for value in result]
