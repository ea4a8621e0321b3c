"""Rows that training reads by number: what every objective's data set can do.

The loader asks for the rows of a micro-batch by their numbers and gets tensors. A row is a pure
function of its number (and the settings), so nothing depends on workers, batch size, or on when the
run was interrupted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

Batch = dict[str, torch.Tensor]
"""A micro-batch: ``input_ids``, ``targets``, ``position_ids``, int64, and what else the objective
needs; (b, …), or without b for a single row."""


class Rows(Dataset[Batch]):
    """A data set of rows.

    Attributes:
        sequence_length: Input positions of a row, t.
    """

    sequence_length: int

    @abstractmethod
    def __len__(self) -> int:
        """Rows of one pass over the data."""

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows at once.

        Args:
            rows: Row numbers, b of them, any from 0: ``epoch * len + row`` in a later pass, where
                an objective that draws noise draws other noise, and any other begins again.

        Returns:
            int64 tensors with b first.
        """

    def __getitem__(self, index: int) -> Batch:
        """One row: the tensors of :meth:`batch` without the batch dimension."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: tensor[0] for name, tensor in self.batch([index % len(self)]).items()}
