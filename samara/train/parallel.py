"""Where a model runs, in which number format, on how many processes: applied from outside, here.

A model knows nothing of devices, autocast, compilation or other processes; this file is the only
one of the training layer that does.

Several processes are PyTorch's own: DDP keeps the whole model in each and adds gradients up; FSDP2
(``fully_shard``) keeps a share of weights, gradients and optimizer state in each, and gathers one
layer at a time while it runs. Both take a mean of gradients over the processes; the loop's loss is
a sum over all targets, so that its divisor is made smaller by their number (:class:`Workers`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from samara.errors import ConfigError, ResourceError
from samara.launch import launch
from samara.train.processes import total
from samara.train.stop import SIGNALS

Precision = Literal["float32", "bfloat16"]
Parallel = Literal["none", "ddp", "fsdp"]
T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another: a checkpoint of the first one must fit in."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place in a training run.

    Attributes:
        device: Where the model lives.
        rank: This process among all that train together.
        world_size: Their number.
        parallel: How they share the model.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    parallel: Parallel = "none"

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0


def choose_place(device: Literal["auto", "cpu", "cuda"]) -> Place:
    """Choose the device; ``auto`` takes a CUDA GPU if there is one.

    Raises:
        ResourceError: If CUDA is asked for and not there.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ResourceError(
            "training.device: cuda is asked for, but torch sees no CUDA device; use auto or cpu"
        )
    chosen = torch.device("cpu")
    if found and device != "cpu":
        chosen = torch.device("cuda", torch.cuda.current_device())
    if distributed.is_available() and distributed.is_initialized():
        return Place(
            device=chosen,
            rank=distributed.get_rank(),
            world_size=distributed.get_world_size(),
        )
    return Place(device=chosen)


@contextlib.contextmanager
def join_processes(
    device: Literal["auto", "cpu", "cuda"], parallel: Parallel | None
) -> Iterator[Place]:
    """Take this process's place in the run; with others, once all of them are there.

    Args:
        device: As :func:`choose_place`.
        parallel: How the model is shared. None: ``ddp`` if ``torchrun`` started several processes.

    Raises:
        ConfigError: If that and how the process was started disagree.
        ResourceError: If CUDA is asked for and not there, or has fewer GPUs than processes.
    """
    started = launch()
    number = 1 if started is None else started.world_size
    chosen: Parallel = parallel or ("ddp" if number > 1 else "none")
    if chosen == "none" and number > 1:
        raise ConfigError(
            f"training.parallel: none is for one process, and {number} were started; start one, or "
            "set ddp or fsdp"
        )
    if chosen != "none" and started is None:
        raise ConfigError(
            f"training.parallel: {chosen} is for processes that torchrun starts, and this one was "
            "started alone; use `torchrun --nproc_per_node=2 -m samara …`, or leave it out"
        )
    place = choose_place(device)
    if chosen == "none" or started is None:
        yield place
        return
    on = place.device
    if on.type == "cuda":
        if started.local_rank >= torch.cuda.device_count():
            raise ResourceError(
                f"training.device: process {started.local_rank + 1} of this machine has no GPU, "
                f"there are {torch.cuda.device_count()}; start as many processes as GPUs"
            )
        on = torch.device("cuda", started.local_rank)
        torch.cuda.set_device(on)
    # Tensors on the CPU, as of checkpoints, go by gloo on CUDA machines too.
    backend = "cpu:gloo,cuda:nccl" if on.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    yield Place(device=on, rank=started.rank, world_size=number, parallel=chosen)
    # Not after an error: the end of a group whose other members are stuck may wait for them.
    distributed.destroy_process_group()


class _Whole(nn.Module):
    """A model as the root of what is wrapped: inside its ``forward`` all weights are usable.

    Objectives call parts of a model (its trunk, then its output matrix), and wrappers look after
    the weights while the ``forward`` of the module that they wrap runs.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[PreTrainedModel], T]) -> T:
        """What ``work`` makes of the model."""
        return work(self.model)


class Workers:
    """The processes that train one model together, or one alone.

    Args:
        model: On its device, the same in all processes; ``fsdp`` replaces its parameters by shards,
            so make the optimizer afterwards.
        place: This process's.
    """

    def __init__(self, model: PreTrainedModel, place: Place) -> None:
        self.world_size = place.world_size
        self._place = place
        root = _Whole(model)
        self._root: nn.Module = root
        if place.parallel == "fsdp":
            mesh = init_device_mesh(place.device.type, (place.world_size,))
            layers: Any = model.base_model.layers
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(root, mesh=mesh)
        elif place.parallel == "ddp":
            gpus = [place.device] if place.device.type == "cuda" else None
            self._root = DistributedDataParallel(
                root, device_ids=gpus, gradient_as_bucket_view=True
            )

    def run(self, work: Callable[[PreTrainedModel], T]) -> T:
        """Do what needs the model's weights, a training pass or an evaluation; return its result.

        Gradients come of tensors that the result is or, as a tuple, holds.
        """
        if isinstance(self._root, DistributedDataParallel) and not torch.is_grad_enabled():
            return work(self._root.module.model)  # nothing to prepare for
        result: T = self._root(work)
        return result

    def put_away(self) -> None:
        """Leave only this process's shards: after work without a backward pass."""
        if isinstance(self._root, FSDPModule):
            self._root.reshard()

    def passing(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Entered around forward and backward of a micro-batch.

        DDP adds the gradients of a step up once, after its last micro-batch. FSDP2 does so after
        each: it has no room for whole gradients.
        """
        if isinstance(self._root, DistributedDataParallel) and not is_last:
            return self._root.no_sync()
        return contextlib.nullcontext()

    def agree(self, num_targets: int, signal_number: int | None) -> tuple[int, int | None]:
        """Before a step: the targets of all processes, and the signal that any of them caught."""
        if self.world_size == 1:
            return num_targets, signal_number
        caught = [int(signal_number == number) for number in SIGNALS]
        targets, *counts = total([num_targets, *caught])
        known = [number for number, count in zip(SIGNALS, counts, strict=True) if count]
        return targets, known[0] if known else None

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    @staticmethod
    def norm(parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of all gradients together, of the whole model."""
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = get_total_norm(grads)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context of a forward pass: bfloat16 autocast over float32 weights, or nothing."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def compile_model(
    model: PreTrainedModel, *, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile the decoder's layers in place; names, state and saving stay as they are.

    Each layer is a graph of its own, and equal layers share one. Layer-wise widths give every layer
    other shapes: from the second on, the widths that differ are variables of the graph, so a design
    of any depth takes about two compilations. Two settings of torch, which are those of the whole
    process, let the shapes of weights be variables.

    Raises:
        ResourceError: If this machine has no C++ compiler, which ``torch.compile`` needs on CPU.
    """
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and backend == "inductor" and shutil.which(compiler) is None:
        raise ResourceError(
            f"training.compile: needs a C++ compiler, and {compiler} is not there; install one, "
            "or set training.compile=false"
        )
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    layers: Any = model.base_model.layers
    for layer in layers:
        layer.compile(backend=backend)


@contextlib.contextmanager
def uncompiled(model: PreTrainedModel) -> Iterator[None]:
    """Call a compiled model's layers as they were: evaluation is not worth graphs of its own.

    On CUDA (torch 2.11) a graph that is compiled for it, without gradients, also fails in
    attention with a packed mask. Kernels that are compiled by themselves, as FlexAttention, stay
    so: ``torch.compiler.set_stance("force_eager")`` would run that one without its kernel.
    """
    # Module.compile() leaves its result in this attribute.
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
