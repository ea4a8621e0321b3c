"""How many entries each matrix gets: sizes and scores mixed, clamped, rounded, exactly K in sum.

    K_l = K * [(1 - rho) * N_l / N + rho * mass_l / sum mass]

mass_l counts the entries of matrix l among the K best of all matrices together, so rho = 0 is a
quota by size and rho = 1 the global choice. Each K_l then stays within multiples of its share by
size and within what the matrix has; what that cuts off goes to the others in proportion. Fractions
are rounded by largest remainder, ties to the earlier matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROUNDS = 200
"""Bisection steps: enough for any float64."""


def allocate(
    total: int,
    *,
    sizes: Sequence[int],
    capacities: Sequence[int],
    masses: Sequence[int],
    floors: Sequence[int],
    rho: float,
    clamp: tuple[float, float],
) -> list[int]:
    """Entries of each matrix.

    Args:
        total: K, the entries of all; cut to what the matrices have.
        sizes: Entries of each matrix, N_l.
        capacities: Those that can be chosen, at most N_l.
        masses: Entries of each among the K best of all.
        floors: Entries that each has at least, whatever the clamp; no more than K in sum.
        rho: 0: by size; 1: by mass.
        clamp: Least and most of each, as multiples of K * N_l / N.
    """
    caps = np.array(capacities, dtype=np.float64)
    total = min(total, int(caps.sum()))
    by_size = total * np.array(sizes, dtype=np.float64) / max(1, sum(sizes))
    mass = np.array(masses, dtype=np.float64)
    by_mass = total * mass / mass.sum() if mass.sum() else by_size
    wanted = (1.0 - rho) * by_size + rho * by_mass
    high = np.minimum(np.floor(clamp[1] * by_size), caps)
    if high.sum() < total:  # the matrices that may take more have no more
        high = caps
    base = np.array(floors, dtype=np.float64)
    high = np.maximum(high, base)
    low = np.maximum(np.minimum(clamp[0] * by_size, high), base)
    if low.sum() > total:  # the floors leave less than the least shares by size
        low = base + (low - base) * (total - base.sum()) / (low - base).sum()
    return _rounded(_water_fill(wanted, low, high, total), high, total)


def _water_fill(wanted: Floats, low: Floats, high: Floats, total: int) -> Floats:
    """``clip(factor * wanted, low, high)`` with the factor that makes the sum ``total``."""
    clipped = np.clip(wanted, low, high)
    if abs(clipped.sum() - total) < 1e-6:
        return clipped
    # A matrix without mass cannot grow in proportion; a trace of its room lets it.
    wanted = wanted + 1e-9 * high
    bottom, top = 0.0, 1.0
    while np.clip(top * wanted, low, high).sum() < total and top < 1e30:
        top *= 2.0
    for _ in range(ROUNDS):
        middle = 0.5 * (bottom + top)
        if np.clip(middle * wanted, low, high).sum() < total:
            bottom = middle
        else:
            top = middle
    return np.clip(top * wanted, low, high)


def _rounded(shares: Floats, high: Floats, total: int) -> list[int]:
    """Whole numbers with the sum ``total``, by largest remainder, none above ``high``."""
    whole = np.floor(shares + 1e-9)
    order = np.argsort(-(shares - whole), kind="stable")
    missing = total - int(whole.sum())
    while missing > 0:
        open_ = [place for place in order if whole[place] < high[place]]
        assert open_, "the matrices hold at least the total"
        for place in open_[:missing]:
            whole[place] += 1
        missing = total - int(whole.sum())
    return [int(count) for count in whole]
