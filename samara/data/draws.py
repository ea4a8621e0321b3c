"""Random numbers that depend on where they are used, and on nothing else.

An objective draws noise for every row of every pass over the data. The numbers are a pure function
of (seed, purpose, pass, row), so a row is the same whichever worker makes it, in whichever batch,
before or after an interruption. Layer dropout draws its gates by the same rule.

Only raw Philox output (Salmon et al., SC 2011) is used: numpy promises that the bit stream stays
the same for all releases, and nothing of the kind for its distributions.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # tokens imports torch, which drawing numbers does not need
    from samara.data.tokens import IntArray


class Purpose(IntEnum):
    """What the numbers are for: two purposes never share any."""

    MASKED_LM = 1
    UL2_ORDER = 2
    UL2_SPANS = 3
    LAYER_GATES = 4
    CLIENT_SAMPLE = 10
    CLIENT_TRACE = 11
    CLIENT_PARTITION = 12
    CLIENT_SPLIT = 13
    ARM_CHOICE = 14
    CLIENT_TRAINING = 15


class Draws:
    """The random numbers of one row in one pass, in the order in which they are asked for."""

    def __init__(
        self, *, seed: int, purpose: Purpose, draw: int = 0, row: int = 0, node: int = 0
    ) -> None:
        """Start the stream.

        Args:
            seed: Of the run.
            purpose: What the numbers are for.
            draw: The pass over the data, counted from 0.
            row: The row.
            node: Which of several machines, where each is to have numbers of its own.
        """
        # The counter's lowest word is Philox's own: 2^64 blocks of numbers for each of the others.
        self._bits = np.random.Philox(
            key=np.array([seed % 2**64, purpose], dtype=np.uint64),
            counter=np.array([0, node, draw, row], dtype=np.uint64),
        )

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Numbers in [0, 1), all multiples of 2^-53."""
        return (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, count: int, *, below: int) -> IntArray:
        """Whole numbers in [0, below)."""
        return (self.uniform(count) * below).astype(np.int64)

    def permutation(self, count: int) -> IntArray:
        """The numbers 0 to count - 1 in random order."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def subset(self, count: int, *, of: int) -> IntArray:
        """``count`` different numbers in [0, of), ascending."""
        return np.sort(self.permutation(of)[:count])
