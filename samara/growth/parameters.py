"""The parameters of the larger model: what each starts from, and the axes it lies on.

The one place that knows the layout of a Samara model: pre-norm blocks, RMSNorm, grouped queries,
SwiGLU, dense or low-rank, tied or not. Decoder and encoder have the same names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from samara.growth.axes import (
    AxisMap,
    Silence,
    TensorRule,
    extended,
    query_heads,
    tiled,
    unchanged,
)
from samara.growth.layer_map import MappedLayer
from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import GrowthPlan, LayerWidths, layer_widths
from samara.model.config import PROJECTIONS, ModelConfig, Projection

ATTENTION = PROJECTIONS[:4]
WRITES_RESIDUAL: tuple[Projection, ...] = ("o_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class GrownParameter:
    """One parameter of the larger model.

    Attributes:
        name: Its name.
        sources: Names of the parameters it starts from: one, the two it is the mean of, or none.
        rule: How it follows its axes; None: there are no sources.
        is_new: Whether its layer is new.
        is_zero: Whether it starts at zero, so that its layer is the identity.
        has_zero_output: Whether its layer's output starts at zero.
    """

    name: str
    sources: tuple[str, ...]
    rule: TensorRule | None
    is_new: bool = False
    is_zero: bool = False
    has_zero_output: bool = False

    @property
    def needs_fresh(self) -> bool:
        """Whether any entry starts as the larger model initialises it."""
        return self.rule is None or self.rule.has_new_units


@dataclass(frozen=True, kw_only=True)
class _LayerAxes:
    """The axes of one layer."""

    hidden: AxisMap
    query: AxisMap
    key_value: AxisMap
    ffn: AxisMap
    ranks: dict[Projection, AxisMap]

    @classmethod
    def of_size_one(cls) -> _LayerAxes:
        """Axes of no layer, to list what parameters one has."""
        one = unchanged(1)
        ranks = dict.fromkeys(PROJECTIONS, one)
        return cls(hidden=one, query=one, key_value=one, ffn=one, ranks=ranks)

    def of(self, projection: Projection) -> tuple[AxisMap, AxisMap]:
        """Inputs and outputs of a projection."""
        return {
            "q_proj": (self.hidden, self.query),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.query, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }[projection]


def grown_parameters(
    source: ModelConfig, plan: GrowthPlan, operator: OperatorConfig
) -> Iterator[GrownParameter]:
    """List the larger model's parameters.

    Args:
        source: The smaller model, expanded.
        plan: The growth, checked.
        operator: How widths grow.
    """
    target, width = plan.design, operator.width
    hidden = width_axis(source.hidden_size, target.hidden_size, width, silence="where_written")
    assert source.vocab_size is not None
    assert target.vocab_size is not None
    vocabulary = extended(source.vocab_size, target.vocab_size)
    gain = _norm_scale(source, target, operator)
    copies = target.hidden_size // source.hidden_size if width == "duplicate" else 1

    yield _own(
        "model.embed_tokens.weight", TensorRule(outputs=hidden, inputs=vocabulary, output_dim=1)
    )
    for position, (layer, is_new) in enumerate(
        zip(plan.layer_map.layers, plan.layer_map.is_new, strict=True)
    ):
        axes = None
        if layer.sources:
            small, large = layer_widths(source, layer.sources[0]), layer_widths(target, position)
            axes = _layer_axes(small, large, hidden=hidden, head_dim=source.head_dim, width=width)
        rules = _layer_rules(target, layer_widths(target, position), axes, gain=gain)
        for name, rule in rules.items():
            yield _in_layer(position, name, rule, layer=layer, is_new=is_new)
    # A tied embedding is not divided as it is read, so the final norm is: logits stay as they are.
    tied_share = 1 / copies if target.tie_word_embeddings else 1.0
    yield _own("model.norm.weight", TensorRule(outputs=hidden, scale=gain * tied_share))
    if not target.tie_word_embeddings:
        yield _own("lm_head.weight", TensorRule(outputs=vocabulary, inputs=hidden))


def _own(name: str, rule: TensorRule) -> GrownParameter:
    return GrownParameter(name=name, sources=(name,), rule=rule)


def _in_layer(
    position: int, name: str, rule: TensorRule | None, *, layer: MappedLayer, is_new: bool
) -> GrownParameter:
    projection = name.split(".")[1]
    return GrownParameter(
        name=f"model.layers.{position}.{name}",
        sources=tuple(f"model.layers.{source}.{name}" for source in layer.sources),
        rule=rule,
        is_new=is_new,
        # Of low-rank factors only B: with A at zero too, neither would ever get a gradient.
        is_zero=layer.zero_output
        and projection in WRITES_RESIDUAL
        and name.endswith(("weight", "cola_b")),
        has_zero_output=layer.zero_output,
    )


def width_axis(
    old_size: int, new_size: int, width: str, *, silence: Silence = "where_read"
) -> AxisMap:
    """The axis of a width, by how widths grow; ``silence`` is that of zero-padded units."""
    if width == "duplicate":
        return tiled(old_size, new_size)
    return extended(old_size, new_size, silence="nowhere" if width == "random" else silence)


def _norm_scale(source: ModelConfig, target: ModelConfig, operator: OperatorConfig) -> float:
    """What zero-padding the residual stream multiplies gains by.

    Zeros lower the mean square to d / d' of what it was, which gains and eps have to follow.
    """
    if operator.width != "zero_pad":
        return 1.0
    return math.sqrt(source.hidden_size / target.hidden_size)


def _layer_axes(
    small: LayerWidths, large: LayerWidths, *, hidden: AxisMap, head_dim: int, width: str
) -> _LayerAxes:
    kv_heads = width_axis(small.kv_heads, large.kv_heads, width)
    queries = query_heads(
        kv_heads,
        old_group=small.group_size,
        new_group=large.group_size,
        repeat=width == "duplicate",
        silence="where_read" if width == "zero_pad" else "nowhere",
    )
    return _LayerAxes(
        hidden=hidden,
        query=queries.in_heads(head_dim),
        key_value=kv_heads.in_heads(head_dim),
        ffn=width_axis(small.ffn, large.ffn, width),
        ranks={
            name: width_axis(small.ranks[name], large.ranks[name], width) for name in PROJECTIONS
        },
    )


def _layer_rules(
    target: ModelConfig, widths: LayerWidths, axes: _LayerAxes | None, *, gain: float
) -> dict[str, TensorRule | None]:
    """Parameters of a layer by their names in it; ``axes`` None: a fresh layer, no rules."""
    if axes is None:
        anywhere = _LayerAxes.of_size_one()
        return dict.fromkeys(_layer_rules(target, widths, anywhere, gain=gain))
    rules: dict[str, TensorRule | None] = {
        f"{norm}.weight": TensorRule(outputs=axes.hidden, scale=gain)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    if target.qk_norm:
        head = TensorRule(outputs=unchanged(target.head_dim))
        rules |= {f"self_attn.{norm}.weight": head for norm in ("q_norm", "k_norm")}
    for projection in PROJECTIONS:
        name = f"{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"
        inputs, outputs = axes.of(projection)
        # QK-norm shares the eps that zero-padding scales; its input follows.
        scale = gain if target.qk_norm and projection in ("q_proj", "k_proj") else 1.0
        if widths.ranks[projection]:
            rank = axes.ranks[projection]
            rules[f"{name}.cola_a"] = TensorRule(inputs=inputs, outputs=rank, output_dim=1)
            rules[f"{name}.cola_b"] = TensorRule(
                inputs=rank, outputs=outputs, output_dim=1, scale=scale
            )
        else:
            rules[f"{name}.weight"] = TensorRule(inputs=inputs, outputs=outputs, scale=scale)
    return rules
