"""How much of a privacy budget is spent: Opacus's accountant, asked before anything is done.

Every round is one Gaussian mechanism on a Poisson sample (each client joins by itself with the same
probability), every step of DP-SGD one on a Poisson sample of rows. Their Renyi divergences add up
(Mironov 2017; Mironov, Talwar and Zhang 2019) and are turned into (epsilon, delta) at the end.
Neighbours differ by one client, or one row, more or less.

What was done is kept as it was done, with the noise and the rate of its time: a recipe that is
changed before a run goes on changes nothing about what is spent already.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samara.errors import ConfigError
from samara.federated.privacy_config import GaussianPrivacy

ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
"""Orders of the divergence that are tried."""


Entry = tuple[float, float, int]
"""Steps that were done: their noise multiplier, their sampling rate, their number."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A promise, and how fast rounds use it up.

    Attributes:
        epsilon, delta: Promised.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        rate: Probability of being in the sample of a step.
        steps: Of a round.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    rate: float
    steps: int

    def entry(self, rounds: int) -> Entry:
        """So many rounds, as they are remembered."""
        return (self.noise_multiplier, self.rate, rounds * self.steps)

    def spent(self, rounds: int, past: Sequence[Entry] = ()) -> float:
        """Epsilon after so many rounds, and what came before them; 0 of none."""
        return epsilon_of([*past, self.entry(rounds)], self.delta)

    def allows(self, rounds: int, past: Sequence[Entry] = ()) -> bool:
        """Whether so many rounds, after what came before them, stay within it."""
        return self.spent(rounds, past) <= self.epsilon


def epsilon_of(history: Sequence[Entry], delta: float) -> float:
    """Epsilon of all these steps, as Opacus's ``RDPAccountant`` gives it."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if not any(steps for _, _, steps in history):
        return 0.0
    divergences = sum(steps * _divergences(noise, rate) for noise, rate, steps in history)
    with _any_order():
        epsilon, _ = get_privacy_spent(orders=list(ORDERS), rdp=divergences, delta=delta)
    return float(epsilon)


@contextmanager
def _any_order() -> Iterator[None]:
    """The best order may be the first or the last: epsilon is then larger than it need be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


@functools.lru_cache(maxsize=4096)
def _divergences(noise_multiplier: float, rate: float) -> npt.NDArray[np.float64]:
    """Of one step, at each order; they take a while, and those of more steps are multiples."""
    from opacus.accountants.analysis.rdp import compute_rdp

    found = compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS))
    return np.asarray(found, dtype=np.float64)


@functools.lru_cache(maxsize=4096)
def make_budget(
    promise: GaussianPrivacy, *, rate: float, steps: int, rounds: int, key: str
) -> Budget:
    """Settle the noise of a promise.

    Args:
        promise: Of the recipe.
        rate: Probability of being in the sample of a step.
        steps: Of a round.
        rounds: That are wanted.
        key: Of the promise in the recipe, for errors.

    Raises:
        ConfigError: If no noise keeps it.
    """
    from opacus.accountants.analysis.rdp import get_privacy_spent
    from opacus.accountants.utils import get_noise_multiplier

    noise = promise.noise_multiplier
    if noise is None:
        try:
            with _any_order():
                least, _ = get_privacy_spent(
                    orders=list(ORDERS), rdp=np.zeros(len(ORDERS)), delta=promise.delta
                )
                if least >= promise.epsilon:  # with any noise; to search for it takes minutes
                    raise ValueError
                noise = get_noise_multiplier(
                    target_epsilon=promise.epsilon,
                    target_delta=promise.delta,
                    sample_rate=rate,
                    steps=rounds * steps,
                    epsilon_tolerance=min(0.01, promise.epsilon / 100),
                    alphas=list(ORDERS),
                )
        except ValueError:
            raise ConfigError(
                f"{key}.epsilon: {promise.epsilon:g} is too little for {rounds} rounds with any "
                "noise; raise it"
            ) from None
    return Budget(
        epsilon=promise.epsilon,
        delta=promise.delta,
        noise_multiplier=noise,
        rate=rate,
        steps=steps,
    )


def require_round(budgets: Iterable[Budget], *, key: str) -> None:
    """Check that at least one budget suffices for a round.

    Raises:
        ConfigError: If none does.
    """
    least = None
    for budget in budgets:
        if budget.allows(1):
            return
        least = budget if least is None or budget.spent(1) < least.spent(1) else least
    assert least is not None, "there is a budget"
    raise ConfigError(
        f"{key}.noise_multiplier: with {least.noise_multiplier:g} the first round spends epsilon "
        f"{least.spent(1):.3g} of {least.epsilon:g}; raise it, or leave it out"
    )
