"""What a batch costs by the number of active layers, measured on this machine.

Compute is the CPU time of this process for forward, backward and update; the depths take turns, and
the median of each counts, so that a neighbour's load falls on all alike. Activations are the bytes
of the distinct tensors that autograd keeps for backward, parameters left out. The peak is modelled
from them: weights, and for each trained number its gradient and AdamW's two moments, beside them.
Under activation checkpointing one layer's activations come on top while it is recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samara.data.rows import Batch
from samara.federated.client import PassFlops, Trainer
from samara.federated.devices import CostModel
from samara.measure.flop_counter import flop_counter
from samara.train.layer_dropout import LayerDropout
from samara.train.layer_rates import LayerDropoutConfig
from samara.train.parallel import autocast

LARGEST_RATE = 0.99


def depths_to_try(num_layers: int, *, drops: bool) -> list[int]:
    """Numbers of active layers to measure: all, half and a quarter; only all if none is dropped."""
    if not drops:
        return [num_layers]
    return sorted({max(1, num_layers // 4), max(1, num_layers // 2), num_layers})


def measure_flops(trainer: Trainer, batch: Batch, *, drops: bool) -> PassFlops:
    """FLOPs per token of forward and backward, counted.

    Args:
        trainer: With the model.
        batch: Of training rows.
        drops: Whether layers will be dropped.
    """
    tokens = batch["input_ids"].numel()
    counts = {}
    for depth in {depths_to_try(trainer.num_layers, drops=drops)[0], trainer.num_layers}:
        with flop_counter() as counter, _undisturbed(trainer):
            _pass(trainer, batch, depth)
        counts[depth] = counter.get_total_flops() / tokens
    least, most = min(counts), max(counts)
    per_layer = (counts[most] - counts[least]) / (most - least) if most > least else 0.0
    return PassFlops(fixed=counts[most] - most * per_layer, per_layer=per_layer)


def calibrate(trainer: Trainer, batch: Batch, *, drops: bool, repetitions: int) -> CostModel:
    """Measure seconds and bytes of a batch; the model is as before afterwards.

    Args:
        trainer: With the model.
        batch: Of training rows.
        drops: Whether layers will be dropped; if not, everything is a fixed cost.
        repetitions: Of each depth.
    """
    depths = depths_to_try(trainer.num_layers, drops=drops)
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    with _undisturbed(trainer):
        saved = {depth: _saved_bytes(trainer, batch, depth) for depth in depths}
        for _ in range(repetitions):
            for depth in depths:
                seconds[depth].append(_step_seconds(trainer, batch, depth))
    medians = [float(np.median(seconds[depth])) for depth in depths]
    time_fit = fit_line(depths, medians)
    bytes_fit = fit_line(depths, [float(saved[depth]) for depth in depths])
    return CostModel(
        seconds_fixed=time_fit[0],
        seconds_per_layer=time_fit[1],
        bytes_fixed=bytes_fit[0] + _held_bytes(trainer),
        bytes_per_layer=bytes_fit[1],
        r_squared=time_fit[2],
        basis="measured",
        source=(
            f"CPU time of this machine, {torch.get_num_threads()} thread(s), median of "
            f"{repetitions}, batch {tuple(batch['input_ids'].shape)}, depths {depths}"
        ),
    )


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float | None]:
    """Least squares: the value at 0, the slope, and R² (None of fewer than three points).

    Neither may be negative, as costs are not: then the line goes through 0, or is level.
    """
    x, y = np.array(xs, dtype=np.float64), np.array(ys, dtype=np.float64)
    if len(x) == 1:
        return float(y[0]), 0.0, None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    start = float(y.mean() - slope * x.mean())
    if slope < 0:
        start, slope = float(y.mean()), 0.0
    if start < 0:
        start, slope = 0.0, float((x * y).sum() / (x * x).sum())
    if len(x) == 2:
        return start, slope, None
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - start - slope * x) ** 2).sum())
    return start, slope, 1 - rest / spread if spread > 0 else 1.0


def _pass(trainer: Trainer, batch: Batch, depth: int) -> None:
    """Forward and backward with so many active layers; under ``fedadapter`` trained ones."""
    model, num_layers = trainer.model, trainer.num_layers
    model.train()
    held: Any = nullcontext()
    dropout: Any = nullcontext()
    if trainer.config.method == "fedadapter":
        held = trainer.only_upper(depth)
    elif depth < num_layers:
        config = LayerDropoutConfig(
            rate=1 - depth / num_layers, shape="uniform", max_rate=LARGEST_RATE
        )
        dropout = LayerDropout(model, config, seed=0)
        held = dropout.hold(batch=0)
    with dropout, held:
        with autocast(model.device, trainer.config.local.precision):
            loss = trainer.objective(model, batch).loss
        torch.autograd.backward(loss)


def _step_seconds(trainer: Trainer, batch: Batch, depth: int) -> float:
    """CPU seconds of a pass and its update."""
    optimizer = trainer.payload.optimizer()
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
    clock: Callable[[], float] = (
        time.perf_counter if trainer.model.device.type == "cuda" else time.process_time
    )
    started = clock()
    _pass(trainer, batch, depth)
    optimizer.step()
    optimizer.zero_grad()
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def _saved_bytes(trainer: Trainer, batch: Batch, depth: int) -> int:
    """Bytes of the distinct storages that a pass keeps for backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in trainer.model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _pass(trainer, batch, depth)
    return sum(found.values())


def _held_bytes(trainer: Trainer) -> float:
    """Weights, gradients of what is trained, and AdamW's moments of it."""
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return float(weights + trainer.payload.held_bytes)


@contextmanager
def _undisturbed(trainer: Trainer) -> Iterator[None]:
    """Leave weights, gradients and random numbers as they were."""
    before = trainer.tensors()
    devices = [trainer.model.device] if trainer.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    trainer.load(before)
    trainer.payload.clear()
