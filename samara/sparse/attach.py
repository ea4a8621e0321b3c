"""Attach sparse training to any Hugging Face model, from outside, and take it off again.

All weights are frozen. Each tensor of the support gets its state
(:class:`samara.sparse.update.Selected`), and each module that uses it a tap on its output
(:mod:`samara.sparse.gradients`): ``nn.Linear``, ``nn.Embedding``, transformers' ``Conv1D`` and
CoLA's two factors, tied weights included. Every other module, the matrix to the vocabulary (which
the chunked cross-entropy reads without calling its module), and everything under
``gradient_path: dense`` take the dense path: the weight itself asks for its gradient, and a hook
gathers the selected entries and frees the rest as soon as autograd has it, one weight at a time.

Names, state, saving and devices of the model stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samara.errors import ConfigError, did_you_mean
from samara.model.cola import LowRankLinear
from samara.sparse.gradients import KeptInput, Plan, make_plan, tap
from samara.sparse.gradients_embedding import EmbeddingPlan, make_embedding_plan, tap_embedding
from samara.sparse.support import Support
from samara.sparse.update import Selected
from samara.train.objective import output_weight

GradientPath = Literal["auto", "dense"]
Kept = dict[bytes, KeptInput]


@dataclass(frozen=True, kw_only=True)
class Use:
    """A module that uses a weight, and under which attribute."""

    module: nn.Module
    attribute: str


class Attachment:
    """Sparse training of a model, while it lasts; also a context manager that detaches.

    Attributes:
        selected: The trained entries by tensor name.
        plans: How their gradients are computed, by tensor name; of the dense path: none.
    """

    def __init__(
        self, model: PreTrainedModel, support: Support, *, gradient_path: GradientPath = "auto"
    ) -> None:
        """Freeze the model and attach to it, on the device it is on.

        Raises:
            ConfigError: If the support names a tensor that the model has not, or of another shape.
        """
        check_support(model, support)
        self._model, self._path = model, gradient_path
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        parameters = dict(model.named_parameters())
        # In the order of the model, however the support came about: sums depend on it.
        self.selected = {
            name: Selected(name, parameters[name], support.tensors[name])
            for name in parameters
            if name in support.tensors
        }
        self.plans: dict[str, Plan | EmbeddingPlan] = {}
        self._removers: list[Callable[[], None]] = []
        self._kept: Kept = {}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def support(self) -> Support:
        """What is trained now."""
        return Support(tensors={name: e.support for name, e in self.selected.items()})

    @property
    def state_bytes(self) -> int:
        """Bytes that training keeps beside the model: positions, values, moments, gradients."""
        own = sum(entry.state_bytes for entry in self.selected.values())
        places = [
            plan.index
            for name, plan in self.plans.items()
            if plan.index is not self.selected[name].index
        ]
        return own + sum(place.numel() * place.element_size() for place in places)

    def detach(self) -> None:
        """Take off all taps and hooks; the weights keep the trained values."""
        self._disconnect()
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._required[name])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take taps and hooks off for a while: the model is then frozen, and plain."""
        self._disconnect()
        try:
            yield
        finally:
            self._connect()

    def restore(self) -> None:
        """Put the base model's numbers back, bit for bit."""
        for entry in self.selected.values():
            entry.write(entry.base)

    def grow(self, support: Support) -> None:
        """Select more entries; those of before keep their values and state.

        Raises:
            ConfigError: As at the start.
        """
        check_support(self._model, support)
        parameters = dict(self._model.named_parameters())
        self._disconnect()
        for name, tensor in support.tensors.items():
            before = self.selected.get(name)
            self.selected[name] = (
                before.grown(tensor) if before else Selected(name, parameters[name], tensor)
            )
        ordered = {name: self.selected[name] for name in parameters if name in self.selected}
        self.selected.clear()
        self.selected.update(ordered)
        self._connect()

    def _connect(self) -> None:
        used = uses(self._model)
        head = output_weight(self._model)
        for entry in self.selected.values():
            modules = used[id(entry.weight)]
            has_taps = all(_can_tap(use) for use in modules) and entry.weight is not head
            if self._path == "dense" or not has_taps:
                self._removers.append(_gather_dense(entry))
                continue
            for use in modules:
                plan, remover = _tap(use, entry, self._kept)
                self.plans[entry.name] = plan
                self._removers.append(remover)

    def _disconnect(self) -> None:
        for remove in reversed(self._removers):
            remove()
        self._removers.clear()
        self.plans.clear()
        self._kept.clear()


