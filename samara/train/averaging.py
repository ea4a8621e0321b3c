"""The mean of a run's last weights (OpenELM, arXiv 2404.14619: the last five checkpoints).

Each member is kept as a folder of weights alone, ``averages/step-…``, apart from the checkpoints:
how many checkpoints are kept for resuming does not matter, and a resumed run finds them again.
Which steps are members follows from the recipe, so nothing is written that is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from samara.errors import CheckpointError
from samara.train.checkpoint import MODEL, named_weights, sweep, verify, write_tensors
from samara.train.processes import from_first, is_first, like, whole


def member_steps(*, num_steps: int, every: int, count: int) -> tuple[int, ...]:
    """The last ``count`` checkpoint steps of a run: multiples of ``every``, and the last step."""
    scheduled = {*range(every, num_steps + 1, every), num_steps}
    return tuple(sorted(scheduled)[-count:])


class Averages:
    """The members of one run's average.

    Args:
        folder: Where they are kept; need not exist yet.
        steps: The steps whose weights are averaged (:func:`member_steps`).
    """

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self._folder = folder
        self._steps = tuple(steps)
        sweep(folder)

    def add(self, model: nn.Module, *, step: int) -> None:
        """Keep the weights if ``step`` is a member; all processes call it, the first one writes.

        Raises:
            ResourceError: If the disk is full.
        """
        if step not in self._steps:
            return
        weights = whole(named_weights(model))
        if is_first():
            write_tensors(self._path(step), {MODEL: weights}, state={"step": step}, identity={})

    def load_mean(self, model: nn.Module) -> None:
        """Give the model the mean of all members, summed in float64.

        Raises:
            CheckpointError: If a member is missing or damaged.
        """
        for step in self._steps if is_first() else ():
            if not self._path(step).exists():
                raise CheckpointError(
                    f"{self._path(step)}: is missing, and the final model averages it; "
                    "run in a new folder, or set checkpoint.average_last=1"
                )
            verify(self._path(step))
        files = [self._path(step) / MODEL for step in self._steps]
        with torch.no_grad():
            for name, tensor in named_weights(model).items():
                mean = from_first(
                    functools.partial(_mean, files, name),
                    shape=tuple(tensor.shape),
                    dtype=torch.float64,
                )
                tensor.copy_(like(tensor, mean))

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def _mean(files: Sequence[Path], name: str) -> Tensor:
    """The float64 mean of one tensor over files."""
    total: Tensor | None = None
    for file in files:
        with safe_open(file, framework="pt") as stored:
            value = stored.get_tensor(name).double()
        total = value if total is None else total + value
    assert total is not None, "an average has at least one member"
    return total / len(files)
