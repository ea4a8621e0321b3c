"""The order in which training reads the data: a pure function of the seed and the step.

Nothing has to be remembered to go on after an interruption: the step says which rows come next.
Every epoch is a fresh permutation of all rows; batches run on across its end, so no row is dropped
or read twice. The rows of a global batch do not depend on how many processes share it, nor on how
many workers read ahead.

Row i of epoch e has the number ``e * len + i``, so that an objective that draws noise draws other
noise in each epoch (:mod:`samara.data.rows`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from samara.data.rows import Batch, Rows
from samara.data.tokens import IntArray
from samara.errors import ConfigError


def epoch_permutation(num_rows: int, *, seed: int, epoch: int) -> IntArray:
    """The order of the rows in one epoch.

    Sorting raw Philox output, rather than ``Generator.permutation``, keeps the order the same for
    every numpy release: only the bit streams are promised to stay.
    """
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    return np.argsort(bits.random_raw(num_rows), kind="stable")


class _Steps:
    """Row numbers of each optimizer step's global batch, from the endless run of epochs."""

    def __init__(self, num_rows: int, *, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order: IntArray = np.empty(0, dtype=np.int64)

    def rows(self, step: int) -> IntArray:
        """Row numbers (batch_size,) of global batch ``step``, counted from 0."""
        position, parts, missing = step * self.batch_size, [], self.batch_size
        while missing:
            epoch, offset = divmod(position, self.num_rows)
            if epoch != self._epoch:
                self._order = epoch_permutation(self.num_rows, seed=self.seed, epoch=epoch)
                self._epoch = epoch
            part = self._order[offset : offset + missing]
            parts.append(part + epoch * self.num_rows)
            position, missing = position + len(part), missing - len(part)
        return np.concatenate(parts)


class _MicroBatches(Dataset[Batch]):
    """Maps the list of rows of a micro-batch to its tensors."""

    def __init__(self, dataset: Rows) -> None:
        self._dataset = dataset

    def __getitem__(self, rows: list[int]) -> Batch:
        return self._dataset.batch(rows)


class _Order:
    """Yields the rows of one rank's micro-batches, from one step to another."""

    def __init__(
        self, steps: _Steps, *, first: int, last: int, micro: int, rank: int, world_size: int
    ) -> None:
        self._steps = steps
        self._range = range(first, last)
        self._micro = micro
        self._share = steps.batch_size // world_size
        self._rank = rank

    def __len__(self) -> int:
        return len(self._range) * self._share // self._micro

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._range:
            start = self._rank * self._share
            own = self._steps.rows(step)[start : start + self._share].tolist()
            for first in range(0, self._share, self._micro):
                yield own[first : first + self._micro]


def training_batches(
    dataset: Rows,
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """Yield, for each optimizer step, this process's micro-batches.

    Args:
        dataset: The rows of the training split.
        batch_size: Rows of one step over all processes.
        micro_batch_size: Rows of one forward pass.
        seed: With the step, decides the order.
        start_step: The first step to yield, counted from 0: where an interrupted run goes on.
        num_steps: Steps to yield.
        rank: This process among those that share a batch; it takes the rank-th slice.
        world_size: How many share it.
        num_workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Put the batches in page-locked memory, for a copy to the GPU that overlaps.

    Raises:
        ConfigError: If the batch cannot be divided that way.
    """
    if batch_size % (world_size * micro_batch_size):
        raise ConfigError(
            f"training.batch_size: {batch_size} is not divisible by {world_size} processes times "
            f"training.micro_batch_size {micro_batch_size}"
        )
    order = _Order(
        _Steps(len(dataset), batch_size=batch_size, seed=seed),
        first=start_step,
        last=start_step + num_steps,
        micro=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )
    loader = DataLoader(
        _MicroBatches(dataset),
        sampler=order,  # one sample is a whole micro-batch
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # Its own generator: the loader would draw from the global one, and the number of loaders
        # made would change the model's random numbers.
        generator=torch.Generator(),
    )
    return _grouped(iter(loader), batch_size // world_size // micro_batch_size)


def _grouped(micro_batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in micro_batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def evaluation_batches(dataset: Rows, *, batch_size: int) -> Iterator[Batch]:
    """Yield every row once, in order; the last batch may be smaller."""
    for start in range(0, len(dataset), batch_size):
        yield dataset.batch(range(start, min(start + batch_size, len(dataset))))
