"""Where and in which number format a model runs: applied to the model from outside, in one place.

A model knows nothing of devices, autocast or compilation; this file is the only one of the training
layer that does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed
from transformers import PreTrainedModel

from samara.errors import ResourceError

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place in a training run.

    Attributes:
        device: Where the model lives.
        rank: This process among all that train together.
        world_size: Their number.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1


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
