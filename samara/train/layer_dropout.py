"""Stochastic transformer layer dropout: in each pass of training some layers are not called.

STLD is from DropPEFT (arXiv 2503.10217), for any encoder or decoder of ``transformers``, whole or
with adapters inside. With h the residual stream and g = 0 or 1 the gate of a layer,

    h + g s (layer(h) - h)

so that a layer left out costs no time, keeps nothing for backward, and leaves its parameters
without gradient. Evaluation calls all layers. The abstract of the paper says this much; gates,
rates and scaling are ours (:mod:`samara.train.layer_rates`).

**Attached from outside.** While dropout is attached, each layer is an instance of a subclass of its
class with a ``__call__`` of its own; attributes, parameters and their names stay as they are, and
copies and pickles are of the original class. The gate thus stands outside of what
``layer.compile()`` compiles, which sees no gate and needs no graph for it, and outside of
activation checkpointing, which recomputes only what was called. Scaling stands there too: hidden
states that ``transformers`` collects are those that a layer made, before they are scaled.

**Drawn from a counter.** The gates of a pass are a function of (seed, node, round, batch): any of
them can be drawn again without those before it.

    with LayerDropout(model, LayerDropoutConfig(rate=0.5), seed=0) as dropout:
        for number, batch in enumerate(batches):
            with dropout.hold(batch=number):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # a gradient of 0 would move what was left out
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache

from samara.data.draws import Draws, Purpose
from samara.errors import ConfigError
from samara.measure.budget import Attention, Budget
from samara.measure.flop_counter import flop_counter
from samara.model.layers import LayerContext
from samara.train.layer_rates import LayerDropoutConfig, LayerRates
from samara.train.layer_stack import LayerStack, find_layers
from samara.train.loop import AroundPass, Costs

Gates = tuple[bool, ...]
"""Of each layer whether it runs."""

SWITCH = "_layer_dropout_switch"
"""The attribute of a layer that says what becomes of it. Only attached layers have it."""

POINTS = 2**32
"""Positions that the sampling of a budgeted gate starts from: sums with them are exact."""


class LayerDropout:
    """The gates on the layers of one model.

    Attributes:
        rates: How often each layer runs.
        layers: The layers, from the bottom.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LayerDropoutConfig,
        *,
        seed: int,
        node: int = 0,
        trained: Iterable[nn.Parameter] | None = None,
    ) -> None:
        """Attach gates to a model; all layers run until :meth:`hold` is entered.

        Args:
            model: A model of ``transformers``, on its device; ``peft`` may have wrapped it.
            config: How much to drop.
            seed: Of the run.
            node: Which machine of a federation, by a number that stays the same over rounds.
            trained: Parameters that training changes; None: those that ask for a gradient.

        Raises:
            ConfigError: If the model's layers cannot be skipped, or the settings do not fit them.
        """
        stack = find_layers(model)
        self.rates = config.rates(len(stack.layers))
        self.layers = stack.layers
        self._seed, self._node = seed, node
        self._inverse = config.scale == "inverse_keep"
        if trained is None:
            trained = (p for p in model.parameters() if p.requires_grad)
        _check(stack, config, self.rates, trained)
        at_evaluation = config.scale == "survival_at_eval"
        self._switches = [
            _Switch(tuple_size=stack.tuple_size, evaluation_scale=keep if at_evaluation else 1.0)
            for keep in self.rates.keep
        ]
        for layer, switch in zip(self.layers, self._switches, strict=True):
            setattr(layer, SWITCH, switch)
            layer.__class__ = _gated(type(layer))  # type: ignore[arg-type] # mypy: no hash

    def gates(self, *, batch: int, round: int = 0) -> Gates:
        """Draw the gates of a pass; the same ones for the same numbers."""
        return draw_gates(self.rates, seed=self._seed, node=self._node, round=round, batch=batch)

    @contextmanager
    def hold(self, *, batch: int, round: int = 0) -> Iterator[Gates]:
        """Hold the gates of a pass during its forward, and give them.

        Backward may come later, unless what is recomputed in it spans several layers.

        Args:
            batch: The number of the pass in its round.
            round: The round; of training on one machine the step.
        """
        gates = self.gates(batch=batch, round=round)
        for switch, runs, keep in zip(self._switches, gates, self.rates.keep, strict=True):
            switch.held, switch.runs = True, runs
            switch.scale = 1 / keep if self._inverse and runs else 1.0
        try:
            yield gates
        finally:
            for switch in self._switches:
                switch.held, switch.runs, switch.scale = False, True, 1.0

    def around_pass(self, costs: Callable[[Gates], Costs]) -> AroundPass:
        """The training loop's hook: gates by step and micro-batch.

        Args:
            costs: What a pass costs that runs these layers, as :class:`LayerCosts`.
        """

        @contextmanager
        def around(step: int, number: int) -> Iterator[Costs]:
            with self.hold(round=step, batch=number) as gates:
                yield costs(gates)

        return around

    def detach(self) -> None:
        """Make the layers what they were; a second time it does nothing."""
        for layer in self.layers:
            if SWITCH in layer.__dict__:
                delattr(layer, SWITCH)
                layer.__class__ = type(layer).__mro__[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


@contextmanager
def dropping_layers(
    model: nn.Module,
    config: LayerDropoutConfig | None,
    *,
    seed: int,
    costs: Callable[[Gates], Costs],
    trained: Iterable[nn.Parameter] | None = None,
) -> Iterator[AroundPass | None]:
    """Attach layer dropout during training, and give the loop's hook ``around_pass`` for it.

    Args:
        model: As in :class:`LayerDropout`.
        config: How much to drop; None: nothing is attached and there is no hook.
        seed: Of the run.
        costs: What a pass costs that runs these layers, as :class:`LayerCosts`.
        trained: As in :class:`LayerDropout`.

    Raises:
        ConfigError: As :class:`LayerDropout`.
    """
    if config is None:
        yield None
        return
    with LayerDropout(model, config, seed=seed, trained=trained) as dropout:
        yield dropout.around_pass(costs)


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What a token costs, layer by layer.

    Attributes:
        rest: Everything outside of the layers.
        layers: Each layer; their ``peak_flops`` does not count.
    """

    rest: Costs
    layers: tuple[Costs, ...]

    @classmethod
    def of(
        cls, budget: Budget, *, sequence_length: int, masked: bool, peak_flops: float | None
    ) -> LayerCosts:
        """Those of one of Samara's designs.

        Args:
            budget: What the design costs.
            sequence_length: Tokens of a row.
            masked: Whether attention looks both ways; else MFU counts its causal half.
            peak_flops: FLOP/s of the device; None: no MFU.
        """
        head = budget.head_flops.training
        useful: Attention = "full" if masked else "causal"
        return cls(
            rest=Costs(flops_per_token=head, useful_flops_per_token=head, peak_flops=peak_flops),
            layers=tuple(
                Costs(
                    flops_per_token=layer.flops_per_token(sequence_length).training,
                    useful_flops_per_token=layer.flops_per_token(sequence_length, useful).training,
                )
                for layer in budget.layers
            ),
        )

    @classmethod
    def measured(
        cls, model: nn.Module, run_pass: Callable[[], int], *, peak_flops: float | None
    ) -> LayerCosts:
        """Those of any model, as torch counts them in two passes of all layers.

        Where nothing below the layers is trained, as with adapters, the lowest layer that runs
        makes no gradient for its input. The second pass asks for one, so that every layer is
        counted as one of the others; what the lowest saves, which there is one of in every pass,
        is taken off the rest. Exact where layers are equal.

        Args:
            model: As in :class:`LayerDropout`, before that is attached; not compiled.
            run_pass: Runs a forward and a backward in training mode, and returns the tokens of it.
                The gradients it leaves are for the caller to drop.
            peak_flops: FLOP/s of the device; None: no MFU.
        """
        layers = find_layers(model).layers
        names = {module: name for name, module in model.named_modules()}
        with flop_counter() as counter:
            tokens = run_pass()
        total = counter.get_total_flops()
        hook = layers[0].register_forward_pre_hook(_ask_for_gradient, with_kwargs=True)
        try:
            with flop_counter() as counter:
                run_pass()
        finally:
            hook.remove()
        by_layer = [_counted(counter, names[layer]) for layer in layers]

        def costs(flops: int) -> Costs:
            per_token = flops / tokens
            return Costs(
                flops_per_token=per_token, useful_flops_per_token=per_token, peak_flops=peak_flops
            )

        return cls(rest=costs(total - sum(by_layer)), layers=tuple(map(costs, by_layer)))

    def __call__(self, weights: Sequence[float]) -> Costs:
        """The costs of a pass by its gates, or of passes on average by probabilities to run."""
        pairs = list(zip(weights, self.layers, strict=True))
        return Costs(
            flops_per_token=self.rest.flops_per_token
            + sum(weight * layer.flops_per_token for weight, layer in pairs),
            useful_flops_per_token=self.rest.useful_flops_per_token
            + sum(weight * layer.useful_flops_per_token for weight, layer in pairs),
            peak_flops=self.rest.peak_flops,
        )


def _ask_for_gradient(_: nn.Module, args: Any, kwargs: Any) -> None:
    """Let the hidden states that enter a layer have a gradient, whatever made them."""
    hidden = _hidden(args, kwargs)
    if not hidden.requires_grad:
        hidden.requires_grad_()


def _counted(counter: FlopCounterMode, name: str) -> int:
    """FLOPs of a module, whose name the counter begins at the module that was called."""
    end = "." + ".".join(name.split(".")[-2:])
    found = {key: ops for key, ops in counter.get_flop_counts().items() if key.endswith(end)}
    return sum(found[min(found, key=len)].values()) if found else 0


# --- drawing ------------------------------------------------------------------------------------


def draw_gates(rates: LayerRates, *, seed: int, node: int, round: int, batch: int) -> Gates:
    """Draw which layers run in a pass; at least one does.

    Budgeted: systematic sampling of the layers in random order, which keeps every layer's
    probability and the budget exactly. In a fixed order some neighbours would never run together.
    Independent: each by its own probability; where none would run, the one nearest to it does.
    """
    draws = Draws(seed=seed, purpose=Purpose.LAYER_GATES, draw=round, row=batch, node=node)
    keep = np.asarray(rates.keep)
    if rates.budget is None:
        distance = draws.uniform(len(keep)) - keep
        runs = distance < 0
        if not runs.any():
            runs[distance.argmin()] = True
        return tuple(runs.tolist())
    runs = keep == 1.0
    chosen = rates.budget - int(runs.sum())
    if chosen:
        order = np.flatnonzero(~runs)
        order = order[draws.permutation(len(order))]
        ends = np.cumsum(keep[order])
        ends[-1] = chosen  # not a rounding error less
        start = draws.integers(1, below=POINTS) / POINTS
        runs[order[np.searchsorted(ends, start + np.arange(chosen), side="right")]] = True
    return tuple(runs.tolist())


# --- the layer's own __call__ -------------------------------------------------------------------


@dataclass(kw_only=True)
class _Switch:
    """What becomes of one layer.

    Attributes:
        tuple_size: The layer returns a tuple of so many; 0: the hidden states alone.
        evaluation_scale: Of its change of the residual stream in evaluation.
        held: Whether a pass holds its gates.
        runs: Whether it is called in training.
        scale: Of its change of the residual stream in training.
    """

    tuple_size: int
    evaluation_scale: float
    held: bool = False
    runs: bool = True
    scale: float = 1.0


@functools.cache
def _gated(original: type[nn.Module]) -> type[nn.Module]:
    """The class with a gate. One for all layers of a class: compiled layers share their graphs."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        switch: _Switch = self.__dict__[SWITCH]
        if self.training and switch.held:
            _refuse_cache(args, kwargs)
        if self.training and not switch.runs:
            return _pass_by(self, switch, args, kwargs)
        output = original.__call__(self, *args, **kwargs)
        scale = switch.scale if self.training else switch.evaluation_scale
        return output if scale == 1.0 else _scaled(output, _hidden(args, kwargs), scale)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        del protocol
        everything: Any = self.__getstate__()  # type: ignore[no-untyped-call]
        state = {key: value for key, value in everything.items() if key != SWITCH}
        return _blank, (original,), state

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    methods = {"__call__": call, "__reduce_ex__": reduce}
    return type(original.__name__, (original,), {**names, **methods})


def _blank(original: type[nn.Module]) -> nn.Module:
    """A module without state, for copying and unpickling."""
    return original.__new__(original)


def _pass_by(layer: nn.Module, switch: _Switch, args: Any, kwargs: Any) -> Any:
    """Return the layer's input as its output. Hooks are called as if the layer had made it."""
    hidden = _hidden(args, kwargs)
    output = (hidden, *(None,) * (switch.tuple_size - 1)) if switch.tuple_size else hidden
    before = layer.__dict__.get("forward")
    layer.__dict__["forward"] = lambda *_, **__: output
    try:
        return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before


def _scaled(output: Any, hidden: Tensor, scale: float) -> Any:
    """Add ``scale`` of the change to the input; nothing is kept for backward."""
    first = output[0] if isinstance(output, tuple) else output
    moved = torch.add(first, first - hidden, alpha=scale - 1)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _refuse_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A cache takes its length from its first layer: one that was left out makes it wrong."""
    for value in (*args, *kwargs.values()):
        cache = value.cache if isinstance(value, LayerContext) else value
        if isinstance(cache, Cache):
            raise ConfigError(
                "use_cache: a model that drops layers cannot fill a cache; call it with "
                "use_cache=False in training, and generate in evaluation mode"
            )


# --- checks -------------------------------------------------------------------------------------


def _check(
    stack: LayerStack,
    config: LayerDropoutConfig,
    rates: LayerRates,
    parameters: Iterable[nn.Parameter],
) -> None:
    """Refuse what would train something else than asked for."""
    if any(SWITCH in layer.__dict__ for layer in stack.layers):
        raise ConfigError("layer_dropout: is attached to this model already; detach it first")
    if stack.own_rate:
        raise ConfigError(
            f"layer_dropout: the model drops layers itself (layerdrop {stack.own_rate:g}); set "
            "layerdrop to 0 in its configuration, and load it again"
        )
    if config.scale != "none" and not stack.is_pre_norm:
        raise ConfigError(
            f"layer_dropout.scale: {config.scale} needs layers that add to a residual stream, and "
            f"those of {stack.model_type} normalise it or are not known; use none"
        )
    inside = {id(p) for layer in stack.layers for p in layer.parameters()}
    trained = {id(p) for p in parameters}
    if trained - inside or not trained:
        return
    bare = [
        number
        for number, layer in enumerate(stack.layers)
        if not any(id(p) in trained for p in layer.parameters())
    ]
    if bare and not rates.always - set(bare) and len(bare) >= (rates.budget or 1):
        raise ConfigError(
            f"layer_dropout: nothing is trained in layers {', '.join(map(str, bare))} and outside "
            "of the layers, so a pass through these alone would have no gradient; train all "
            "layers, or protect one that is trained"
        )
