"""New candidates during a race: the leader with one thing changed, by what early rungs show.

A growth operator is a layer map, what new layers put out, and what the moments do. The neighbours
of the leader differ from it in one of the three; of the layer maps those come first that differ in
fewest layers. What a change is worth is read off the race: the mean difference in loss between
candidates that differ in just that. Promising changes come first, then unknown ones; changes that
did harm are not proposed.

This goes beyond the paper (arXiv 2406.02469), whose pool is fixed. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from samara.errors import ConfigError
from samara.growth.layer_map import LayerMap
from samara.growth.operator_config import (
    Average,
    Block,
    Depth,
    First,
    Fit,
    Interpose,
    Last,
    LlamaPro,
    Middle,
    OperatorConfig,
    RandomInterleaved,
    RandomTop,
    Solar,
    Stack,
)
from samara.growth.plan import check_growth, layer_widths
from samara.model.config import ModelConfig

Factor = Literal["new_layers", "moments", "depth"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
MOMENTS: tuple[Literal["map", "copy", "zero", "reset"], ...] = ("map", "copy", "zero", "reset")

Change = tuple[Factor, str, str]
"""A factor, its value before and after."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An operator that differs from the leader in one thing.

    Attributes:
        operator: Its settings.
        change: What differs.
        distance: Layers whose source differs; 0 where the layer map is the same.
    """

    operator: OperatorConfig
    change: Change
    distance: int


def propose(
    pool: Mapping[str, OperatorConfig],
    losses: Mapping[str, float],
    *,
    leader: str,
    source: ModelConfig,
    target: ModelConfig,
    count: int,
    has_moments: bool,
) -> list[OperatorConfig]:
    """The most promising neighbours of the leader that are not in the race.

    Args:
        pool: All candidates so far, by label.
        losses: Of those that were measured at the latest rung, by label.
        leader: The label of the best.
        source: The design that grows, expanded.
        target: The design it grows to.
        count: The most to propose.
        has_moments: Whether the source has an optimizer state; without one, moments stay reset.
    """
    known = {_what_it_does(operator, source, target) for operator in pool.values()}
    effects = _effects(pool, losses)
    found: list[tuple[tuple[float, float, int, str], OperatorConfig]] = []
    for one in _neighbours(pool[leader], source, target, has_moments=has_moments):
        what = _what_it_does(one.operator, source, target)
        effect = effects.get(one.change)
        if what in known or (effect is not None and effect > 0.0):
            continue
        known.add(what)
        order = (
            0.0 if effect is not None else 1.0,
            effect or 0.0,
            FACTORS.index(one.change[0]) + one.distance,
            one.operator.label,
        )
        found.append((order, one.operator))
    found.sort(key=lambda item: item[0])
    return [operator for _, operator in found[:count]]


def _what_it_does(
    operator: OperatorConfig, source: ModelConfig, target: ModelConfig
) -> tuple[str, ...]:
    """Equal for operators that differ in their settings only."""
    layer_map = check_growth(source, target, operator).layer_map
    moments = operator.moments
    if not _widens(source, target, layer_map):
        silent = all(
            m.zero_output for m, new in zip(layer_map.layers, layer_map.is_new, strict=True) if new
        )
        if moments == "copy" or (moments == "zero" and silent):
            moments = "map"  # nothing is scaled; what is new and silent starts afresh in any case
    return (str(layer_map), operator.width, f"{operator.noise:g}", moments)


def _widens(source: ModelConfig, target: ModelConfig, layer_map: LayerMap) -> bool:
    return source.hidden_size != target.hidden_size or any(
        layer_widths(source, layer.sources[0]) != layer_widths(target, position)
        for position, layer in enumerate(layer_map.layers)
        if layer.sources
    )


def _value(operator: OperatorConfig, factor: Factor) -> str:
    if factor == "depth":
        return operator.depth.model_dump_json()
    return operator.new_layers if factor == "new_layers" else operator.moments


def _effects(
    pool: Mapping[str, OperatorConfig], losses: Mapping[str, float]
) -> dict[Change, float]:
    """Mean change in loss by change of one factor, from pairs that differ in nothing else."""
    seen: dict[Change, list[float]] = {}
    measured = sorted(label for label in losses if label in pool)
    for first, second in itertools.permutations(measured, 2):
        one, other = pool[first], pool[second]
        differing = [f for f in FACTORS if _value(one, f) != _value(other, f)]
        if len(differing) == 1 and (one.width, one.noise) == (other.width, other.noise):
            factor = differing[0]
            change = (factor, _value(one, factor), _value(other, factor))
            seen.setdefault(change, []).append(losses[second] - losses[first])
    return {change: sum(values) / len(values) for change, values in seen.items()}


def _neighbours(
    leader: OperatorConfig, source: ModelConfig, target: ModelConfig, *, has_moments: bool
) -> Iterator[Neighbour]:
    other = "keep" if leader.new_layers == "zero" else "zero"
    changed = leader.model_copy(update={"new_layers": other})
    yield Neighbour(operator=changed, change=("new_layers", leader.new_layers, other), distance=0)
    if has_moments:
        for moments in MOMENTS:
            if moments != leader.moments:
                changed = leader.model_copy(update={"moments": moments})
                change: Change = ("moments", leader.moments, moments)
                yield Neighbour(operator=changed, change=change, distance=0)
    own = check_growth(source, target, leader).layer_map
    for depth in _depths(source, target):
        changed = leader.model_copy(update={"depth": depth})
        try:
            plan = check_growth(source, target, changed)
        except ConfigError:
            continue
        distance = _distance(own, plan.layer_map)
        if distance:
            change = ("depth", _value(leader, "depth"), _value(changed, "depth"))
            yield Neighbour(operator=changed, change=change, distance=distance)


def _depths(source: ModelConfig, target: ModelConfig) -> Iterator[Depth]:
    """Every depth operator without settings of its own, and a block from each layer."""
    yield from (Stack(), Interpose(), First(), Last(), Middle(), Solar(), LlamaPro(), Average())
    yield from (Fit(), RandomTop(), RandomInterleaved())
    more = target.num_hidden_layers - source.num_hidden_layers
    for start in range(source.num_hidden_layers - more + 1):
        yield Block(start=start)


def _distance(one: LayerMap, other: LayerMap) -> int:
    """Target layers that start from something else."""
    return sum(a.sources != b.sources for a, b in zip(one.layers, other.layers, strict=True))
