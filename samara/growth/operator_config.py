"""How a model grows, as settings: which layers come from where, how widths grow, what moments do.

One :class:`OperatorConfig` is one candidate of a growth; its :attr:`~OperatorConfig.label` names it
in tables, folders and plots. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError
from samara.growth.layer_map import parse_entry


class Stack(Config):
    """The whole model again on top (G_stack, arXiv 2405.15319; StackingBERT, ICML 2019)."""

    kind: Literal["stack"] = "stack"


class Interpose(Config):
    """Each layer beside its copy (arXiv 2510.08008)."""

    kind: Literal["interpose"] = "interpose"


class Block(Config):
    """One block of layers twice, the copy right behind it."""

    kind: Literal["block"] = "block"
    start: NonNegativeInt
    """First layer of the block, counted from 0."""
    length: PositiveInt | None = None
    """Layers of the block. Left out: as many as the target has more."""


class First(Config):
    """The first layers twice."""

    kind: Literal["first"] = "first"
    length: PositiveInt | None = None
    """How many. Left out: as many as the target has more."""


class Last(Config):
    """The last layers twice (gradual stacking, Reddi et al., ICML 2023); 1: last-layer copy."""

    kind: Literal["last"] = "last"
    length: PositiveInt | None = None
    """How many. Left out: as many as the target has more."""


class Middle(Config):
    """The middle block twice (MIDAS, arXiv 2409.19044)."""

    kind: Literal["middle"] = "middle"
    length: PositiveInt | None = None
    """Layers of a block, a divisor of the source's. Left out: as many as the target has more."""


class Solar(Config):
    """Two copies over each other, cut where they meet (SOLAR, arXiv 2312.15166, section 2)."""

    kind: Literal["solar"] = "solar"
    overlap: PositiveInt | None = None
    """Layers that occur twice (SOLAR: 16 of 32, which makes 48). Left out: as many as the target
    has more."""


class LlamaPro(Config):
    """Copies that start as the identity, evenly spread (LLaMA-Pro, arXiv 2401.02415)."""

    kind: Literal["llama_pro"] = "llama_pro"


class RandomTop(Config):
    """Fresh layers on top: the control."""

    kind: Literal["random_top"] = "random_top"


class RandomInterleaved(Config):
    """Fresh layers, evenly spread: the control."""

    kind: Literal["random_interleaved"] = "random_interleaved"


class Average(Config):
    """Between two layers, the mean of their weights."""

    kind: Literal["average"] = "average"


class Fit(Config):
    """Each target layer takes the largest source layer that fits: for layer-wise widths."""

    kind: Literal["fit"] = "fit"


class Map(Config):
    """Any map, written out."""

    kind: Literal["map"] = "map"
    layers: Annotated[tuple[int | str, ...], Field(min_length=1)]
    """One entry per target layer: `3` copies source layer 3, `new` is fresh, `3+4` a mean; a star
    behind it zeroes the output: `[0, 1, 1*, 2, new]`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for entry in self.layers:
            parse_entry(entry)
        return self


Depth = Annotated[
    Stack
    | Interpose
    | Block
    | First
    | Last
    | Middle
    | Solar
    | LlamaPro
    | RandomTop
    | RandomInterleaved
    | Average
    | Fit
    | Map,
    Field(discriminator="kind"),
]


class OperatorConfig(Config):
    """One way to grow a model: the depth map first, then each layer widened to the target."""

    depth: Depth = Stack()
    """Which source layer each target layer starts from."""
    new_layers: Literal["keep", "zero"] = "keep"
    """`zero`: the output of every new layer starts at zero, so that it is the identity (llama_pro
    always does so); a source's second copy counts as new. `keep`: as copied or drawn."""
    width: Literal["duplicate", "zero_pad", "random"] = "duplicate"
    """How widths grow. `duplicate`: copies that share their outgoing weights (Net2Net,
    HyperCloning). `zero_pad`: fresh units that start without effect. `random`: fresh units, the
    control."""
    noise: NonNegativeFloat = 0.0
    """Breaks the symmetry of duplicates: noise on their outgoing weights, in standard deviations of
    the weight, that sums to zero over the copies (HyperCloning, arXiv 2409.12903)."""
    moments: Literal["map", "copy", "zero", "reset"] = "map"
    """The optimizer's state. `map`: the moments that the larger model's gradients have. `copy`: the
    source's, unscaled. `zero`: `map`, and fresh for everything new, copies too. `reset`: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.noise and self.width != "duplicate":
            raise ConfigError(
                f"noise {self.noise:g} is for the copies of width duplicate, and width is "
                f"{self.width}; set noise to 0"
            )
        return self

    @property
    def label(self) -> str:
        """A short name, the same for equal settings, that can be part of a file name."""
        parts = [_depth_label(self.depth)]
        parts += ["zero"] * (self.new_layers == "zero")
        parts += [self.width] * (self.width != "duplicate")
        parts += [f"noise-{self.noise:g}"] * (self.noise > 0)
        parts += [f"moments-{self.moments}"] * (self.moments != "map")
        return ".".join(parts)


def _depth_label(depth: Depth) -> str:
    match depth:
        case Block():
            numbers = [depth.start, depth.length]
        case First() | Last() | Middle():
            numbers = [depth.length]
        case Solar():
            numbers = [depth.overlap]
        case Map():
            written = ",".join(str(parse_entry(entry)) for entry in depth.layers)
            return f"map-{hashlib.sha256(written.encode()).hexdigest()[:8]}"
        case _:
            numbers = []
    return "-".join([depth.kind, *(str(number) for number in numbers if number is not None)])
