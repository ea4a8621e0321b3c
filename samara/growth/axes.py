"""Width growth as index maps on axes, and the one rule by which tensors follow them.

A new axis is a map g from its units to old ones; c(j) is the number of units that old unit j
becomes. Of a matrix with output map g and input map h,

    weight      W'[o, i] = W[g(o), h(i)] / c(h(i))          the copies of an input share its weight
    gradient    G'[o, i] = G[g(o), h(i)] / c(g(o))          the readers of an output share its error

so a first moment is divided by c of the output once, a second moment twice (Net2Net, arXiv
1511.05641; the gradient rule for whole models: staged training, arXiv 2203.06211). A vector, such
as a norm's gain, has outputs only. Where a parameter is multiplied by ``scale`` to keep the
function, its gradient is divided by it.

Units without a source start at random, and are silent where :class:`AxisMap` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Silence = Literal["nowhere", "where_written", "where_read"]


@dataclass(frozen=True, kw_only=True)
class AxisMap:
    """Where the units of one grown axis come from.

    Attributes:
        index: The old unit of each new one, -1 where there is none, int64 (new size,).
        old_size: Number of old units.
        silence: How units without a source are kept from having an effect: zeros in the weights
            that write them (the residual stream), in those that read them, or not at all.
    """

    index: Tensor
    old_size: int
    silence: Silence = "nowhere"

    @property
    def is_new(self) -> Tensor:
        """Which units have no source, (new size,)."""
        return self.index < 0

    @property
    def is_repeated(self) -> Tensor:
        """Which units are new in the wider sense: no source, or a source seen before."""
        ordered, order = self.index.sort(stable=True)
        repeated = torch.zeros_like(self.is_new)
        repeated[order[1:]] = ordered[1:] == ordered[:-1]
        return self.is_new | repeated

    @property
    def multiplicity(self) -> Tensor:
        """C at each unit's source, 1 for units without one, float64 (new size,)."""
        counts = torch.bincount(self.index[~self.is_new], minlength=self.old_size)
        return counts[self.index.clamp(min=0)].masked_fill(self.is_new, 1).double()

    def in_heads(self, head_dim: int) -> AxisMap:
        """This map of heads as one of their components, head by head."""
        components = self.index[:, None] * head_dim + torch.arange(head_dim)
        components[self.is_new] = -1
        return AxisMap(
            index=components.flatten(), old_size=self.old_size * head_dim, silence=self.silence
        )


def unchanged(size: int) -> AxisMap:
    """Each unit is its own source."""
    return AxisMap(index=torch.arange(size), old_size=size)


def tiled(old_size: int, new_size: int) -> AxisMap:
    """The old units again and again: unit i copies i mod old size."""
    return AxisMap(index=torch.arange(new_size) % old_size, old_size=old_size)


def extended(old_size: int, new_size: int, *, silence: Silence = "nowhere") -> AxisMap:
    """The old units, then new ones."""
    index = torch.arange(new_size)
    return AxisMap(
        index=index.masked_fill(index >= old_size, -1), old_size=old_size, silence=silence
    )


