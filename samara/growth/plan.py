"""What a growth will do, decided from the two designs alone: map, exactness, or the reason against.

Every refusal of growth is here, before any weight is read. The rules of exactness:

* depth: adding layers whose output is zero leaves a pre-norm model bit for bit what it was
  (``exact``); all other depth maps change it (``changes``);
* width: duplicates and zero-padded units give the same function up to the order in which sums are
  rounded (``tolerance``); fresh units with effect change it;
* a larger vocabulary changes the distribution, though not the logits of the old tokens.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from samara.errors import ConfigError
from samara.growth import layer_map as maps
from samara.growth.layer_map import LayerMap
from samara.growth.operator_config import (
    Average,
    Block,
    Depth,
    First,
    Fit,
    Interpose,
    Last,
    LlamaPro,
    Map,
    Middle,
    OperatorConfig,
    RandomInterleaved,
    RandomTop,
    Solar,
    Stack,
)
from samara.model.config import PROJECTIONS, ModelConfig, Projection

Exactness = Literal["exact", "tolerance", "changes"]

FIXED = ("head_dim", "qk_norm", "tie_word_embeddings", "rope_theta", "rms_norm_eps")
GROWING = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """A growth that can be done.

    Attributes:
        layer_map: Which source layer each target layer starts from; zeroed outputs marked.
        design: The larger model, expanded. It is the target, but for ``rms_norm_eps`` where
            zero-padding the residual stream scales it.
        exactness: ``exact``: the same logits bit for bit. ``tolerance``: up to rounding.
            ``changes``: other ones.
        warnings: What the user should know, one sentence each.
    """

    layer_map: LayerMap
    design: ModelConfig
    exactness: Exactness
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """One layer on its axes of growth.

    Attributes:
        group_size: Query heads per key-value head.
        kv_heads: Key-value heads.
        ffn: FFN width.
        ranks: Rank of each projection; 0: dense.
    """

    group_size: int
    kv_heads: int
    ffn: int
    ranks: dict[Projection, int]

    def misfit(self, larger: LayerWidths) -> str | None:
        """Why this layer cannot grow into ``larger``; None: it can."""
        for name, small, large in (
            ("key-value heads", self.kv_heads, larger.kv_heads),
            ("query heads per key-value head", self.group_size, larger.group_size),
            ("FFN width", self.ffn, larger.ffn),
        ):
            if small > large:
                return f"{name} would shrink from {small} to {large}"
        for projection, rank in self.ranks.items():
            wider = larger.ranks[projection]
            if (rank == 0) != (wider == 0):
                kinds = ("dense", "low-rank") if rank == 0 else ("low-rank", "dense")
                return (
                    f"{projection} is {kinds[0]} and would be {kinds[1]}: no weights of one make "
                    "the other, as low-rank projections have an activation inside"
                )
            if rank > wider:
                return f"the rank of {projection} would shrink from {rank} to {wider}"
        return None


def layer_widths(design: ModelConfig, layer: int) -> LayerWidths:
    """Read one layer's widths off an expanded design."""
    queries, keys, ffn = design.num_query_heads, design.num_kv_heads, design.ffn_dim
    assert isinstance(queries, tuple)
    assert isinstance(keys, tuple)
    assert isinstance(ffn, tuple)
    ranks = dict.fromkeys(PROJECTIONS, 0)
    if design.cola is not None:
        assert isinstance(design.cola.rank, tuple)
        rank = design.cola.rank[layer]
        ranks |= rank if isinstance(rank, dict) else dict.fromkeys(PROJECTIONS, rank)
    return LayerWidths(
        group_size=queries[layer] // keys[layer],
        kv_heads=keys[layer],
        ffn=ffn[layer],
        ranks=ranks,
    )