def check_support(model: nn.Module, support: Support) -> None:
    """Refuse a support that does not fit the model.

    Raises:
        ConfigError: Naming the first tensor that does not fit.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, tensor in support.tensors.items():
        if name not in shapes:
            raise ConfigError(f"support: the model has no {name}{did_you_mean(name, shapes)}")
        if shapes[name] != tensor.shape:
            raise ConfigError(
                f"support: {name} is {tensor.shape} there, {shapes[name]} in this model"
            )


def uses(model: nn.Module) -> dict[int, list[Use]]:
    """Which modules hold each parameter, by its ``id``; tied ones have several."""
    found: dict[int, list[Use]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append(Use(module=module, attribute=attribute))
    return found


def is_linear_weight(use: Use) -> bool:
    """Whether a parameter is the matrix of a linear map, one of CoLA's factors included."""
    if isinstance(use.module, LowRankLinear):
        return True
    return isinstance(use.module, (nn.Linear, Conv1D)) and use.attribute == "weight"


def input_dim(use: Use) -> int:
    """The dimension of a linear map's stored matrix that faces its input."""
    return 1 if isinstance(use.module, nn.Linear) else 0


def _can_tap(use: Use) -> bool:
    # Subclasses of nn.Linear may never be called, as the one in torch's MultiheadAttention.
    plain = type(use.module) in (nn.Linear, nn.Embedding, Conv1D) and use.attribute == "weight"
    if isinstance(use.module, nn.Embedding):
        return plain and use.module.max_norm is None and not use.module.scale_grad_by_freq
    return plain or isinstance(use.module, LowRankLinear)


def _tap(
    use: Use, entry: Selected, shared: Kept
) -> tuple[Plan | EmbeddingPlan, Callable[[], None]]:
    if isinstance(use.module, nn.Embedding):
        rows = make_embedding_plan(
            entry.support, padding_idx=use.module.padding_idx, device=entry.weight.device
        )
        return rows, _after_forward(
            use.module, lambda output, ids: tap_embedding(output, ids, entry.values, rows)
        )
    plan = make_plan(entry.support, input_dim=input_dim(use), positions=entry.index)
    columns = b"" if plan.inputs is None else plan.inputs.cpu().numpy().tobytes()
    kept = shared.setdefault(columns, KeptInput(plan.inputs))

    def tapped(output: Tensor, source: Tensor) -> Tensor:
        return tap(output, source, entry.values, plan, kept)

    if isinstance(use.module, LowRankLinear):
        return plan, _after_factor(use.module, use.attribute, tapped)
    return plan, _after_forward(use.module, tapped)


def _after_forward(
    module: nn.Module, tapped: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """Tap what a module returns; returns what takes the tap off."""

    def hook(
        _: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        source = arguments[0] if arguments else next(iter(keywords.values()))
        return tapped(output, source)

    return module.register_forward_hook(hook, with_kwargs=True).remove


def _after_factor(
    module: LowRankLinear, attribute: str, tapped: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """Tap one product of a low-rank linear: x A or h B."""
    product = "down" if attribute == "cola_a" else "up"
    plain = getattr(type(module), product)

    def forward(source: Tensor) -> Tensor:
        output: Tensor = plain(module, source)
        return tapped(output, source) if torch.is_grad_enabled() else output

    setattr(module, product, forward)
    return lambda: delattr(module, product)


def _gather_dense(entry: Selected) -> Callable[[], None]:
    """The dense path: autograd's whole gradient, of which the selected entries are kept."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        grad = weight.grad.flatten().index_select(0, entry.index).to(entry.values.dtype)
        weight.grad = None
        entry.values.grad = grad if entry.values.grad is None else entry.values.grad.add_(grad)

    entry.weight.requires_grad_(True)
    handle = entry.weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def remove() -> None:
        handle.remove()
        entry.weight.requires_grad_(False)

    return remove


def linear_weights(model: PreTrainedModel) -> dict[str, Use]:
    """The matrices of the trunk's linear maps: no embedding, no head, nothing tied to either."""
    trunk = {id(module) for module in model.base_model.modules()}
    head = output_weight(model)
    by_parameter = uses(model)
    return {
        name: by_parameter[id(parameter)][0]
        for name, parameter in model.named_parameters()
        if parameter is not head
        and parameter.ndim == 2
        and all(is_linear_weight(u) and id(u.module) in trunk for u in by_parameter[id(parameter)])
    }
