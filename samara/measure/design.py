"""Verb ``design``: what a design is and costs, before anything is trained or even allocated.

Closed forms only (:mod:`samara.measure.budget`, :mod:`samara.measure.memory`): 7B is as quick as
60M. Time, energy and money are estimates for one named device that keeps up an assumed share of its
peak; both the profile's source and the share stand in the result.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from samara.measure.budget import ActiveLayers, Budget, Checkpointing, LayerBudget, budget
from samara.measure.config import DeviceProfile
from samara.measure.devices import device_profile, estimated_cost, peak_flops
from samara.measure.memory import OptimizerKind, Precision, training_memory
from samara.model.config import ModelConfig

ASSUMED_UTILIZATION = 0.4
"""Share of the device's peak that training keeps up, recomputation counted: a fair value for a
tuned GPU run of a dense model, optimistic for thin matrices."""

TEXT_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class DesignInput:
    """One recipe, as far as its costs depend on it.

    Attributes:
        name: What to call it.
        model: The design; it names its vocabulary size.
        sequence_length: Tokens of a row.
        batch_size: Rows of an optimizer step.
        micro_batch_size: Rows of a forward pass.
        tokens: Token budget of the run.
        precision: ``bfloat16``: autocast over float32 weights.
        optimizer: ``adamw`` or ``muon``.
        activation_checkpointing: What layers keep for backward.
        device_profile: Where the recipe means to run; ``auto``: this machine.
        active_layers: Layers that run in a pass of training; None: all, or not always as many.
        layer_keep: Each layer's probability to run in a pass; None: 1.
    """

    name: str
    model: ModelConfig
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    tokens: int
    precision: Precision = "bfloat16"
    optimizer: OptimizerKind = "adamw"
    activation_checkpointing: Checkpointing = "none"
    device_profile: str = "auto"
    active_layers: ActiveLayers | None = None
    layer_keep: tuple[float, ...] | None = None


def design_data(
    designs: Sequence[DesignInput],
    *,
    device: str | None = None,
    utilization: float = ASSUMED_UTILIZATION,
) -> dict[str, Any]:
    """Compute what designs are and cost, as plain data.

    Args:
        designs: One or more.
        device: A device profile (name or YAML file). Left out: what each recipe names.
        utilization: Assumed share of the device's peak.

    Returns:
        For one design its figures; for several ``{"schema": 1, "designs": [...]}``. Bytes, FLOPs,
        seconds. ``flops_per_token`` is that of training, forward and backward.

    Raises:
        ConfigError: If a design names no vocabulary size, or there is no such device profile.
    """
    found = [_design(item, device or item.device_profile, utilization) for item in designs]
    if len(found) == 1:
        return {"schema": 1, **found[0]}
    return {"schema": 1, "designs": found}


def _design(item: DesignInput, device: str, utilization: float) -> dict[str, Any]:
    costs, length = budget(item.model), item.sequence_length
    profile = device_profile(device)
    parameters, flops = costs.parameters, costs.flops_per_token(length)
    memory = training_memory(
        item.model,
        micro_batch_size=item.micro_batch_size,
        sequence_length=length,
        precision=item.precision,
        optimizer=item.optimizer,
        activation_checkpointing=item.activation_checkpointing,
        accumulates=item.micro_batch_size < item.batch_size,
        device="cuda" if profile.cuda_names else "cpu",
        active_layers=item.active_layers,
    )
    saved = costs.saved_flops_per_token(length, item.layer_keep)
    return {
        "name": item.name,
        "parameters": parameters.total,
        "embedding_parameters": parameters.embedding,
        "non_embedding_parameters": parameters.non_embedding,
        "flops_per_token": flops.training,
        "forward_flops_per_token": flops.forward,
        "backward_flops_per_token": flops.backward,
        "causal_flops_per_token": costs.flops_per_token(length, "causal").training,
        "recompute_flops_per_token": costs.recompute_flops_per_token(
            length, item.activation_checkpointing
        ),
        "kv_cache_bytes_per_token": costs.kv_cache_bytes_per_token(),
        "hidden_size": costs.hidden_size,
        "head_dim": item.model.head_dim,
        "vocab_size": costs.vocab_size,
        "tie_word_embeddings": costs.tie_word_embeddings,
        "layers": [_layer(layer, length) for layer in costs.layers],
        "training": {
            "sequence_length": length,
            "batch_size": item.batch_size,
            "micro_batch_size": item.micro_batch_size,
            "tokens": item.tokens,
            "flops": item.tokens * (flops.training - saved),
            "mean_active_layers": sum(item.layer_keep or (1,) * len(costs.layers)),
            "precision": item.precision,
            "optimizer": item.optimizer,
            "activation_checkpointing": item.activation_checkpointing,
        },
        "memory": asdict(memory),
        "estimate": _estimate(item, costs, profile, utilization),
    }


def _layer(layer: LayerBudget, sequence_length: int) -> dict[str, Any]:
    return {
        "num_query_heads": layer.num_query_heads,
        "num_kv_heads": layer.num_kv_heads,
        "ffn_dim": layer.ffn_dim,
        "rank": layer.rank,
        "parameters": layer.parameters,
        "flops_per_token": layer.flops_per_token(sequence_length).training,
    }


def estimated_speed(
    item: DesignInput, costs: Budget, profile: DeviceProfile, utilization: float
) -> float:
    """Tokens per second of training on one device that keeps up a share of its peak.

    Raises:
        ConfigError: If the profile has no peak for the design's precision.
    """
    length, mode = item.sequence_length, item.activation_checkpointing
    peak = peak_flops(profile, item.precision, trained=item.name)
    work: float = costs.flops_per_token(length, "causal").training
    work += costs.recompute_flops_per_token(length, mode, "causal")
    work -= costs.saved_flops_per_token(length, item.layer_keep, "causal", mode)
    return utilization * peak / work


def _estimate(
    item: DesignInput, costs: Budget, profile: DeviceProfile, utilization: float
) -> dict[str, Any]:
    """Time, energy and money on one device."""
    tokens_per_second = estimated_speed(item, costs, profile, utilization)
    seconds = item.tokens / tokens_per_second
    cost = estimated_cost(profile, seconds=seconds)
    return {
        "device_profile": profile.name,
        "source": profile.source,
        "num_devices": 1,
        "assumed_utilization": utilization,
        "memory_bytes": profile.memory_bytes,
        "tokens_per_second": tokens_per_second,
        "seconds": seconds,
        "energy_kwh": cost.energy_kwh,
        "cost": cost.money,
        "currency": cost.currency,
    }


# --- as text ------------------------------------------------------------------------------------


def design_text(data: Mapping[str, Any]) -> str:
    """Lay out what :func:`design_data` returned: designs side by side, then each one's layers.

    Later designs' figures carry their difference from the first design's, in percent.
    """
    designs: Sequence[Mapping[str, Any]] = data.get("designs") or [data]
    console = Console(file=io.StringIO(), width=max(TEXT_WIDTH, 28 + 27 * len(designs)))
    console.print(_comparison(designs))
    for line in dict.fromkeys(_assumption(design["estimate"]) for design in designs):
        console.print(line, style="none", highlight=False)
    for design in designs:
        console.print(_layer_table(design))
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")


def _assumption(estimate: Mapping[str, Any]) -> str:
    return (
        f"Estimates: one {estimate['device_profile']} at {estimate['assumed_utilization']:.0%} of "
        f"its peak (assumed), {prefixed(estimate['memory_bytes'], 'B')} of memory.\n"
        f"Its figures: {estimate['source']}."
    )


def _layer_table(design: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=design["name"], title_justify="left")
    columns = ("layer", "query heads", "KV heads", "FFN", "rank", "parameters", "FLOPs per token")
    for column in columns:
        table.add_column(column, justify="right")
    for where, layer in _runs(design["layers"]):
        table.add_row(
            where,
            str(layer["num_query_heads"]),
            str(layer["num_kv_heads"]),
            f"{layer['ffn_dim']:,}",
            _rank(layer["rank"]),
            f"{layer['parameters']:,}",
            prefixed(layer["flops_per_token"], "FLOP"),
        )
    return table


def _runs(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Equal layers that follow each other as one row: ``0-7``."""
    start = 0
    for layer, equal in groupby(layers):
        stop = start + len(list(equal)) - 1
        yield (str(start) if stop == start else f"{start}-{stop}"), layer
        start = stop + 1


