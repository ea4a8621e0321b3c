"""The ``model:`` section of a recipe: a design in a few keys, expanded to explicit lists.

A design is written short (``layerwise_scaling``, one head count, one rank) and expanded once by
:meth:`ModelConfig.expand` into one entry per layer. The saved recipe and everything downstream see
only the lists. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from samara.config import Config
from samara.errors import ConfigError
from samara.model.layerwise_scaling import layerwise_schedule

T = TypeVar("T")

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)

Rank = Annotated[int, Field(ge=0)]
LayerRank = Rank | dict[Projection, Rank]
"""Rank of one layer: one number for its seven projections, or one per projection; 0: dense."""


class LayerwiseScaling(Config):
    """OpenELM layer-wise scaling (arXiv 2404.14619): widths grow linearly with depth."""

    alpha: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    """Query width of the first and last layer over hidden_size."""
    beta: tuple[PositiveFloat, PositiveFloat] = (0.5, 4.0)
    """FFN width of the first and last layer over hidden_size."""


class ColaConfig(Config):
    """CoLA low-rank activations (arXiv 2502.10940): every linear becomes B·σ(A·x)."""

    rank: PositiveInt | tuple[LayerRank, ...]
    """Bottleneck width r: one number, or one entry per layer (a number or a mapping by projection;
    0, or a projection left out, is dense). The paper uses hidden_size / 4 (130M: / 3)."""
    activation: Literal["low_rank_only", "both"] = "low_rank_only"
    """`low_rank_only`: the FFN multiplies gate·up; `both`: also keeps SwiGLU's SiLU on the gate.
    The paper ships `both` for 60M and 130M, `low_rank_only` above."""


class OpenELMInitializer(Config):
    """N(0, 1/sqrt(fan_in)); embedding 1/sqrt(d); o_proj and down_proj 1/sqrt(2·N·d)."""

    kind: Literal["openelm"] = "openelm"


class NormalInitializer(Config):
    """N(0, std) for every matrix, as Llama and GPT-2."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02


