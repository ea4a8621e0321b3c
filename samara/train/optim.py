"""The optimizer: which parameters get which update and decay, and state keyed by parameter name.

:class:`Optimizer` wraps ``torch.optim.AdamW``, or ``torch.optim.Muon`` on the hidden matrices and
AdamW on the rest, behind one small interface. Its state is a flat mapping of named tensors
(``model.layers.0.mlp.up_proj.weight.exp_avg``), so that a checkpoint is a safetensors file and a
growth operator can map the state of one model onto another by the names it maps weights with.

AdamW runs fused on CPU too: a fifth of the time of the other paths there, and deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.errors import CheckpointError
from samara.model.cola import LowRankLinear
from samara.train.config import AdamW, Muon
from samara.train.config import Optimizer as OptimizerConfig
from samara.train.objective import output_weight
from samara.train.processes import like

Group = dict[str, Any]


class Updater(Protocol):
    """What the loop and checkpoints need of an optimizer; :class:`Optimizer` is the usual one."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is updated, with the gradients that the norm is taken of."""
        ...

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        ...

    def step(self) -> None:
        """Update the parameters from their gradients."""
        ...

    def zero_grad(self) -> None:
        """Drop all gradients."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state."""
        ...


class Optimizer:
    """Updates a model's trainable parameters.

    Args:
        model: The model. Parameters without ``requires_grad`` are left alone; tied ones count once.
        config: The ``optimizer:`` section of a recipe.
    """

    def __init__(self, model: PreTrainedModel, config: OptimizerConfig) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if isinstance(config, Muon):
            self._optimizers = _muon(model, self._parameters, config)
        else:
            self._optimizers = [_adamw(_decay_groups(self._parameters.values(), config), config)]
        self._owner = {
            parameter: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are updated."""
        return list(self._parameters.values())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step; groups with a peak of their own keep pace."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

    def step(self) -> None:
        """Update the parameters from their gradients."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as ``{parameter name}.{key}``: the live tensors, not copies.

        AdamW keeps ``exp_avg``, ``exp_avg_sq`` and ``step``; Muon keeps ``momentum_buffer``.
        """
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._owner[parameter].state.get(parameter, {}).items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state; a parameter without an entry starts afresh.

        Raises:
            CheckpointError: If an entry belongs to no parameter here, is of another optimizer, or
                has another shape.
        """
        loaded: dict[str, dict[str, Tensor]] = {name: {} for name in self._parameters}
        for full_name, value in state.items():
            name, _, key = full_name.rpartition(".")
            if name not in loaded:
                raise CheckpointError(
                    f"optimizer state: {full_name} belongs to no trainable parameter of this model"
                )
            parameter = self._parameters[name]
            if key not in _state_keys(self._owner[parameter]):
                raise CheckpointError(
                    f"optimizer state: {full_name} is of another optimizer; this one keeps "
                    f"{', '.join(_state_keys(self._owner[parameter]))} of that parameter"
                )
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimizer state: {full_name} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
            loaded[name][key] = like(parameter, value)
        for name, parameter in self._parameters.items():
            owner = self._owner[parameter]
            owner.state.pop(parameter, None)
            if loaded[name]:
                owner.state[parameter] = loaded[name]


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.Muon):
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def is_hidden_matrix(model: PreTrainedModel) -> dict[str, bool]:
    """Say of each parameter whether Muon takes it: matrices, but no embedding and no output head.

    Each factor of a low-rank linear is a matrix of its own.
    """
    vocabulary = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    vocabulary.add(id(output_weight(model)))
    return {
        name: parameter.ndim == 2 and id(parameter) not in vocabulary
        for name, parameter in model.named_parameters()
    }


def _decay_groups(parameters: Iterable[nn.Parameter], config: AdamW) -> list[Group]:
    """One group with decay, one without, by :attr:`AdamW.decay`."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if config.decay == "all" or parameter.ndim >= 2 else plain).append(parameter)
    groups: list[Group] = [
        {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[Group], config: AdamW) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _muon(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], config: Muon
) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices, AdamW on embedding, head and norms."""
    hidden = is_hidden_matrix(model)
    matrices = [p for name, p in parameters.items() if hidden[name]]
    rest = [p for name, p in parameters.items() if not hidden[name]]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                _muon_groups(model, matrices, config),
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                ns_steps=config.ns_steps,
                adjust_lr_fn=config.adjust_lr,
            )
        )
    if rest:
        adamw = AdamW(
            lr=config.adamw_lr or config.lr,
            betas=config.adamw_betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        groups = _decay_groups(rest, adamw)
        for group in groups:
            group["lr_scale"] = adamw.lr / config.lr
        optimizers.append(_adamw(groups, adamw))
    return optimizers


def _muon_groups(model: PreTrainedModel, matrices: list[nn.Parameter], config: Muon) -> list[Group]:
    """Groups of equal ``lr_scale``.

    Muon's ``original`` rule multiplies the rate by ``sqrt(max(1, out / in))`` and takes a matrix to
    be stored (out, in), as ``nn.Linear`` does. Low-rank factors are stored (in, out): torch would
    raise the rate of the factor that narrows (in -> r) and not of the one that widens (r -> out).
    ``lr_scale`` puts that right; the decay is divided by it, so that lr · decay stays what the
    recipe says. ``match_rms_adamw`` depends on the longer side only and needs none of this.
    """
    stored_in_out = {
        id(factor)
        for module in model.modules()
        if isinstance(module, LowRankLinear)
        for factor in (module.cola_a, module.cola_b)
    }
    by_scale: dict[float, list[nn.Parameter]] = {}
    for matrix in matrices:
        scale = 1.0
        if config.adjust_lr == "original" and id(matrix) in stored_in_out:
            rows, columns = matrix.shape
            scale = math.sqrt(max(1.0, columns / rows) / max(1.0, rows / columns))
        by_scale.setdefault(scale, []).append(matrix)
    return [
        {"params": params, "weight_decay": config.weight_decay / scale, "lr_scale": scale}
        for scale, params in by_scale.items()
    ]