def check_growth(source: ModelConfig, target: ModelConfig, operator: OperatorConfig) -> GrowthPlan:
    """Plan a growth, or say why it cannot be.

    Args:
        source: The model there is.
        target: The larger model; its per-layer lists are what it will have.
        operator: How.

    Raises:
        ConfigError: If a width or the depth would shrink, something would change that is no width,
            the map does not give the target's layers, or the operator does not fit.
    """
    source = source.expand()
    target = target.expand(vocab_size=None if target.vocab_size else source.vocab_size)
    _check_whole_model(source, target, operator)
    layer_map = layer_map_of(
        operator.depth,
        num_sources=source.num_hidden_layers,
        num_layers=target.num_hidden_layers,
        fits=_fitting(source, target),
    )
    if operator.new_layers == "zero":
        layer_map = layer_map.with_zero_outputs()
    _check_layers(source, target, layer_map)
    widens = _widens(source, target, layer_map)
    exactness: Exactness = "exact" if not widens else "tolerance"
    more_tokens = source.vocab_size != target.vocab_size
    if not layer_map.is_identity or (widens and operator.width == "random") or more_tokens:
        exactness = "changes"
    design = target
    if operator.width == "zero_pad" and source.hidden_size != target.hidden_size:
        eps = target.rms_norm_eps * source.hidden_size / target.hidden_size
        design = target.model_copy(update={"rms_norm_eps": eps})
    return GrowthPlan(
        layer_map=layer_map,
        design=design,
        exactness=exactness,
        warnings=tuple(_warnings(source, target, operator, layer_map, widens=widens)),
    )


def layer_map_of(
    depth: Depth, *, num_sources: int, num_layers: int, fits: Callable[[int, int], bool]
) -> LayerMap:
    """The layer map of a depth operator.

    Args:
        depth: The operator.
        num_sources: Layers there are.
        num_layers: Layers there will be.
        fits: Whether a source layer (first argument) fits into a target layer (second).

    Raises:
        ConfigError: If the operator does not fit the numbers of layers or, for ``fit``, the widths.
    """
    old, new = num_sources, num_layers
    if new == old and not _is_explicit(depth):
        return maps.copies(old, range(old))
    match depth:
        case Stack():
            return maps.stack(old, new)
        case Interpose():
            return maps.interpose(old, new)
        case Block():
            return maps.block(old, start=depth.start, length=depth.length or new - old)
        case First():
            return maps.first(old, depth.length or new - old)
        case Last():
            return maps.last(old, depth.length or new - old)
        case Middle():
            return maps.middle(old, depth.length or new - old)
        case Solar():
            return maps.solar(old, depth.overlap or new - old)
        case LlamaPro():
            return maps.llama_pro(old, new - old)
        case RandomTop():
            return maps.random_top(old, new)
        case RandomInterleaved():
            return maps.random_interleaved(old, new)
        case Average():
            return maps.average(old, new)
        case Fit():
            return maps.largest_fitting(old, new, fits)
        case Map():
            return maps.parse(old, depth.layers)


def _is_explicit(depth: Depth) -> bool:
    """Whether the settings say what the map is, also where the target is no deeper."""
    match depth:
        case Block() | First() | Last() | Middle():
            return depth.length is not None
        case Solar():
            return depth.overlap is not None
        case Map() | Fit():
            return True
        case _:
            return False


def _fitting(source: ModelConfig, target: ModelConfig) -> Callable[[int, int], bool]:
    small = [layer_widths(source, layer) for layer in range(source.num_hidden_layers)]
    large = [layer_widths(target, layer) for layer in range(target.num_hidden_layers)]
    return lambda j, i: small[j].misfit(large[i]) is None


def copied_design(source: ModelConfig, layer_map: LayerMap) -> ModelConfig:
    """The design in which every layer keeps the widths of the layer it starts from.

    A fresh layer has the widths of the one below it, at the bottom those of source layer 0. The
    lists are explicit: a schedule over L' layers would be another model.
    """
    source = source.expand()
    origins: list[int] = []
    for layer in layer_map.layers:
        origins.append(layer.sources[0] if layer.sources else (origins or [0])[-1])

    def pick(values: object) -> tuple[object, ...]:
        assert isinstance(values, tuple)
        return tuple(values[origin] for origin in origins)

    return source.model_copy(
        update={
            "num_hidden_layers": len(layer_map),
            "num_query_heads": pick(source.num_query_heads),
            "num_kv_heads": pick(source.num_kv_heads),
            "ffn_dim": pick(source.ffn_dim),
            "cola": source.cola and source.cola.model_copy(update={"rank": pick(source.cola.rank)}),
        }
    )