class ModelConfig(Config):
    """A decoder-only transformer: RMSNorm, RoPE, GQA, SwiGLU, dense or low-rank, any widths."""

    hidden_size: PositiveInt
    """d, the width of the residual stream."""
    num_hidden_layers: PositiveInt
    head_dim: PositiveInt = 64
    """Width of one attention head; even, for RoPE."""
    num_query_heads: PositiveInt | tuple[PositiveInt, ...] | None = None
    """Query heads: one number, or one per layer. Left out: hidden_size / head_dim, or the schedule
    of `layerwise_scaling`."""
    num_kv_heads: PositiveInt | tuple[PositiveInt, ...] | None = None
    """Key-value heads: one number, or one per layer. Left out: query heads / gqa_group_size."""
    gqa_group_size: PositiveInt = 1
    """Query heads that share one key-value head. 1: multi-head attention. OpenELM: 4."""
    ffn_dim: PositiveInt | tuple[PositiveInt, ...] | None = None
    """FFN width: one number, or one per layer. Left out: the schedule of `layerwise_scaling`, or
    8/3 of hidden_size rounded up to ffn_dim_divisor."""
    ffn_dim_divisor: PositiveInt = 256
    """FFN widths that are derived are multiples of this."""
    layerwise_scaling: LayerwiseScaling | None = None
    """Let widths grow with depth (OpenELM). Expanded to lists in the saved recipe."""
    cola: ColaConfig | None = None
    """Replace the linears by low-rank ones (CoLA)."""
    qk_norm: bool = True
    """RMSNorm over head_dim on queries and keys before RoPE (OpenELM)."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output matrix."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. Left out: the tokenizer's size."""
    max_position_embeddings: PositiveInt = 2048
    """Context length."""
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    initializer: Annotated[OpenELMInitializer | NormalInitializer, Field(discriminator="kind")] = (
        OpenELMInitializer()
    )
    """How the matrices start. Low-rank factors always start as CoLA's do."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; RoPE turns pairs, make it even")
        if self.layerwise_scaling is not None:
            for key in ("num_query_heads", "num_kv_heads", "ffn_dim"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"{key} and layerwise_scaling both set the widths; remove one of them"
                    )
        elif self.num_query_heads is None and self.hidden_size % self.head_dim:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by head_dim {self.head_dim}; "
                "change one of them, or give num_query_heads"
            )
        for key in ("num_query_heads", "num_kv_heads", "ffn_dim"):
            self._check_length(key, getattr(self, key))
        if self.cola is not None:
            self._check_length("cola.rank", self.cola.rank)
        self._check_groups()
        return self

    def _check_length(self, key: str, value: object) -> None:
        if isinstance(value, tuple) and len(value) != self.num_hidden_layers:
            raise ConfigError(
                f"{key} lists {len(value)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )

    def _check_groups(self) -> None:
        query_heads, kv_heads, _ = self._widths()
        for layer, (queries, keys) in enumerate(zip(query_heads, kv_heads, strict=True)):
            if keys == 0 or queries % keys:
                raise ConfigError(
                    f"layer {layer} has {queries} query heads, not divisible into "
                    f"{keys or self.gqa_group_size} "
                    f"{'key-value heads' if keys else 'per key-value head (gqa_group_size)'}"
                )

    def _widths(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        layers = self.num_hidden_layers
        if self.layerwise_scaling is not None:
            schedule = layerwise_schedule(
                num_layers=layers,
                hidden_size=self.hidden_size,
                head_dim=self.head_dim,
                gqa_group_size=self.gqa_group_size,
                alpha=self.layerwise_scaling.alpha,
                beta=self.layerwise_scaling.beta,
                ffn_dim_divisor=self.ffn_dim_divisor,
            )
            return schedule.num_query_heads, schedule.num_kv_heads, schedule.ffn_dims
        query_heads = _per_layer(self.num_query_heads or self.hidden_size // self.head_dim, layers)
        kv_heads = (
            _per_layer(self.num_kv_heads, layers)
            if self.num_kv_heads is not None
            else tuple(
                heads // self.gqa_group_size if heads % self.gqa_group_size == 0 else 0
                for heads in query_heads
            )
        )
        derived = -(-8 * self.hidden_size // (3 * self.ffn_dim_divisor)) * self.ffn_dim_divisor
        return query_heads, kv_heads, _per_layer(self.ffn_dim or derived, layers)

    def expand(self, *, vocab_size: int | None = None) -> ModelConfig:
        """Return the same design with every shorthand replaced by one entry per layer.

        The keys that only derive widths (layerwise_scaling, gqa_group_size, ffn_dim_divisor) have
        done their work and go back to their defaults, so that equal models have equal expansions.

        Args:
            vocab_size: Rows of the embedding where the design names none.

        Raises:
            ConfigError: If neither names a vocabulary size, or the tokenizer's does not fit.
        """
        rows = self.vocab_size or vocab_size
        if rows is None:
            raise ConfigError("model.vocab_size: is required where no tokenizer is given")
        if vocab_size is not None and rows < vocab_size:
            raise ConfigError(
                f"model.vocab_size: {rows} is less than the tokenizer's {vocab_size} entries"
            )
        return self.resolved().model_copy(update={"vocab_size": rows})

    def resolved(self) -> ModelConfig:
        """The same design with one entry per layer; the vocabulary size may still be open."""
        query_heads, kv_heads, ffn_dims = self._widths()
        cola = self.cola and self.cola.model_copy(
            update={"rank": _per_layer(self.cola.rank, self.num_hidden_layers)}
        )
        return self.model_copy(
            update={
                "num_query_heads": query_heads,
                "num_kv_heads": kv_heads,
                "ffn_dim": ffn_dims,
                "gqa_group_size": 1,
                "ffn_dim_divisor": 256,
                "layerwise_scaling": None,
                "cola": cola,
            }
        )


def _per_layer(value: T | tuple[T, ...], num_layers: int) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,) * num_layers