def query_heads(
    kv_heads: AxisMap, *, old_group: int, new_group: int, repeat: bool, silence: Silence = "nowhere"
) -> AxisMap:
    """Query heads that follow their key-value heads, group by group.

    Query head j belongs to group floor(j / group size), so copies must stay within their group:
    there they stand side by side (0 0 1 1); tiling would give them other keys.

    Args:
        kv_heads: Where the key-value heads come from.
        old_group: Query heads per key-value head before.
        new_group: And after.
        repeat: Whether a group grows by copies, or by new heads at its end.
        silence: Of new heads.
    """
    place = torch.arange(new_group)
    if repeat:
        place = place * old_group // new_group
    index = kv_heads.index[:, None] * old_group + place
    index[kv_heads.is_new] = -1
    index[:, place >= old_group] = -1
    return AxisMap(index=index.flatten(), old_size=kv_heads.old_size * old_group, silence=silence)


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """How one parameter follows the axes it lies on.

    Attributes:
        outputs: Of the units it writes.
        inputs: Of the units it reads; None for a vector.
        output_dim: The dimension of the outputs: 0 for ``nn.Linear``, 1 for embeddings and
            low-rank factors, which are stored (in, out).
        scale: What the whole parameter is multiplied by, to keep the function.
    """

    outputs: AxisMap
    inputs: AxisMap | None = None
    output_dim: int = 0
    scale: float = 1.0

    @property
    def has_new_units(self) -> bool:
        """Whether any entry has no source."""
        axes = (self.outputs,) if self.inputs is None else (self.outputs, self.inputs)
        return any(bool(axis.is_new.any()) for axis in axes)

    @property
    def new_entries(self) -> Tensor:
        """Entries without a source; broadcasts to the new shape, as the masks below."""
        return self._either(
            self.outputs.is_new, None if self.inputs is None else self.inputs.is_new
        )

    @property
    def repeated_entries(self) -> Tensor:
        """Entries without a source, or on a unit whose source has occurred before."""
        return self._either(
            self.outputs.is_repeated, None if self.inputs is None else self.inputs.is_repeated
        )

    @property
    def silent_entries(self) -> Tensor:
        """Entries that start at zero."""
        outputs = self.outputs.is_new & (self.outputs.silence == "where_written")
        if self.inputs is None:
            return outputs & False  # a gain of zero would be a unit that cannot learn
        return self._either(outputs, self.inputs.is_new & (self.inputs.silence == "where_read"))

    @property
    def input_multiplicity(self) -> Tensor:
        """C of each entry's input, to be broadcast."""
        assert self.inputs is not None
        return self._along(1 - self.output_dim, self.inputs.multiplicity)

    @property
    def output_multiplicity(self) -> Tensor:
        """C of each entry's output, to be broadcast."""
        return self._along(self.output_dim, self.outputs.multiplicity)

    def gather(self, tensor: Tensor) -> Tensor:
        """Take each entry from its source; those without one hold anything."""
        gathered = tensor.index_select(
            self.output_dim, self.outputs.index.clamp(min=0).to(tensor.device)
        )
        if self.inputs is None:
            return gathered
        index = self.inputs.index.clamp(min=0).to(tensor.device)
        return gathered.index_select(1 - self.output_dim, index)

    def _either(self, outputs: Tensor, inputs: Tensor | None) -> Tensor:
        marks = self._along(self.output_dim, outputs)
        return marks if inputs is None else marks | self._along(1 - self.output_dim, inputs)

    def _along(self, dim: int, per_unit: Tensor) -> Tensor:
        return per_unit if self.inputs is None or dim == 1 else per_unit[:, None]


@dataclass(frozen=True)
class Noise:
    """Noise on copies' outgoing weights that sums to zero over the copies of each unit.

    Attributes:
        strength: In standard deviations of the weight.
        generator: On the CPU, so that the numbers are the same on every device.
    """

    strength: float
    generator: torch.Generator

    def draw(self, rule: TensorRule, weight: Tensor) -> Tensor:
        """Noise for a gathered ``weight``, before it is shared among its inputs' copies."""
        assert rule.inputs is not None
        dim, source = 1 - rule.output_dim, rule.inputs.index.clamp(min=0)
        noise = torch.randn(weight.shape, generator=self.generator, dtype=torch.float64)
        shape = list(noise.shape)
        shape[dim] = rule.inputs.old_size
        sums = noise.new_zeros(shape).index_add(dim, source, noise).index_select(dim, source)
        noise -= sums / rule.input_multiplicity
        return (noise * (self.strength * weight.double().std().item())).to(weight)


def grow_weight(
    weight: Tensor, rule: TensorRule, *, fresh: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Apply the rule to a weight.

    Args:
        weight: The old parameter.
        rule: How it follows its axes.
        fresh: The parameter as the larger model initialises it; needed where units are new.
        noise: For the copies; None: they stay equal.

    Returns:
        The new parameter, on storage of its own.
    """
    grown = rule.gather(weight)
    if rule.inputs is not None:
        if noise is not None and bool((rule.input_multiplicity > 1).any()):
            grown += noise.draw(rule, grown)
        grown /= rule.input_multiplicity.to(grown)
    if rule.has_new_units:
        assert fresh is not None
        grown = torch.where(rule.new_entries.to(grown.device), fresh.to(grown), grown)
        grown.masked_fill_(rule.silent_entries.to(grown.device), 0.0)
    return grown * rule.scale


def grow_moment(moment: Tensor, rule: TensorRule, *, power: Literal[1, 2]) -> Tensor:
    """Apply the gradient's rule to a moment of it; entries without a source get zero.

    Args:
        moment: The old parameter's.
        rule: How the parameter follows its axes.
        power: 1 for a mean of gradients, 2 for one of their squares.
    """
    divisor = (rule.output_multiplicity * rule.scale) ** power
    grown = rule.gather(moment) / divisor.to(moment)
    if rule.has_new_units:
        grown.masked_fill_(rule.new_entries.to(grown.device), 0.0)
    return grown
