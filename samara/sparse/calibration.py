"""Gradient statistics of weights over samples, one weight matrix's gradient at a time.

For n samples with losses l_s (mean over the counted targets of the sample), weights frozen, dropout
off:  mean g_i = (1/n) sum_s dl_s/dw_i  and  F_i = (1/n) sum_s (dl_s/dw_i)^2, the diagonal of the
empirical Fisher information with labels from the data. One backward pass a sample: the square of a
batch's mean gradient is no Fisher.

As soon as autograd has the gradient of one weight, a hook adds it to the sums and frees it: a dense
gradient of the whole model never exists. The sums do (two numbers a weight); where they do not fit,
weights are done in several passes, and only the scores of a pass are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.sparse.top_k import top_k
from samara.train.objective import Objective, count_targets
from samara.train.parallel import Precision, autocast

SAMPLES_BEFORE_PRUNING = 8

Sums = dict[str, "GradientSums"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What gradient statistics are taken from.

    Attributes:
        objective: From model and batch to summed losses.
        samples: One row each; a sample without targets is left out.
        precision: ``bfloat16``: autocast in the forward pass, on a GPU. On CPU the statistics are
            taken in the weights' own dtype: oneDNN generates code for every bfloat16 product of
            another shape and keeps it (half a megabyte each, see :mod:`samara.measure.memory`), and
            samples come one at a time in many lengths. At 3 M weights that code was 120 MB, more
            than all of training, for as long as the process lived.
    """

    objective: Objective
    samples: Sequence[Batch]
    precision: Precision = "float32"

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a forward pass on a device."""
        return autocast(device, "float32" if device.type == "cpu" else self.precision)


class GradientSums:
    """Sums of gradients and squared gradients of one weight.

    Attributes:
        index: The flat positions that are still summed, ascending; None: all.
        num_samples: Samples added.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        exact = torch.promote_types(weight.dtype, torch.float32)
        dtype = exact if dtype == torch.float32 else dtype
        self._sum = torch.zeros(weight.numel(), dtype=dtype, device=weight.device)
        self._square_sum = torch.zeros_like(self._sum)
        self._shape, self._exact = weight.shape, exact
        self._typical: Tensor | None = None
        self.index: Tensor | None = None
        self.num_samples = 0

    def add(self, grad: Tensor) -> None:
        """Add one sample's gradient."""
        flat = grad.flatten()
        if self.index is not None:
            flat = flat.index_select(0, self.index)
        flat = flat.to(self._exact)
        self._sum += flat
        self._square_sum += flat.square()

    @property
    def mean(self) -> Tensor:
        """The mean gradient, in the shape of the weight; 0 where pruned."""
        return self._dense(self._sum)

    @property
    def fisher(self) -> Tensor:
        """The mean squared gradient, in the shape of the weight; 0 where pruned."""
        return self._dense(self._square_sum)

    @property
    def typical_fisher(self) -> Tensor:
        """The median of F, a scalar; the mean of what is not 0 where that is most of it; or 0.

        Of pruned sums: of all positions, as it was when they were pruned.
        """
        if self._typical is not None:
            return self._typical
        fisher = self.fisher
        median = fisher.median()
        positive = fisher[fisher > 0]
        return positive.mean() if median == 0 and positive.numel() else median

    def prune(self, scores: Tensor, keep: int) -> None:
        """Go on with the ``keep`` best positions by ``scores`` (the weight's shape) alone."""
        if keep >= scores.numel():
            return
        self._typical = self.typical_fisher
        self.index = top_k(scores, keep)
        self._sum, self._square_sum = self._sum[self.index], self._square_sum[self.index]

    def _dense(self, sums: Tensor) -> Tensor:
        mean = sums.to(self._exact) / max(1, self.num_samples)
        if self.index is None:
            return mean.view(self._shape)
        dense = mean.new_zeros(self._shape)
        dense.view(-1)[self.index] = mean
        return dense


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which positions go on after the first samples, as SpIEL's candidates.

    Attributes:
        keep: By weight: how many.
        score: From a weight's name and sums so far to scores in its shape.
    """

    keep: Mapping[str, int]
    score: Callable[[str, GradientSums], Tensor]


def gradient_sums(
    model: PreTrainedModel,
    weights: Mapping[str, nn.Parameter],
    calibration: Calibration,
    *,
    dtype: torch.dtype = torch.float32,
    pruning: Pruning | None = None,
) -> Sums:
    """Sum the gradients of some weights, over all samples in their order.

    Args:
        model: On its device; left as it was, gradients of all parameters dropped.
        weights: Which, by name. Everything else is frozen meanwhile, so that backward ends at the
            lowest of them.
        calibration: Samples and loss.
        dtype: Of the sums.
        pruning: Go on with fewer positions after the first samples.
    """
    sums = {name: GradientSums(weight, dtype) for name, weight in weights.items()}
    device = model.device
    with _only_these_need_gradients(model, weights, sums):
        used = 0
        for sample in calibration.samples:
            num_targets = count_targets([sample])
            if not num_targets:
                continue
            on_device = {name: tensor.to(device) for name, tensor in sample.items()}
            with calibration.autocast(device):
                loss = calibration.objective(model, on_device).loss
            torch.autograd.backward(loss / num_targets)
            used += 1
            for entry in sums.values():
                entry.num_samples = used
            if pruning is not None and used == SAMPLES_BEFORE_PRUNING:
                for name, entry in sums.items():
                    entry.prune(pruning.score(name, entry), pruning.keep[name])
    return sums


@contextmanager
def _only_these_need_gradients(
    model: PreTrainedModel, weights: Mapping[str, nn.Parameter], sums: Sums
) -> Iterator[None]:
    """Dropout off, these weights' gradients to their sums, no others; afterwards as before."""
    was_training = model.training
    required = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in required:
        parameter.requires_grad_(False)
        parameter.grad = None
    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handle = weight.register_post_accumulate_grad_hook(_adder(sums[name]))  # type: ignore[no-untyped-call]
        handles.append(handle)
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
        for parameter, needed in required:
            parameter.requires_grad_(needed)


def _adder(sums: GradientSums) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        sums.add(weight.grad)
        weight.grad = None

    return add
