"""A client's change as a vector of whole numbers: clipped, and on a grid that all share.

Sums of whole numbers are exact and independent of their order, which masks need (they vanish from
the sum to the last bit) and noise does too: on a grid there are no low bits of floating-point
numbers that could betray what noise was added to (Mironov 2012).

The grid is so fine that the sum over all clients just fits 32 bits:

    step = clip / floor((2^31 - 1) / clients)

Numbers are cut off towards 0, so no vector gets longer than its clipping norm by being rounded.

Layers that a client does not send are zeros: the vector has the same shape whatever it shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from samara.federated.aggregation import Layout, Tensor
from samara.federated.config import FederateConfig

IntVector = npt.NDArray[np.int64]
LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Whole numbers for values of up to ``clip`` in norm, from so many clients.

    Attributes:
        clip: Largest L2 norm of a client's change.
        clients: Most vectors in a sum.
    """

    clip: float
    clients: int

    @property
    def units(self) -> int:
        """Steps of the grid to the largest value of one client."""
        return LARGEST // self.clients

    @property
    def step(self) -> float:
        """Of the grid, in the values' own measure."""
        return self.clip / self.units

    def change(
        self, tensors: Mapping[str, Tensor], previous: Mapping[str, Tensor], layout: Layout
    ) -> npt.NDArray[np.float64]:
        """What a client changed, in one vector, clipped; 0 where it sent nothing.

        A value that is not finite makes the whole change 0: it must not reach a sum.
        """
        parts = []
        for name, shape in layout.shapes.items():
            if name in tensors:
                parts.append((tensors[name].astype(np.float64) - previous[name]).ravel())
            else:
                parts.append(np.zeros(int(np.prod(shape))))
        values = np.concatenate(parts)
        norm = float(np.sqrt((values**2).sum()))
        if not np.isfinite(norm):
            return np.zeros_like(values)
        # A hair below: rounding must not lift the norm above the bound.
        return values * (min(1.0, self.clip / norm) * (1 - 1e-9)) if norm > 0 else values

    def encode(self, values: npt.NDArray[np.float64]) -> IntVector:
        """Onto the grid, towards 0."""
        return np.trunc(values / self.step).astype(np.int64)

    def encode_shares(self, values: Sequence[float]) -> IntVector:
        """Numbers from 0 to 1, on a grid of their own."""
        return np.trunc(np.array(values, dtype=np.float64) * self.units).astype(np.int64)

    def decode(self, total: IntVector) -> npt.NDArray[np.float64]:
        """From the grid."""
        return total.astype(np.float64) * self.step

    def decode_shares(self, total: IntVector) -> npt.NDArray[np.float64]:
        """Sums of numbers from 0 to 1."""
        return total.astype(np.float64) / self.units


def length(layout: Layout) -> int:
    """Values in a change."""
    return sum(int(np.prod(shape)) for shape in layout.shapes.values())


def split(values: npt.NDArray[np.float64], layout: Layout) -> dict[str, npt.NDArray[np.float64]]:
    """The vector of a change as named tensors."""
    found, start = {}, 0
    for name, shape in layout.shapes.items():
        size = int(np.prod(shape))
        found[name] = values[start : start + size].reshape(shape)
        start += size
    return found


def group_names(layout: Layout) -> list[str]:
    """The groups of the tensors, in the order of the first tensor of each."""
    return list(dict.fromkeys(layout.groups.values()))


def make_grid(config: FederateConfig, num_clients: int) -> Grid:
    """The grid of a run's vectors, the same on both sides."""
    return Grid(clip=config.privacy.clip, clients=num_clients)
