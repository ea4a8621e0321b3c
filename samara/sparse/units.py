"""What is selected at once: single weights, square blocks, columns or rows of a matrix.

A column is a feature of a layer's input and a row one of its output, however the matrix is stored.
The score of a unit is the root mean square of its members' scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from samara.sparse.config import Granularity

BLOCK_SIDES: dict[Granularity, int] = {"block4": 4, "block16": 16}


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of one stored matrix.

    Attributes:
        shape: Of the matrix.
        granularity: Of what a unit is; ``two_level`` ends in single weights.
        input_dim: The dimension that faces the layer's input.
    """

    shape: tuple[int, int]
    granularity: Granularity
    input_dim: int

    @property
    def block(self) -> int:
        """Side of the blocks; 1: there are none."""
        return BLOCK_SIDES.get(self.granularity, 1)

    @property
    def size(self) -> int:
        """Entries of a unit; a block at the edge may have fewer."""
        match self.granularity:
            case "column" | "row":
                return self.shape[self._long_dim]
            case _:
                return self.block**2

    @property
    def _long_dim(self) -> int:
        """The dimension along which a column or row runs."""
        return 1 - self.input_dim if self.granularity == "column" else self.input_dim

    def scores(self, entries: Tensor) -> Tensor:
        """Unit scores, flat, from scores of all entries."""
        match self.granularity:
            case "element" | "two_level":
                return entries.flatten()
            case "column" | "row":
                return root_mean_square(entries, dim=self._long_dim)
            case _:
                return self._block_scores(entries)

    def _block_scores(self, entries: Tensor) -> Tensor:
        largest = entries.amax()
        if largest == 0:
            return self._by_block(entries).amax(dim=(1, 3)).flatten()
        squares = self._by_block((entries / largest).square()).sum(dim=(1, 3))
        members = self._by_block(torch.ones_like(entries)).sum(dim=(1, 3))
        return ((squares / members).sqrt() * largest).flatten()

    def _by_block(self, entries: Tensor) -> Tensor:
        """The matrix, filled up with 0, as (block rows, s, block columns, s)."""
        side, (rows, columns) = self.block, self.shape
        padded = functional.pad(entries, (0, -columns % side, 0, -rows % side))
        return padded.view(-1, side, padded.shape[1] // side, side)

    def unit_of(self, index: Tensor) -> Tensor:
        """The units that hold the given entries, each once, ascending."""
        row, column = index // self.shape[1], index % self.shape[1]
        match self.granularity:
            case "element" | "two_level":
                return index
            case "column" | "row":
                units: Tensor = torch.unique(column if self._long_dim == 0 else row)
                return units
            case _:
                grid = -(-self.shape[1] // self.block)
                blocks: Tensor = torch.unique(row // self.block * grid + column // self.block)
                return blocks

    def entries(self, units: Tensor) -> Tensor:
        """Flat positions of all entries of the given units, ascending."""
        rows, columns = self.shape
        match self.granularity:
            case "element" | "two_level":
                return units
            case "column" | "row" if self._long_dim == 0:
                row_starts = torch.arange(rows, device=units.device)[:, None] * columns
                return (row_starts + units).flatten()
            case "column" | "row":
                inside = torch.arange(columns, device=units.device)
                return (units[:, None] * columns + inside).flatten()
            case _:
                side, grid = self.block, -(-columns // self.block)
                chosen = torch.zeros(-(-rows // side) * grid, dtype=torch.bool, device=units.device)
                chosen[units] = True
                wide = chosen.view(-1, grid).repeat_interleave(side, 0).repeat_interleave(side, 1)
                return wide[:rows, :columns].flatten().nonzero().flatten()


def root_mean_square(scores: Tensor, *, dim: int) -> Tensor:
    """RMS along a dimension, without squares that vanish in float32."""
    largest = scores.amax()
    if largest == 0:
        return scores.amax(dim=dim)
    return (scores / largest).square().mean(dim=dim).sqrt() * largest
