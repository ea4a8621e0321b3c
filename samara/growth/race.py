"""The rules of a race between growth operators, on numbers alone: no torch, no files.

LAG (landscape-aware growing, arXiv 2406.02469) grows one checkpoint by several operators, trains
each for a short lag, and goes on with the one whose loss is lowest then. How long the lag must be
is open in the paper. Three rules say when to stop looking:

``fixed``    k steps for everyone: simple, hard to beat, and somebody has to know k.
``halving``  at each rung (k0, 2·k0, 4·k0, …) the worse half leaves.
``paired``   at each rung those leave that cannot catch up any more: whose gap to the leader is
             wider than what they may still close, and by more than chance. The rest of the race is
             judged by how fast a gap closed in the last doubling of the steps; that is to shrink by
             ``gamma`` with each further doubling. Right after growth the losses recover fast,
             nothing can be ruled out, and nobody leaves.

A rank that is stable early is no reason to stop: inside the recovery it is stable and wrong. So the
agreement of ranks between rungs is reported and decides nothing.

Losses are compared unit by unit (rows of the validation set, the same for all): what makes a row
hard cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STANDARD_ERRORS = 2.0
"""A gap within so many standard errors may be chance."""
LEAST_FIRST_RUNG = 50
"""Steps before the first comparison, at least."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Validation loss in its parts.

    Attributes:
        nll_sum: (units,) summed negative log-likelihood in nats.
        num_targets: (units,) targets counted; the same for every candidate.
    """

    nll_sum: Floats
    num_targets: Floats

    @property
    def mean(self) -> float:
        """Nats per target."""
        return float(self.nll_sum.sum() / self.num_targets.sum())


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far a candidate is behind another: the mean paired difference and its standard error."""

    value: float
    se: float

    @property
    def may_be_chance(self) -> bool:
        """Whether the two cannot be told apart."""
        return self.value <= STANDARD_ERRORS * self.se


def paired_gap(candidate: Losses, leader: Losses) -> Gap:
    """The difference in loss, and its standard error over paired units.

    Units are weighted by their targets (a ratio of sums, linearised); where all have the same
    number this is the mean of the differences, and ``sd(ddof 1) / sqrt(units)``. One unit says
    nothing about chance: its standard error is infinite.
    """
    targets = candidate.num_targets
    assert np.array_equal(targets, leader.num_targets), "candidates are compared on the same units"
    difference = candidate.nll_sum - leader.nll_sum
    units, total = int((targets > 0).sum()), float(targets.sum())
    value = float(difference.sum()) / total
    if units < 2:
        return Gap(value=value, se=math.inf)
    residual = difference - value * targets
    variance = float((residual**2).sum()) / total**2 * units / (units - 1)
    return Gap(value=value, se=math.sqrt(variance))