def deeper_design(
    source: ModelConfig, operator: OperatorConfig, *, num_hidden_layers: int
) -> ModelConfig:
    """The target of pure depth growth: more layers, each as wide as the one it starts from.

    Raises:
        ConfigError: If the operator does not give that many layers, or is ``fit``, which chooses by
            the widths of a target.
    """
    if isinstance(operator.depth, Fit):
        raise ConfigError("depth.kind: fit chooses layers by the widths of a target; give one")
    source = source.expand()
    layer_map = layer_map_of(
        operator.depth,
        num_sources=source.num_hidden_layers,
        num_layers=num_hidden_layers,
        fits=lambda _source, _target: True,
    )
    check_length(layer_map, num_hidden_layers)
    return copied_design(source, layer_map)


def _check_whole_model(source: ModelConfig, target: ModelConfig, operator: OperatorConfig) -> None:
    for key in FIXED:
        small, large = getattr(source, key), getattr(target, key)
        if small != large:
            raise ConfigError(
                f"target.{key}: is {large}, the source has {small}; growth cannot change it, set "
                f"it to {small}"
            )
    if source.cola and target.cola and source.cola.activation != target.cola.activation:
        raise ConfigError(
            f"target.cola.activation: is {target.cola.activation}, the source has "
            f"{source.cola.activation}; growth cannot change it"
        )
    for key in GROWING:
        small, large = getattr(source, key), getattr(target, key)
        if small > large:
            raise ConfigError(
                f"target.{key}: is {large}, less than the source's {small}; nothing may shrink"
            )
    if operator.width == "duplicate" and target.hidden_size % source.hidden_size:
        raise ConfigError(
            f"target.hidden_size: {target.hidden_size} is no multiple of the source's "
            f"{source.hidden_size}, and uneven duplicates change what a norm computes; take a "
            "multiple, or width: zero_pad"
        )


def _check_layers(source: ModelConfig, target: ModelConfig, layer_map: LayerMap) -> None:
    check_length(layer_map, target.num_hidden_layers)
    for position, layer in enumerate(layer_map.layers):
        room = layer_widths(target, position)
        widths = [layer_widths(source, index) for index in layer.sources]
        if len(widths) == 2 and widths[0] != widths[1]:
            raise ConfigError(
                f"layer map: target layer {position} is the mean of layers {layer}, whose widths "
                "differ; a mean needs layers of one shape"
            )
        misfit = widths[0].misfit(room) if widths else None
        if misfit:
            raise ConfigError(
                f"target layer {position}: source layer {layer} does not fit: {misfit}; make the "
                "target wider there, or take depth: fit"
            )


def check_length(layer_map: LayerMap, num_layers: int) -> None:
    """Refuse a map that does not give the target's layers.

    Raises:
        ConfigError: With both numbers.
    """
    if len(layer_map) != num_layers:
        raise ConfigError(
            f"target.num_hidden_layers: is {num_layers}, but the depth map gives {len(layer_map)} "
            "layers; change one of them"
        )


def _widens(source: ModelConfig, target: ModelConfig, layer_map: LayerMap) -> bool:
    """Whether any width grows where it can be noticed."""
    return source.hidden_size != target.hidden_size or any(
        layer_widths(source, layer.sources[0]) != layer_widths(target, position)
        for position, layer in enumerate(layer_map.layers)
        if layer.sources and not layer.zero_output
    )


def _warnings(
    source: ModelConfig,
    target: ModelConfig,
    operator: OperatorConfig,
    layer_map: LayerMap,
    *,
    widens: bool,
) -> list[str]:
    warnings = []
    old, new = source.num_hidden_layers, target.num_hidden_layers
    if isinstance(operator.depth, Stack) and new % old:
        warnings.append(
            f"stack: {new} layers are no multiple of {old}, so the last copy of the model lacks "
            f"its top {old - new % old} layers"
        )
    if layer_map.unused:
        unused = ", ".join(map(str, layer_map.unused))
        warnings.append(f"layer map: no target layer starts from source layers {unused}")
    breaks_symmetry = operator.noise > 0 or operator.moments == "zero"
    if widens and operator.width == "duplicate" and not breaks_symmetry:
        warnings.append(
            "width: duplicates without noise get equal gradients and stay equal; set noise, or "
            "moments: zero"
        )
    if target.vocab_size != source.vocab_size:
        warnings.append(
            "vocab_size: the new tokens start at random and take probability from the old ones"
        )
    return warnings
