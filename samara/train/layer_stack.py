"""The stack of layers of a model of ``transformers``, and what a layer takes and gives.

Found and tried rather than listed by family: the one list that is as long as the configuration says
there are layers, called once with two tokens to see that each layer turns hidden states into hidden
states of the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.errors import ConfigError
from samara.train.parallel import uncompiled

PRE_NORM = frozenset({"gpt2", "llama", "mistral", "opt", "qwen2", "qwen3", "samara"})
"""Families whose layers only add to the residual stream. The others normalise it, as BERT, or have
not been looked at."""


@dataclass(frozen=True, kw_only=True)
class LayerStack:
    """The layers of a model.

    Attributes:
        layers: From the bottom.
        model_type: The family's name in ``transformers``.
        tuple_size: A layer returns a tuple of so many, hidden states first; 0: these alone.
        is_pre_norm: Whether a layer only adds to the residual stream.
        own_rate: The model's own rate of layer dropping (LayerDrop, as in OPT and BART).
    """

    layers: tuple[nn.Module, ...]
    model_type: str
    tuple_size: int
    is_pre_norm: bool
    own_rate: float


def find_layers(model: nn.Module) -> LayerStack:
    """Find the layers of an encoder or decoder.

    Args:
        model: A model of ``transformers``, or what wraps one, as ``peft`` does.

    Raises:
        ConfigError: If there is no such stack, or its layers cannot stand in for one another.
    """
    inner = _pretrained(model)
    settings: dict[str, Any] = inner.config.to_dict()
    if inner.config.is_encoder_decoder:
        raise _unfit(inner, "has an encoder and a decoder, and one stack of layers is needed")
    if inner.main_input_name != "input_ids":
        raise _unfit(inner, f"takes {inner.main_input_name}, and a model of text is needed")
    layers = _one_list(inner)
    return LayerStack(
        layers=layers,
        model_type=inner.config.model_type,
        tuple_size=_try_out(inner, layers),
        is_pre_norm=inner.config.model_type in PRE_NORM
        and settings.get("do_layer_norm_before", True),
        own_rate=settings.get("layerdrop", 0.0),
    )


def _pretrained(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ConfigError(
        f"layer_dropout: {type(model).__name__} holds no model of transformers; its layers are not "
        "known"
    )


def _one_list(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    number = model.config.num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == number and not inside:
            found[name] = module
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise _unfit(model, f"should have one list of its {number} layers; found: {names}")
    (layers,) = found.values()
    return tuple(layers)


def _try_out(model: PreTrainedModel, layers: tuple[nn.Module, ...]) -> int:
    """Run the model on two tokens; return what :attr:`LayerStack.tuple_size` says."""
    order: list[int] = []
    sizes: set[int] = set()

    def look(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        first = output[0] if isinstance(output, tuple) else output
        order.extend(number for number, one in enumerate(layers) if one is layer)
        sizes.add(len(output) if isinstance(output, tuple) else 0)
        if not (isinstance(hidden, Tensor) and isinstance(first, Tensor)) or (
            hidden.shape != first.shape
        ):
            raise _unfit(model, "has layers that do not turn hidden states into others like them")

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(uncompiled(model))
        for layer in layers:
            stack.callback(layer.register_forward_hook(look, with_kwargs=True).remove)
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    if order != list(range(len(layers))) or len(sizes) != 1:
        raise _unfit(model, "does not call each of its layers once, from the first to the last")
    return sizes.pop()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _unfit(model: PreTrainedModel, why: str) -> ConfigError:
    return ConfigError(f"layer_dropout: {type(model).__name__} {why}")
