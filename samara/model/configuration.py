"""The design of a Samara model as a Hugging Face configuration, saved as ``config.json``.

The per-layer lists are the truth: query heads, key-value heads, FFN widths and ranks of every
layer. The single numbers that generic tools look for (``num_attention_heads`` and so on) are the
largest of each list. All rules are those of :class:`~samara.model.config.ModelConfig`, to which
every configuration is translated as it is made, so a damaged file gives the same clear errors as a
recipe does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from samara.config import validate
from samara.errors import ConfigError
from samara.model.config import PROJECTIONS, ModelConfig, Projection


class SamaraConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of :class:`~samara.model.modeling.SamaraModel` under any of its heads.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of layers; the length of every list.
        head_dim: Width of one attention head, the same in all layers.
        num_query_heads: Query heads of each layer.
        num_kv_heads: Key-value heads of each layer.
        ffn_dims: FFN width of each layer.
        ranks: Bottleneck width of each layer's low-rank projections (CoLA): one number for all
            seven, or a mapping by projection; 0 is a dense projection. None: all dense.
        cola_activation: ``low_rank_only`` or ``both`` (SwiGLU's SiLU kept on the gate).
        attention: ``causal``, or ``bidirectional``: what a position sees within its document.
        qk_norm: RMSNorm on queries and keys before RoPE.
        tie_word_embeddings: Whether the embedding is also the output matrix.
        max_position_embeddings: Context length trained for.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Added to the mean square in RMSNorm.
        initializer: ``openelm`` or ``normal``.
        initializer_range: Standard deviation of ``normal``.
        num_attention_heads: The largest of ``num_query_heads``; for generic tools.
        num_key_value_heads: The largest of ``num_kv_heads``; for generic tools.
        intermediate_size: The largest of ``ffn_dims``; for generic tools.

    Raises:
        ConfigError: If the values do not make a model; the message names the key.
    """

    model_type: ClassVar[str] = "samara"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    head_dim: int = 64
    num_query_heads: list[int] | None = None
    num_kv_heads: list[int] | None = None
    ffn_dims: list[int] | None = None
    ranks: list[int | dict[str, int]] | None = None
    cola_activation: str = "low_rank_only"
    attention: str = "causal"
    qk_norm: bool = True
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer: str = "openelm"
    initializer_range: float = 0.02
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Runs at the end of the constructor that transformers gives every configuration.
        design = _parse_design(self)
        assert design.num_query_heads is not None
        self.num_query_heads = _as_list(design.num_query_heads)
        self.num_kv_heads = _as_list(design.num_kv_heads)
        self.ffn_dims = _as_list(design.ffn_dim)
        self.ranks = None if design.cola is None else _as_list(design.cola.rank)
        for key, widths in (
            ("num_attention_heads", self.num_query_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("intermediate_size", self.ffn_dims),
        ):
            given = getattr(self, key)
            if given not in (None, max(widths)):
                raise ConfigError(
                    f"{key}: {given} disagrees with the largest of the per-layer list, "
                    f"{max(widths)}; change the list and leave {key} out"
                )
            setattr(self, key, max(widths))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def layer_ranks(self, layer: int) -> dict[Projection, int]:
        """Rank of each projection of one layer; 0 is dense."""
        rank = self.ranks[layer] if self.ranks is not None else 0
        if isinstance(rank, dict):
            return {projection: rank.get(projection, 0) for projection in PROJECTIONS}
        return dict.fromkeys(PROJECTIONS, rank)

    @property
    def has_low_rank(self) -> bool:
        """Whether any projection is low-rank."""
        return any(
            rank
            for layer in range(self.num_hidden_layers)
            for rank in self.layer_ranks(layer).values()
        )

    @classmethod
    def from_design(
        cls,
        design: ModelConfig,
        *,
        attention: str = "causal",
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
    ) -> SamaraConfig:
        """Return the configuration of a design; shorthands are expanded.

        Args:
            design: The ``model:`` section of a recipe; it must name ``vocab_size``.
            attention: ``causal`` or ``bidirectional``; the objective decides it.
            bos_token_id: Token that begins a document; None: the tokenizer has none.
            eos_token_id: Token, or tokens, that end generation.
            pad_token_id: Token that fills up short rows.

        Raises:
            ConfigError: If the design names no vocabulary size.
        """
        design = design.expand()
        cola, initializer = design.cola, design.initializer
        assert design.vocab_size is not None  # expand has seen to it
        return cls(
            vocab_size=design.vocab_size,
            hidden_size=design.hidden_size,
            num_hidden_layers=design.num_hidden_layers,
            head_dim=design.head_dim,
            num_query_heads=_as_list(design.num_query_heads),
            num_kv_heads=_as_list(design.num_kv_heads),
            ffn_dims=_as_list(design.ffn_dim),
            ranks=None if cola is None else _as_list(cola.rank),
            cola_activation="low_rank_only" if cola is None else cola.activation,
            attention=attention,
            qk_norm=design.qk_norm,
            tie_word_embeddings=design.tie_word_embeddings,
            max_position_embeddings=design.max_position_embeddings,
            rope_theta=design.rope_theta,
            rms_norm_eps=design.rms_norm_eps,
            initializer=initializer.kind,
            initializer_range=0.02 if initializer.kind == "openelm" else initializer.std,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    def to_design(self) -> ModelConfig:
        """Return the design, expanded: ``from_design(d).to_design() == d.expand()``."""
        return _parse_design(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields of the design, defaults too: a saved model must not change with a default."""
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        own = {field.name for field in dataclasses.fields(self)} - inherited
        saved: dict[str, Any] = super().to_diff_dict()
        return saved | {name: getattr(self, name) for name in sorted(own)}


def _as_list(value: Any) -> list[Any]:
    assert isinstance(value, tuple | list)
    return list(value)


def _parse_design(config: SamaraConfig) -> ModelConfig:
    """Check the fields by the recipe's rules; lists that are missing follow from the numbers."""
    if config.attention not in ("bidirectional", "causal"):
        raise ConfigError(
            f"attention: unknown value {config.attention!r} (known: bidirectional, causal)"
        )
    if config.initializer not in ("openelm", "normal"):
        raise ConfigError(
            f"initializer: unknown value {config.initializer!r} (known: normal, openelm)"
        )
    fields = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "num_query_heads": config.num_query_heads or config.num_attention_heads,
        "num_kv_heads": config.num_kv_heads or config.num_key_value_heads,
        "ffn_dim": config.ffn_dims or config.intermediate_size,
        "cola": None
        if config.ranks is None
        else {"rank": config.ranks, "activation": config.cola_activation},
        "qk_norm": config.qk_norm,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer": {"kind": "openelm"}
        if config.initializer == "openelm"
        else {"kind": "normal", "std": config.initializer_range},
    }
    return validate(ModelConfig, fields, path="config").expand()
