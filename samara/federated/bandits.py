"""Which arm of several: epsilon-greedy, UCB1-tuned, sliding window and Thompson sampling.

Textbook forms (Auer, Cesa-Bianchi and Fischer, Machine Learning 47, 2002; Garivier and Moulines,
ALT 2011, for discounts and windows; Thompson 1933 in its Gaussian form), as pure functions of the
observations. Numpy only. Random numbers come from the caller, so a choice can be computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from samara.federated.config import EpsilonGreedy, Policy, SlidingWindow, Thompson

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One pull.

    Attributes:
        round: When.
        arm: Which.
        reward: Relative to the rewards of its round: comparable between rounds.
    """

    round: int
    arm: int
    reward: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of each arm.

    Attributes:
        count: Weight of its observations; 0: never pulled, or forgotten.
        mean: Of its rewards, mapped to [0, 1]; 0 where ``count`` is 0.
        variance: Of the same.
    """

    count: FloatArray
    mean: FloatArray
    variance: FloatArray


def kept(observations: Sequence[Observation], policy: Policy) -> list[Observation]:
    """The observations that a policy still looks at."""
    if isinstance(policy, SlidingWindow):
        return list(observations[-policy.window :])
    return list(observations)


def statistics(
    observations: Sequence[Observation], *, num_arms: int, round: int, discount: float
) -> Statistics:
    """Discounted count, mean and variance per arm.

    Rewards are clipped to their 5th and 95th percentile and mapped to [0, 1], as UCB needs: one
    lucky pull must not set the scale.
    """
    count, mean, variance = np.zeros(num_arms), np.zeros(num_arms), np.zeros(num_arms)
    if not observations:
        return Statistics(count=count, mean=mean, variance=variance)
    rewards = np.array([item.reward for item in observations], dtype=np.float64)
    low, high = np.percentile(rewards, [5.0, 95.0])
    scaled = (np.clip(rewards, low, high) - low) / (high - low) if high > low else rewards * 0 + 0.5
    arms = np.array([item.arm for item in observations])
    ages = np.array([round - item.round for item in observations], dtype=np.float64)
    weights = discount**ages
    for arm in range(num_arms):
        own = arms == arm
        if own.any():
            total = weights[own].sum()
            count[arm] = total
            mean[arm] = (weights[own] * scaled[own]).sum() / total
            variance[arm] = (weights[own] * (scaled[own] - mean[arm]) ** 2).sum() / total
    return Statistics(count=count, mean=mean, variance=variance)


def incumbent(known: Statistics, offered: Sequence[int]) -> int | None:
    """The pulled arm of the best mean, the first of equal ones; None if none was pulled."""
    pulled = [arm for arm in offered if known.count[arm] > 0]
    return max(pulled, key=lambda arm: (known.mean[arm], -arm)) if pulled else None


def choose_arm(
    policy: Policy,
    known: Statistics,
    offered: Sequence[int],
    *,
    pending: FloatArray,
    age: int,
    draws: FloatArray,
) -> int:
    """Choose one of the offered arms.

    Args:
        policy: How.
        known: What is known.
        offered: Arms that may be chosen, ascending, at least one.
        pending: Per arm the pulls already handed out in this round, whose reward is not known yet.
        age: Rounds since learning began.
        draws: Uniform numbers in (0, 1), one per arm and one more.

    Returns:
        The arm. Each is tried once before any is compared.
    """
    assert offered, "at least one arm is offered"
    fresh = [arm for arm in offered if known.count[arm] == 0 and pending[arm] == 0]
    if fresh:
        return fresh[0]
    seen = [arm for arm in offered if known.count[arm] > 0]
    if not seen:  # all of them are on their way in this round
        return _least_pulled(known, offered, pending)
    best = incumbent(known, seen)
    assert best is not None
    match policy:
        case EpsilonGreedy():
            epsilon = max(policy.floor, policy.epsilon * policy.decay**age)
            if draws[-1] < epsilon:
                return _least_pulled(known, offered, pending)
            return best
        case Thompson():
            return max(seen, key=lambda arm: (_sample(known, arm, policy, float(draws[arm])), -arm))
        case _:
            return max(seen, key=lambda arm: (_upper_bound(known, arm, pending), -arm))


def _least_pulled(known: Statistics, offered: Sequence[int], pending: FloatArray) -> int:
    return min(offered, key=lambda arm: (known.count[arm] + pending[arm], arm))


def _upper_bound(known: Statistics, arm: int, pending: FloatArray) -> float:
    """UCB1-tuned; a pull that is on its way narrows the bound like one that came back."""
    count = float(known.count[arm] + pending[arm])
    log_total = math.log(max(math.e, float((known.count + pending).sum())))
    spread = float(known.variance[arm]) + math.sqrt(2 * log_total / count)
    return float(known.mean[arm]) + math.sqrt(log_total / count * min(0.25, spread))


def _sample(known: Statistics, arm: int, policy: Thompson, draw: float) -> float:
    """A draw from N(mean, s² / (n + n0)), s² shrunk to the largest that [0, 1] allows, 1/4."""
    count = float(known.count[arm])
    spread = (count * float(known.variance[arm]) + policy.prior_count * 0.25) / (
        count + policy.prior_count
    )
    deviation = math.sqrt(spread / (count + policy.prior_count))
    return float(known.mean[arm]) + deviation * NormalDist().inv_cdf(draw)
