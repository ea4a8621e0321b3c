"""Growth of transformers' own BERT, which normalises after each block.

Depth maps, FFN growth and duplication of the residual stream (bert2BERT's FPI, arXiv 2110.07143,
section 3.2, with whole heads) work as in Samara's models. Two things do not, and are refused: a
layer whose output is zero is no identity here, since its norms stay; and zero-padding changes the
mean and variance of LayerNorm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from samara.errors import ConfigError
from samara.growth.axes import AxisMap, TensorRule, unchanged
from samara.growth.grow_state import grow_weights
from samara.growth.layer_map import LayerMap
from samara.growth.moments import grow_optimizer
from samara.growth.operator_config import OperatorConfig
from samara.growth.parameters import GrownParameter, width_axis
from samara.growth.plan import Exactness, check_length, layer_map_of
from samara.train.checkpoint import named_weights

Bert = BertForMaskedLM | BertForPreTraining

FIXED = (
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_act",
    "layer_norm_eps",
    "tie_word_embeddings",
)
GROWING = ("hidden_size", "num_hidden_layers", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class GrownBert:
    """A larger BERT.

    Attributes:
        model: Of the class of the source.
        optimizer: ``{parameter name}.{key}``; None: none was given.
        exactness: As in :class:`samara.growth.plan.GrowthPlan`.
        layer_map: Where its layers come from.
    """

    model: Bert
    optimizer: dict[str, Tensor] | None
    exactness: Exactness
    layer_map: LayerMap


def grow_bert(
    model: Bert,
    *,
    target: BertConfig,
    operator: OperatorConfig,
    seed: int,
    optimizer: Mapping[str, Tensor] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> GrownBert:
    """Make a larger BERT of a smaller one, which stays as it is.

    Args:
        model: The smaller one, with its pretraining heads.
        target: The larger configuration.
        operator: How.
        seed: Of fresh weights and noise.
        optimizer: The smaller one's state, ``{parameter name}.{key}``.
        betas: AdamW's decay rates.

    Raises:
        ConfigError: If this growth cannot be.
    """
    source = model.config
    assert isinstance(source, BertConfig)
    layer_map = check_bert_growth(source, target, operator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        larger = type(model)(target)
    larger.to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg] # hidden signature
    parameters = list(_parameters(model, source, target, layer_map, operator))
    weights = grow_weights(
        parameters,
        named_weights(model),
        fresh={name: weight.detach() for name, weight in named_weights(larger).items()},
        operator=operator,
        seed=seed,
    )
    with torch.no_grad():
        for name, weight in named_weights(larger).items():
            weight.copy_(weights[name])
    moments = None
    if optimizer is not None:
        moments = grow_optimizer(parameters, optimizer, operator=operator, betas=betas)
    return GrownBert(
        model=larger,
        optimizer=moments,
        exactness=_exactness(source, target, layer_map, operator),
        layer_map=layer_map,
    )


def check_bert_growth(source: BertConfig, target: BertConfig, operator: OperatorConfig) -> LayerMap:
    """The layer map of a growth of BERT.

    Raises:
        ConfigError: If it cannot be; the message says why.
    """
    for key in FIXED:
        if getattr(source, key) != getattr(target, key):
            raise ConfigError(
                f"target.{key}: is {getattr(target, key)}, the source has {getattr(source, key)}; "
                "growth cannot change it"
            )
    for key in GROWING:
        if getattr(source, key) > getattr(target, key):
            raise ConfigError(
                f"target.{key}: is {getattr(target, key)}, less than the source's "
                f"{getattr(source, key)}; nothing may shrink"
            )
    if source.hidden_size * target.num_attention_heads != (
        target.hidden_size * source.num_attention_heads
    ):
        raise ConfigError(
            f"target.num_attention_heads: {target.num_attention_heads} heads of "
            f"{target.hidden_size} would change their width; heads grow as hidden_size does"
        )
    _check_hidden(source, target, operator)
    layer_map = layer_map_of(
        operator.depth,
        num_sources=source.num_hidden_layers,
        num_layers=target.num_hidden_layers,
        fits=lambda _source, _target: True,
    )
    if operator.new_layers == "zero":
        layer_map = layer_map.with_zero_outputs()
    check_length(layer_map, target.num_hidden_layers)
    if any(layer.zero_output for layer in layer_map.layers):
        raise ConfigError(
            "new_layers: BERT normalises after each block, so a layer whose output is zero is not "
            "the identity; set new_layers: keep, and take another depth than llama_pro"
        )
    return layer_map


def _check_hidden(source: BertConfig, target: BertConfig, operator: OperatorConfig) -> None:
    if source.hidden_size == target.hidden_size:
        return
    if operator.width == "zero_pad":
        raise ConfigError(
            "width: zero_pad changes the mean and variance of LayerNorm; take duplicate for "
            "hidden_size"
        )
    if operator.width == "duplicate" and target.hidden_size % source.hidden_size:
        raise ConfigError(
            f"target.hidden_size: {target.hidden_size} is no multiple of the source's "
            f"{source.hidden_size}, and uneven duplicates change what a norm computes"
        )


def _exactness(
    source: BertConfig, target: BertConfig, layer_map: LayerMap, operator: OperatorConfig
) -> Exactness:
    sizes = [(c.hidden_size, c.intermediate_size) for c in (source, target)]
    if not layer_map.is_identity:
        return "changes"
    if sizes[0] == sizes[1]:
        return "exact"
    return "changes" if operator.width == "random" else "tolerance"


def _parameters(
    model: Bert,
    source: BertConfig,
    target: BertConfig,
    layer_map: LayerMap,
    operator: OperatorConfig,
) -> Iterator[GrownParameter]:
    """List the larger model's parameters with their rules."""
    head_dim = source.hidden_size // source.num_attention_heads
    rules = _Rules(
        hidden=width_axis(source.hidden_size, target.hidden_size, operator.width),
        heads=width_axis(
            source.num_attention_heads, target.num_attention_heads, operator.width
        ).in_heads(head_dim),
        ffn=width_axis(source.intermediate_size, target.intermediate_size, operator.width),
        tied_share=source.hidden_size / target.hidden_size
        if source.tie_word_embeddings and operator.width == "duplicate"
        else 1.0,
    )
    prefix = "bert.encoder.layer."
    weights = named_weights(model)
    for name, weight in weights.items():
        if not name.startswith(prefix):
            yield GrownParameter(name=name, sources=(name,), rule=rules.of(name, weight))
    inner = [name.removeprefix(f"{prefix}0.") for name in weights if name.startswith(f"{prefix}0.")]
    for position, layer in enumerate(layer_map.layers):
        for name in inner:
            yield GrownParameter(
                name=f"{prefix}{position}.{name}",
                sources=tuple(f"{prefix}{index}.{name}" for index in layer.sources),
                rule=rules.of(name, weights[f"{prefix}0.{name}"]) if layer.sources else None,
                is_new=layer_map.is_new[position],
            )


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """Where each of BERT's parameters lies."""

    hidden: AxisMap
    heads: AxisMap
    ffn: AxisMap
    tied_share: float

    def of(self, name: str, weight: Tensor) -> TensorRule:
        """The rule of one parameter, by its name within the model or a layer."""
        module, _, kind = name.rpartition(".")
        if module.endswith("_embeddings"):
            return TensorRule(outputs=self.hidden, inputs=unchanged(len(weight)), output_dim=1)
        if module.endswith("LayerNorm"):
            # A tied embedding is not divided as it is read; what it reads is.
            is_last = module == "cls.predictions.transform.LayerNorm"
            return TensorRule(outputs=self.hidden, scale=self.tied_share if is_last else 1.0)
        outputs, inputs = self._linear(module, len(weight))
        return TensorRule(outputs=outputs, inputs=inputs if kind == "weight" else None)

    def _linear(self, module: str, num_outputs: int) -> tuple[AxisMap, AxisMap]:
        match module:
            case "attention.self.query" | "attention.self.key" | "attention.self.value":
                return self.heads, self.hidden
            case "attention.output.dense":
                return self.hidden, self.heads
            case "intermediate.dense":
                return self.ffn, self.hidden
            case "output.dense":
                return self.hidden, self.ffn
            case "bert.pooler.dense" | "cls.predictions.transform.dense":
                return self.hidden, self.hidden
            case "cls.predictions" | "cls.predictions.decoder" | "cls.seq_relationship":
                return unchanged(num_outputs), self.hidden
        raise ConfigError(f"{module}: is no part of a BERT with pretraining heads; grow that one")
