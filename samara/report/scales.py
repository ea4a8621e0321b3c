"""From data to places on a chart: axes, round ticks, smoothing, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A point of a curve, in data units."""

    x: float
    y: float


@dataclass(frozen=True)
class Axis:
    """A linear range of values."""

    low: float
    high: float

    def __post_init__(self) -> None:
        assert self.low < self.high

    def share(self, value: float) -> float:
        """Where ``value`` lies: 0 at ``low``, 1 at ``high``; outside beyond."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the range, about so many."""
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        # One division at the end: repeated addition would give ticks like 0.30000000000000004.
        return [round(index * step, 12) for index in range(first, last + 1)]


def axis_around(values: Sequence[float], *, padding: float = 0.06) -> Axis:
    """An axis that holds all values, with some room at both ends."""
    low, high = min(values), max(values)
    room = (high - low) * padding or max(abs(high), 1e-9) * 0.05
    return Axis(low - room, high + room)


def tick_places(ticks: Sequence[float]) -> int:
    """Decimals that write the distance of neighbouring ticks in full."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 0.01
    return next(p for p in range(16) if abs(round(step, p) - step) < 1e-6 * step or p == 15)


def smoothed(curve: Sequence[Place], *, width: float) -> list[Place]:
    """Means of neighbouring points, weighted by a Gaussian over x.

    The window is centred, so that the curve does not lag behind the data, as a running mean would.

    Args:
        curve: Points in order of x.
        width: Standard deviation of the window, in units of x.
    """
    result: list[Place] = []
    start = 0
    for middle in curve:
        while curve[start].x < middle.x - 3 * width:
            start += 1
        total = weights = 0.0
        for point in curve[start:]:
            if point.x > middle.x + 3 * width:
                break
            weight = math.exp(-0.5 * ((point.x - middle.x) / width) ** 2)
            total, weights = total + weight * point.y, weights + weight
        result.append(Place(middle.x, total / weights))
    return result


def thinned(curve: Sequence[Place], *, most: int) -> list[Place]:
    """At most ``most`` points: the means of equal runs of neighbours; the last point stays."""
    if len(curve) <= most:
        return list(curve)
    run = math.ceil(len(curve) / (most - 1))
    groups = [curve[i : i + run] for i in range(0, len(curve) - 1, run)]
    means = [Place(sum(p.x for p in g) / len(g), sum(p.y for p in g) / len(g)) for g in groups]
    return [*means, curve[-1]]


def some(values: Sequence[T], *, most: int) -> list[T]:
    """At most ``most`` of the values, evenly spaced, the last one always among them."""
    stride = max(1, -(-len(values) // most))
    return list(values[::-1][::stride])[::-1]


def spread(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: at least ``gap`` between any two, each as near its place as that allows.

    Args:
        positions: Where the labels would like to be.
        gap: Least distance of two.
        low: The first allowed position.
        high: The last allowed position; given up if the labels need more room.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    # Each cluster is [wished centre of its first label summed, members]; overlapping ones merge.
    clusters: list[list[int]] = [[i] for i in order]

    def start(cluster: list[int]) -> float:
        wish = sum(positions[i] - k * gap for k, i in enumerate(cluster)) / len(cluster)
        return max(low, min(wish, high - (len(cluster) - 1) * gap))

    merged = True
    while merged:
        merged = False
        for k in range(len(clusters) - 1):
            end = start(clusters[k]) + len(clusters[k]) * gap
            if end > start(clusters[k + 1]) + 1e-9:
                clusters[k : k + 2] = [clusters[k] + clusters[k + 1]]
                merged = True
                break
    placed = [0.0] * len(positions)
    for cluster in clusters:
        for k, i in enumerate(cluster):
            placed[i] = start(cluster) + k * gap
    return placed


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10):
        if rough <= factor * power * 1.0001:
            return factor * power
    raise AssertionError(rough)
