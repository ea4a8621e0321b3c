"""Which linear gets how much rank, from the spectra of a trained model's activations.

A linear of rank r maps onto r directions. Of activations with the spectrum lambda, the best r hold
``sum_{i<=r} lambda_i`` of the energy (Eckart and Young), so each linear's **captured share** is
that over the whole, and its price r (in + out) parameters. The allocation makes the sum of the
captured shares as large as a budget of parameters allows: a choice of one rank per linear, priced
and valued. Every linear counts alike: energy in absolute numbers would give all to the layers with
the largest activations. Whether the mean counts is the caller's choice of spectrum.

Shares have falling returns, so a budget filled by the best gain per parameter first (water-filling)
is the optimum wherever steps have one price. Prices differ between attention and FFN; then the
choice is a knapsack, solved exactly by dynamic programming over the budget in units of the prices'
greatest common divisor. Where that would need too many cells, water-filling is kept; it is short of
the optimum by less than one step. ``bound`` is what no allocation can exceed, whichever was used.

It is a proxy: what holds the energy of a dense model's activations need not be what a low-rank
model learns best. Train the design to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samara.errors import ConfigError
from samara.measure.spectrum import FloatArray

MOST_CELLS = 10_000_000
"""Linears x budget units of the exact solution: some seconds, and 20 MB."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A linear that is given a rank."""

    layer: int
    projection: str
    in_features: int
    out_features: int
    spectrum: FloatArray
    """Of its output: eigenvalues, falling."""

    @property
    def price(self) -> int:
        """Parameters of one more rank."""
        return self.in_features + self.out_features

    def ranks(self, multiple: int) -> list[int]:
        """What it may be given: multiples, the least one and up to where a dense one is no larger.

        Raises:
            ConfigError: If no multiple fits into its width.
        """
        width = min(self.in_features, self.out_features)
        if multiple > width:
            raise ConfigError(
                f"allocate.multiple: {multiple} exceeds the width {width} of {self.projection} in "
                f"layer {self.layer}; make it smaller"
            )
        dense = self.in_features * self.out_features
        most = max(multiple, (dense - 1) // self.price)
        return list(range(multiple, most + 1, multiple))

    def captured(self, ranks: Sequence[int]) -> FloatArray:
        """The share of the output's energy that so many directions hold, for each of ``ranks``."""
        cumulative = np.cumsum(self.spectrum)
        if cumulative[-1] <= 0:
            return np.ones(len(ranks))
        shares: FloatArray = cumulative[np.asarray(ranks) - 1] / cumulative[-1]
        return shares


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Ranks under a budget."""

    ranks: tuple[int, ...]
    """One per choice, in their order."""
    parameters: int
    captured: float
    """Mean captured share of the linears."""
    bound: float
    """What no allocation under the budget exceeds."""
    exact: bool
    """Whether it is proven to be the best."""


def allocate_ranks(
    choices: Sequence[Choice], budget: int, *, multiple: int = 1, most_cells: int = MOST_CELLS
) -> Allocation:
    """Give each linear a rank so that the captured shares add up to the most.

    Equal inputs give equal ranks; of equally good ones, earlier linears get more.

    Args:
        choices: The linears.
        budget: The most parameters of all of them together.
        multiple: Every rank is a multiple of this, and at least this.
        most_cells: How large the exact solution may get before water-filling is taken.

    Raises:
        ConfigError: If the budget does not hold the least ranks, or ``multiple`` a width.
    """
    options = [choice.ranks(multiple) for choice in choices]
    least = sum(choice.price * ranks[0] for choice, ranks in zip(choices, options, strict=True))
    if budget < least:
        raise ConfigError(
            f"allocate.budget: {budget:,} parameters do not hold the least ranks ({multiple} in "
            f"each of {len(choices)} linears: {least:,}); raise it"
        )
    values = [choice.captured(ranks) for choice, ranks in zip(choices, options, strict=True)]
    steps = [choice.price * multiple for choice in choices]
    room = budget - least
    filled, bound = _fill(values, steps, room)
    unit = math.gcd(*steps)
    cells = len(choices) * (room // unit + 1)
    # Room for all there is needs no search.
    everything = all(index == len(ranks) - 1 for index, ranks in zip(filled, options, strict=True))
    exact = everything or cells <= most_cells
    if exact and not everything:
        filled = _search(values, [step // unit for step in steps], room // unit)
    ranks = tuple(own[index] for own, index in zip(options, filled, strict=True))
    share = sum(float(own[index]) for own, index in zip(values, filled, strict=True))
    return Allocation(
        ranks=ranks,
        parameters=sum(c.price * rank for c, rank in zip(choices, ranks, strict=True)),
        captured=share / len(choices),
        bound=max(bound, share) / len(choices),
        exact=exact,
    )


def _fill(values: Sequence[FloatArray], steps: Sequence[int], room: int) -> tuple[list[int], float]:
    """Water-filling: the best gain per parameter first; what does not fit is passed over.

    Returns:
        The index of each linear's rank, and the most that could be reached if the first step that
        did not fit could be taken in part.
    """
    # Gains fall but for rounding, which must not put a linear's steps out of their order.
    falling = [np.minimum.accumulate(np.diff(own)) for own in values]
    gains = sorted(
        (-float(gain) / step, linear, index)
        for linear, (own, step) in enumerate(zip(falling, steps, strict=True))
        for index, gain in enumerate(own, start=1)
    )
    chosen = [0] * len(values)
    reached = sum(float(own[0]) for own in values)
    bound: float | None = None
    for density, linear, index in gains:
        step = steps[linear]
        # Falling returns: a linear's steps come in their order, but one that did not fit ends it.
        if chosen[linear] != index - 1:
            continue
        if step > room:
            bound = reached - density * room if bound is None else bound
            continue
        chosen[linear] = index
        room -= step
        reached -= density * step
    return chosen, reached if bound is None else bound


def _search(values: Sequence[FloatArray], steps: Sequence[int], room: int) -> list[int]:
    """The best choice of indices with ``sum(index * step) <= room``, by dynamic programming.

    Args:
        values: Of each linear, the value of each index.
        steps: Its price for one index more, in budget units.
        room: Budget units.
    """
    best: FloatArray = np.zeros(room + 1)
    taken: list[npt.NDArray[np.int16]] = []
    # Backwards, so that reading the choices off starts with the first linear.
    for own, step in zip(reversed(values), reversed(steps), strict=True):
        new = best + own[0]
        chosen = np.zeros(room + 1, dtype=np.int16)
        for index in range(1, min(len(own), room // step + 1)):
            spent = index * step
            candidate = best[: room + 1 - spent] + own[index]
            better = candidate > new[spent:] + 1e-15
            new[spent:][better] = candidate[better]
            chosen[spent:][better] = index
        best = new
        taken.append(chosen)
    result = []
    for chosen, step in zip(reversed(taken), steps, strict=True):
        index = int(chosen[room])
        result.append(index)
        room -= index * step
    return result