def reach(*, closing: float, gamma: float, doublings: float) -> float:
    """What a candidate may still close until the end of training.

    Args:
        closing: By how much its gap shrank in the last doubling of the steps; negative: it grew.
        gamma: By which factor that falls with each further doubling, in [0, 1).
        doublings: How many are left, ``log2(horizon / steps)``.
    """
    share: float = (1.0 - gamma**doublings) / (1.0 - gamma)
    return max(0.0, closing) * gamma * share


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Why a candidate stays in the paired race or leaves it.

    Attributes:
        gap: To the leader now.
        closing: By how much the gap to this leader shrank since the rung before; None at the first.
        threshold: The widest gap that stays; None at the first rung, where nobody leaves.
    """

    gap: Gap
    closing: float | None = None
    threshold: float | None = None

    @property
    def leaves(self) -> bool:
        """Whether it cannot catch up any more."""
        return self.threshold is not None and self.gap.value > self.threshold


def judge(
    candidate: Losses,
    leader: Losses,
    *,
    before: tuple[Losses, Losses] | None,
    gamma: float,
    doublings: float,
) -> Judgement:
    """Apply the closing-rate guard.

    Args:
        candidate: Its losses at this rung.
        leader: Those of the candidate with the lowest mean at this rung.
        before: The two at the rung before; None at the first rung.
        gamma: See :func:`reach`.
        doublings: See :func:`reach`.
    """
    gap = paired_gap(candidate, leader)
    if before is None:
        return Judgement(gap=gap)
    closing = max(0.0, paired_gap(*before).value - gap.value)
    allowed = reach(closing=closing, gamma=gamma, doublings=doublings)
    return Judgement(gap=gap, closing=closing, threshold=allowed + STANDARD_ERRORS * gap.se)


def first_rung(*, warmup_steps: int, beta2: float) -> int:
    """Steps before the first comparison: past the warm-up, and past the optimizer's memory.

    Args:
        warmup_steps: Of the learning rate, after growth.
        beta2: Decay of the second moments; the mean runs over about ``1 / (1 - beta2)`` steps.
    """
    memory = math.ceil(1.0 / (1.0 - beta2) - 1e-9) if beta2 < 1.0 else LEAST_FIRST_RUNG
    return max(warmup_steps, memory, LEAST_FIRST_RUNG)


def doubling_rungs(first: int, *, horizon: int) -> tuple[int, ...]:
    """The steps ``first·2^r``, none beyond ``horizon``."""
    assert first > 0
    rungs = []
    while first <= horizon:
        rungs.append(first)
        first *= 2
    return tuple(rungs)


def fixed_rungs(k: int, *, measurements: int) -> tuple[int, ...]:
    """The steps ``…, k/4, k/2, k``: all are measured, the last decides."""
    return tuple(sorted({k >> halving for halving in range(measurements)} - {0}))


def survivors_of_halving(means: dict[str, float]) -> frozenset[str]:
    """The better half, rounded up; equal losses are ordered by name."""
    order = sorted(means, key=lambda name: (means[name], name))
    return frozenset(order[: math.ceil(len(order) / 2)])


def stage_steps(total: int, *, stages: int, alpha: float) -> tuple[int, ...]:
    """PROP-alpha: the steps of stage i (from 1) grow as ``i^alpha``.

    From gradual stacking as MIDAS uses it (arXiv 2409.19044). The parts are cut to whole steps and
    the last stage gets what is left over, so they sum to ``total``.
    """
    weights = [stage**alpha for stage in range(1, stages + 1)]
    parts = [math.floor(total * weight / sum(weights)) for weight in weights]
    parts[-1] += total - sum(parts)
    return tuple(parts)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a choice between candidates looks at.

    Attributes:
        name: Identifies it; does not depend on its place in the recipe.
        score: By the ranking metric; lower is better.
        losses: At the rung that decides.
        flops_per_step: Its price from here on.
        exactness: How well growth kept the function: 0 is best.
    """

    name: str
    score: float
    losses: Losses
    flops_per_step: float
    exactness: int

    @property
    def preference(self) -> tuple[float, int, str]:
        """Which of several equals is taken: the cheaper, the exacter, the first by name."""
        return (self.flops_per_step, self.exactness, self.name)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Who goes on.

    Attributes:
        winner: The candidate's name.
        contenders: Those that could not be told from the best, by name; the winner is one.
    """

    winner: str
    contenders: tuple[str, ...]


def choose(standings: Sequence[Standing], *, by_loss: bool) -> Choice:
    """Pick the best; of those that cannot be told from it, the cheapest, exactest, first by name.

    Args:
        standings: Those that are left, in any order: it does not change the choice.
        by_loss: The scores are the losses themselves, so that chance can be judged by their paired
            differences. Other scores tie only where they are equal.
    """
    best = min(standings, key=lambda one: (one.score, one.name))
    contenders = [
        one
        for one in standings
        if one is best
        or one.score == best.score
        or (by_loss and paired_gap(one.losses, best.losses).may_be_chance)
    ]
    winner = min(contenders, key=lambda one: one.preference)
    return Choice(winner=winner.name, contenders=tuple(sorted(one.name for one in contenders)))
