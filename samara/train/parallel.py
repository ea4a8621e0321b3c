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
    """Compile the decoder in place; names, state and saving stay as they are.

    The whole decoder is one graph: with layer-wise widths every layer has other shapes, and
    compiled one by one they would run into torch's recompilation limit.

    Raises:
        ResourceError: If this machine has no C++ compiler, which ``torch.compile`` needs on CPU.
    """
    compiler = os.environ.get("CXX", "g++")
    if model.device.type == "cpu" and backend == "inductor" and shutil.which(compiler) is None:
        raise ResourceError(
            f"training.compile: needs a C++ compiler, and {compiler} is not there; install one, "
            "or set training.compile=false"
        )
    model.base_model.compile(backend=backend)


@contextlib.contextmanager
def uncompiled(model: PreTrainedModel) -> Iterator[None]:
    """Call a compiled model's decoder as it was before: evaluation is not worth a graph of its own.

    On CUDA (torch 2.11) the graph that would be compiled for it, without gradients, also fails in
    attention with a packed mask. Kernels that are compiled by themselves, as FlexAttention, stay
    so: ``torch.compiler.set_stance("force_eager")`` would run that one without its kernel.
    """
    decoder = model.base_model
    compiled = decoder._compiled_call_impl  # where Module.compile() leaves its result
    decoder._compiled_call_impl = None
    try:
        yield
    finally:
        decoder._compiled_call_impl = compiled