def _rank(rank: Any) -> str:
    if rank is None:
        return "dense"
    if isinstance(rank, Mapping):
        named = [f"{name.removesuffix('_proj')} {value}" for name, value in rank.items() if value]
        return ", ".join(named) or "dense"
    return str(rank)


def prefixed(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: ``1.08 GB``."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:,.3g} Z{unit}"


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def duration(seconds: float) -> str:
    """Three digits and the unit that suits: ``2.76 days``."""
    for size, unit in ((86400 * 2, "days"), (3600 * 2, "hours"), (60 * 2, "min")):
        if seconds >= size:
            amount = seconds / (size / 2)
            return f"{amount:,.0f} {unit}" if amount >= 999.5 else f"{amount:.3g} {unit}"
    return f"{seconds:.3g} s"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _layers(value: float) -> str:
    return f"{value:.3g}"


def _flops(value: float) -> str:
    return prefixed(value, "FLOP")


def _bytes(value: float) -> str:
    return prefixed(value, "B")


def _percent(change: float) -> str:
    """A change in percent: ``-38%``, ``+2.4%``, ``+-0%``; what is over tenfold as a factor."""
    if abs(change) < 0.0005:
        return "±0%"
    if change > 9:
        return f"x{change + 1:,.3g}"
    return f"{change:+.1%}" if abs(change) < 0.0995 else f"{change:+.0%}"


# --- side by side ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A line of the comparison: a figure of a design, and how it is written."""

    label: str
    value: Callable[[Mapping[str, Any]], float]
    show: Callable[[float], str]

    def cell(self, design: Mapping[str, Any], first: Mapping[str, Any]) -> str:
        """The figure, and for a later design its difference from the first's in percent."""
        value, reference = self.value(design), self.value(first)
        text = self.show(value)
        if self.label == COST:
            text += f" {design['estimate']['currency']}"
            if design["estimate"]["currency"] != first["estimate"]["currency"]:
                return text
        if design is first or not reference:
            return text
        return f"{text} {f'({_percent(value / reference - 1)})':>8}"


COST = "estimated cost"

ROWS: tuple[_Row, ...] = tuple(
    _Row(label=label, value=value, show=show)
    for label, value, show in (
        ("parameters", lambda d: d["parameters"], _whole),
        ("  embedding and head", lambda d: d["embedding_parameters"], _whole),
        ("  the rest", lambda d: d["non_embedding_parameters"], _whole),
        ("FLOPs per token, training", lambda d: d["flops_per_token"], _flops),
        ("  forward", lambda d: d["forward_flops_per_token"], _flops),
        ("  recomputed on top", lambda d: d["recompute_flops_per_token"], _flops),
        ("KV cache per token, 16 bit", lambda d: d["kv_cache_bytes_per_token"], _bytes),
        ("memory of training", lambda d: d["memory"]["total"], _bytes),
        ("  weights", lambda d: d["memory"]["weights"], _bytes),
        ("  gradients", lambda d: d["memory"]["gradients"], _bytes),
        ("  optimizer", lambda d: d["memory"]["optimizer"], _bytes),
        ("  activations", lambda d: d["memory"]["activations"], _bytes),
        ("  kernels", lambda d: d["memory"]["kernels"], _bytes),
        ("layers in a pass of training", lambda d: d["training"]["mean_active_layers"], _layers),
        ("token budget", lambda d: d["training"]["tokens"], lambda v: prefixed(v, "")),
        ("FLOPs of the run", lambda d: d["training"]["flops"], _flops),
        ("estimated tokens/s", lambda d: d["estimate"]["tokens_per_second"], _whole),
        ("estimated time", lambda d: d["estimate"]["seconds"], duration),
        ("estimated energy", lambda d: d["estimate"]["energy_kwh"], lambda v: f"{v:,.4g} kWh"),
        (COST, lambda d: d["estimate"]["cost"], _money),
    )
)


def _comparison(designs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for design in designs:
        table.add_column(design["name"], justify="right")
    for row in ROWS:
        table.add_row(row.label, *(row.cell(design, designs[0]) for design in designs))
    return table
