"""Depth growth as a map: which source layer each layer of the larger model starts from.

All depth operators are constructors of one type, :class:`LayerMap`. L source layers become L'
layers; a target layer is a copy of a source, the mean of two, or new; and its output may be zeroed
(attention's ``o_proj`` and the FFN's ``down_proj``), which makes it the identity in a pre-norm
model. Where a source occurs a second time, that copy counts as new.

In the notation of recipes and reports ``3`` is a copy of layer 3, ``new`` a fresh layer, ``3+4`` a
mean, and a star zeroes the output: ``[0, 1, 1*, 2, 3, 3*]``. Pure Python, no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from samara.errors import ConfigError

NOTATION = re.compile(r"(?:(?P<first>\d+)(?:\+(?P<second>\d+))?|new)(?P<zero>\*)?")


@dataclass(frozen=True, kw_only=True)
class MappedLayer:
    """What one target layer starts from.

    Attributes:
        sources: One source layer: a copy. Two: their mean. None: fresh weights.
        zero_output: Whether what the layer adds to the residual stream starts at zero.
    """

    sources: tuple[int, ...]
    zero_output: bool = False

    def __str__(self) -> str:
        return ("+".join(map(str, self.sources)) or "new") + "*" * self.zero_output


NEW = MappedLayer(sources=())


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One entry per target layer, first layer first.

    Attributes:
        num_sources: L, the layers there are.
        layers: What each of the L' target layers starts from.

    Raises:
        ConfigError: If an entry names a layer that does not exist.
    """

    num_sources: int
    layers: tuple[MappedLayer, ...]

    def __post_init__(self) -> None:
        for position, layer in enumerate(self.layers):
            for source in layer.sources:
                if not 0 <= source < self.num_sources:
                    raise ConfigError(
                        f"layer map: entry {position} is {layer}, but the source has layers 0 to "
                        f"{self.num_sources - 1}"
                    )

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.layers))}]"

    @property
    def is_new(self) -> tuple[bool, ...]:
        """Which layers are new: fresh ones, means, and every copy of a source but its first."""
        seen: set[int] = set()
        result = []
        for layer in self.layers:
            is_first = len(layer.sources) == 1 and layer.sources[0] not in seen
            result.append(not is_first)
            seen.update(layer.sources if is_first else ())
        return tuple(result)

    @property
    def is_identity(self) -> bool:
        """Whether a pre-norm model computes what it did: all that was added adds zero."""
        kept = [layer.sources for layer in self.layers if not layer.zero_output]
        return kept == [(source,) for source in range(self.num_sources)]

    @property
    def unused(self) -> tuple[int, ...]:
        """Source layers that no target layer starts from."""
        used = {source for layer in self.layers for source in layer.sources}
        return tuple(sorted(set(range(self.num_sources)) - used))

    def with_zero_outputs(self) -> LayerMap:
        """The same map, with the output of every new layer zeroed."""
        layers = zip(self.layers, self.is_new, strict=True)
        return replace(
            self, layers=tuple(replace(m, zero_output=m.zero_output or new) for m, new in layers)
        )

    def then(self, following: LayerMap) -> LayerMap:
        """The one map that does this growth and then ``following``: src(i) = this[following[i]].

        Raises:
            ConfigError: If ``following`` takes a mean of layers that are no plain copies.
        """
        assert following.num_sources == len(self)
        return replace(self, layers=tuple(self._through(layer) for layer in following.layers))

    def _through(self, layer: MappedLayer) -> MappedLayer:
        between = [self.layers[source] for source in layer.sources]
        zeroed = layer.zero_output or any(b.zero_output for b in between)
        if len(between) <= 1:
            sources = between[0].sources if between else ()
        elif all(len(b.sources) == 1 and not b.zero_output for b in between):
            sources = tuple(b.sources[0] for b in between)
        else:
            raise ConfigError(
                f"layer map: {layer} is a mean of {' and '.join(map(str, between))}, which is no "
                "mean of two source layers; grow in two steps"
            )
        return MappedLayer(sources=sources, zero_output=zeroed)


def copies(num_sources: int, sources: Iterable[int]) -> LayerMap:
    """A map of plain copies."""
    layers = tuple(MappedLayer(sources=(source,)) for source in sources)
    return LayerMap(num_sources=num_sources, layers=layers)


def parse(num_sources: int, entries: Sequence[int | str]) -> LayerMap:
    """Read a map in the notation of recipes.

    Raises:
        ConfigError: If an entry is no such notation, or names a layer that does not exist.
    """
    return LayerMap(num_sources=num_sources, layers=tuple(parse_entry(e) for e in entries))


def parse_entry(entry: int | str) -> MappedLayer:
    """Read one entry: ``3``, ``3*``, ``3+4``, ``new`` or ``new*``."""
    match = NOTATION.fullmatch(str(entry).replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"layer map: '{entry}' is no entry; write a layer number, 'new', or '1+2' for a mean, "
            "with a '*' behind it to zero the output"
        )
    sources = tuple(int(part) for part in match.group("first", "second") if part is not None)
    return MappedLayer(sources=sources, zero_output=match["zero"] is not None)


def stack(num_sources: int, num_layers: int) -> LayerMap:
    """src(i) = i mod L: the whole model on top of itself (G_stack, arXiv 2405.15319).

    StackingBERT (ICML 2019) too. If L does not divide L', the last copy lacks its top layers.
    """
    return copies(num_sources, (i % num_sources for i in range(num_layers)))


