"""DP-SGD in a client's training (Abadi et al., CCS 2016), with the gradients per row of Opacus.

A step draws each row of the client by itself with probability batch_size / rows, clips the
gradient of each row to ``clip``, sums, adds Gaussian noise, and divides by the *expected* batch
size: nothing in it depends on a row more than the promise allows. Passing over the rows in epochs,
as training does otherwise, would not earn the accountant's discount for sampling.

A layer that was left out of a pass has no gradient, and gets no noise either: which layers run is
decided by seed, client, round and step, never by data, so leaving its parameters out of that step
tells nothing. Opacus itself refuses a parameter without gradients per row; it is given zeros, and
their noise is taken off again, so that AdamW leaves weights and moments of the layer alone.

Opacus's hooks are on the model for the length of one local training.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.data.tokens import IGNORE_INDEX
from samara.federated.accounting import Budget
from samara.federated.aggregation import Tensor as Array
from samara.federated.messages import Instruction
from samara.federated.randomness import Stream, derive
from samara.federated.task_data import ChosenRows
from samara.train.config import AdamW
from samara.train.objective import Objective, Sums, count_targets
from samara.train.optim import Optimizer


class SumPerRow:
    """An objective whose gradient of each row does not depend on the others.

    The loop divides by the targets of the batch. Here that is taken back: what is left of a row is
    the sum over its own targets.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`~samara.train.objective.Objective`."""
        result = self._objective(model, batch)
        return Sums(loss=result.loss * max(1, count_targets([batch])), nll=result.nll)


class PrivateOptimizer(Optimizer):
    """Clips the gradients per row and adds noise before each step."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: AdamW,
        *,
        budget: Budget,
        clip: float,
        batch_size: int,
        key: bytes,
    ) -> None:
        """Start; Opacus's hooks must be on the model.

        Args:
            model: Trained in place.
            config: Of the optimizer that gets the noisy gradients.
            budget: Whose noise to add.
            clip: Largest norm of a row's gradient.
            batch_size: Rows that a step is expected to draw.
            key: Of the noise of this local training.
        """
        from opacus.optimizers import DPOptimizer

        super().__init__(model, config)
        (inner,) = self._optimizers
        self._key, self._step = key, 0
        self._private = DPOptimizer(
            inner,
            noise_multiplier=budget.noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=batch_size,
        )

    def step(self) -> None:
        """Update the parameters from their clipped and noisy gradients."""
        skipped = self._fill_skipped()
        self._private.clip_and_accumulate()
        self._add_noise()
        self._private.scale_grad()
        for parameter in skipped:
            parameter.grad = None
        super().step()
        self._step += 1

    def _fill_skipped(self) -> list[nn.Parameter]:
        """Zeros for parameters of layers that did not run; returns these."""
        own = [(parameter, gradients_per_row(parameter)) for parameter in self.parameters]
        rows = max((len(gradients) for _, gradients in own if gradients is not None), default=0)
        skipped = [parameter for parameter, gradients in own if gradients is None]
        for parameter in skipped:
            zeros = parameter.new_zeros((rows, *parameter.shape))
            parameter.grad_sample = zeros  # type: ignore[attr-defined]
        return skipped

    def _add_noise(self) -> None:
        """Opacus's own place for noise, with a stream that nobody can foresee.

        Added in double precision: rounding to single cuts off the bits that could betray it.
        """
        private, stream = self._private, Stream(self._key, f"noise-{self._step}")
        deviation = private.noise_multiplier * private.max_grad_norm
        for parameter in self.parameters:
            noise = torch.from_numpy(deviation * stream.normal(parameter.numel()))
            total = parameter.summed_grad.double()  # type: ignore[attr-defined]
            noisy = total + noise.to(total.device).view_as(total)
            parameter.grad = noisy.to(parameter.dtype)

    def zero_grad(self) -> None:
        """Drop all gradients, those per row too."""
        self._private.zero_grad(set_to_none=True)


def gradients_per_row(parameter: nn.Parameter) -> Tensor | None:
    """Opacus's gradients of each row (b, …), None if the parameter took no part in the pass."""
    found: Tensor | None = parameter.grad_sample  # type: ignore[attr-defined]
    return found


@contextmanager
def row_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Opacus's hooks on a model, off again afterwards, with all that they left on it."""
    from opacus.grad_sample import GradSampleHooks

    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # Of the lowest adapters: what goes into them needs no gradient, and gets none.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.remove_hooks()
        for module in model.modules():
            for name in ("activations", "max_batch_len"):  # of a pass that broke off
                vars(module).pop(name, None)
        for parameter in model.parameters():
            for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
                vars(parameter).pop(name, None)


def poisson_batches(
    rows: ChosenRows, *, rate: float, steps: int, key: bytes
) -> Iterator[list[Batch]]:
    """Per step the rows that were drawn, each by itself; at times none, and so a row of no targets.

    Args:
        rows: Of the client.
        rate: Probability of a row.
        steps: To yield.
        key: Of this local training.
    """
    for step in range(steps):
        drawn = np.flatnonzero(Stream(key, f"rows-{step}").uniform(len(rows)) <= rate)
        if len(drawn):
            yield [rows.batch(drawn.tolist())]
        else:
            batch = rows.batch([0])
            yield [{**batch, "targets": torch.full_like(batch["targets"], IGNORE_INDEX)}]


def training_key(
    secret: bytes, instruction: Instruction, received: Mapping[str, Array], own: Sequence[Array]
) -> bytes:
    """The key of one local training: whatever it starts from is part of it.

    Asked the same again, a client answers the same; asked anything else, its noise is another.

    Args:
        secret: Of the client.
        instruction: What it is asked.
        received: The server's values.
        own: Values that it kept.
    """
    state: Any = hashlib.sha256(json.dumps(instruction.to_dict()).encode())
    for values in (*(received[name] for name in sorted(received)), *own):
        state.update(np.ascontiguousarray(values).tobytes())
    return derive(secret, f"training-{state.hexdigest()}")