def interpose(num_sources: int, num_layers: int) -> LayerMap:
    """src(i) = floor(i · L / L'): each layer beside its copy."""
    return copies(num_sources, (i * num_sources // num_layers for i in range(num_layers)))


def block(num_sources: int, *, start: int, length: int) -> LayerMap:
    """Repeat the layers ``start`` to ``start + length - 1`` right behind themselves.

    Raises:
        ConfigError: If the source has no such block.
    """
    if start + length > num_sources:
        raise ConfigError(
            f"layer map: a block of {length} layers from layer {start} ends beyond the source's "
            f"{num_sources} layers; make it shorter"
        )
    order = range(num_sources)
    return copies(num_sources, (*order[: start + length], *order[start:]))


def first(num_sources: int, length: int) -> LayerMap:
    """Repeat the first layers."""
    return block(num_sources, start=0, length=length)


def last(num_sources: int, length: int) -> LayerMap:
    """Repeat the last layers: gradual stacking (Reddi et al., ICML 2023).

    Raises:
        ConfigError: If the source has fewer.
    """
    return block(num_sources, start=max(0, num_sources - length), length=length)


def middle(num_sources: int, length: int) -> LayerMap:
    """Repeat the middle one of the blocks of ``length`` layers: MIDAS (arXiv 2409.19044).

    Of B = L / length blocks that is number ceil(B / 2) - 1.

    Raises:
        ConfigError: If the source is not made of whole blocks.
    """
    if num_sources % length:
        raise ConfigError(
            f"layer map: the middle block of {length} layers needs a source of whole blocks, it "
            f"has {num_sources} layers; take a divisor of that, or block with a start"
        )
    num_blocks = num_sources // length
    return block(num_sources, start=((num_blocks + 1) // 2 - 1) * length, length=length)


def solar(num_sources: int, overlap: int) -> LayerMap:
    """Two copies, the lower without its last m layers, the upper without its first m.

    SOLAR's depth up-scaling (arXiv 2312.15166, section 2) of 32 layers with m = 8 is an overlap of
    16 layers, which occur twice, and gives 48: m = (L - overlap) / 2.

    Raises:
        ConfigError: If there are no such two copies.
    """
    if overlap > num_sources or (num_sources - overlap) % 2:
        raise ConfigError(
            f"layer map: solar cannot lay two copies of {num_sources} layers over each other by "
            f"{overlap}: the overlap is at most {num_sources} and differs from it by an even number"
        )
    cut = (num_sources - overlap) // 2
    return copies(num_sources, (*range(num_sources - cut), *range(cut, num_sources)))


def llama_pro(num_sources: int, num_new: int) -> LayerMap:
    """Behind every L / n layers, a copy of the last with zero output (arXiv 2401.02415, section 3).

    Raises:
        ConfigError: If n does not divide L.
    """
    if num_new == 0 or num_sources % num_new:
        raise ConfigError(
            f"layer map: llama_pro spreads {num_new} new layers evenly over {num_sources}; their "
            f"number must be a divisor of {num_sources}"
        )
    group = num_sources // num_new
    layers: list[MappedLayer] = []
    for source in range(num_sources):
        layers.append(MappedLayer(sources=(source,)))
        if (source + 1) % group == 0:
            layers.append(MappedLayer(sources=(source,), zero_output=True))
    return LayerMap(num_sources=num_sources, layers=tuple(layers))


def random_top(num_sources: int, num_layers: int) -> LayerMap:
    """Fresh layers on top: the control of every copying operator."""
    kept = copies(num_sources, range(num_sources))
    return replace(kept, layers=kept.layers + (NEW,) * (num_layers - num_sources))


def random_interleaved(num_sources: int, num_layers: int) -> LayerMap:
    """Fresh layers where :func:`interpose` has copies."""
    return _replace_new(interpose(num_sources, num_layers), lambda _: NEW)


def average(num_sources: int, num_layers: int) -> LayerMap:
    """Where :func:`interpose` has a copy, the mean of that layer and the next.

    The last layer has no next one: above it stands a copy.
    """

    def mean(layer: MappedLayer) -> MappedLayer:
        (source,) = layer.sources
        pair = (source, source + 1) if source + 1 < num_sources else (source,)
        return MappedLayer(sources=pair)

    return _replace_new(interpose(num_sources, num_layers), mean)


def _replace_new(
    layer_map: LayerMap, replacement: Callable[[MappedLayer], MappedLayer]
) -> LayerMap:
    entries = zip(layer_map.layers, layer_map.is_new, strict=True)
    return replace(
        layer_map, layers=tuple(replacement(layer) if new else layer for layer, new in entries)
    )


def largest_fitting(
    num_sources: int, num_layers: int, fits: Callable[[int, int], bool]
) -> LayerMap:
    """src(i) = the highest j that fits into target layer i, with j <= floor(i · L / L').

    For layer-wise widths: the schedule of L' layers is no rearrangement of that of L, and plain
    stacking would have to shrink layers. The bound makes it :func:`interpose` where all widths are
    equal, and not the last layer everywhere.

    Args:
        num_sources: L.
        num_layers: L'.
        fits: Whether a source layer (first argument) fits into a target layer (second).

    Raises:
        ConfigError: If a target layer is too narrow for all of them.
    """
    chosen = []
    for position in range(num_layers):
        bound = position * num_sources // num_layers
        fitting = [source for source in range(bound + 1) if fits(source, position)]
        if not fitting:
            raise ConfigError(
                f"layer map: no source layer up to {bound} fits into target layer {position}; make "
                "that layer wider, or write the map"
            )
        chosen.append(fitting[-1])
    return copies(num_sources, chosen)
