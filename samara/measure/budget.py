"""What a design costs, in closed form: parameters, FLOPs per token, KV cache. No torch, no weights.

Conventions, which the tests hold against the real model:

* **Parameters** are exact, the sum over the tensors of ``SamaraForCausalLM``.
* **FLOPs** are those of the matrix products, two per multiply-add, as
  ``torch.utils.flop_counter`` counts them: every linear, the vocabulary head, and attention's two
  products over the **full square** of the sequence. Norms, RoPE, softmax and the embedding lookup
  are left out. Backward is twice forward, with nothing recomputed. A fused attention kernel that
  recomputes its scores is counted by torch with half a forward more; the work asked for does not
  change with the kernel, so it is not counted here.
* **MFU** counts attention over the causal half only, ``(t + 1) / 2`` keys per query: a kernel that
  skips the masked half must not look faster than the device
  (:meth:`Budget.model_flops_utilization`).
* What **activation checkpointing** computes a second time is no work of the model:
  :meth:`Budget.recompute_flops_per_token` gives it apart.

Source of the formulas: OpenELM (arXiv 2404.14619) for the block; CoLA (arXiv 2502.10940) for
``24nd² + 12n²d + 18nd·f`` (dense) and ``48ndr + 12n²d + 18nr(d + f)`` (low-rank) per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from samara.model.config import PROJECTIONS, LayerRank, ModelConfig, Projection

Attention = Literal["full", "causal"]
Checkpointing = Literal["none", "layer", "cola_m"]

# Whose product with B is computed again by CoLA-M (CoLA, section 4): the outputs of q, k, v feed
# attention, those of gate and up feed their product. Those of o and down are not needed, since the
# residual streams are kept.
COLA_M_RECOMPUTED: tuple[Projection, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of weights."""

    embedding: int
    """Both vocabulary matrices: the embedding and, where it is not tied, the output head."""
    attention: int
    ffn: int
    norms: int

    @property
    def non_embedding(self) -> int:
        return self.attention + self.ffn + self.norms

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations per token."""

    forward: int

    @property
    def backward(self) -> int:
        """Two products of the forward's size: one for the input, one for the weight."""
        return 2 * self.forward

    @property
    def training(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class LinearBudget:
    """One of a layer's seven linears."""

    in_features: int
    out_features: int
    rank: int
    """Bottleneck width of a low-rank linear (CoLA); 0: dense."""

    @property
    def parameters(self) -> int:
        if self.rank:
            return self.rank * (self.in_features + self.out_features)
        return self.in_features * self.out_features

    @property
    def last_product(self) -> int:
        """Multiply-adds per token of the product that makes the output: with B, or all there is."""
        return self.out_features * (self.rank or self.in_features)


@dataclass(frozen=True, kw_only=True)
class LayerBudget:
    """One decoder layer."""

    hidden_size: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rank: LayerRank | None
    """One rank for the seven linears, one per linear (0: dense), or None: all dense."""
    linears: Mapping[Projection, LinearBudget]
    qk_norm: bool

    @property
    def attention_parameters(self) -> int:
        return sum(self.linears[name].parameters for name in PROJECTIONS[:4])

    @property
    def ffn_parameters(self) -> int:
        return sum(self.linears[name].parameters for name in PROJECTIONS[4:])

    @property
    def norm_parameters(self) -> int:
        return 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def parameters(self) -> int:
        return self.attention_parameters + self.ffn_parameters + self.norm_parameters

    @property
    def kv_cache_elements(self) -> int:
        """Keys and values of one token."""
        return 2 * self.num_kv_heads * self.head_dim

    def attention_flops(self, sequence_length: int, attention: Attention = "full") -> int:
        """Forward FLOPs per token of the two products, queries·keys and weights·values."""
        query_dim = self.num_query_heads * self.head_dim
        if attention == "causal":
            return 2 * query_dim * (sequence_length + 1)
        return 4 * query_dim * sequence_length

    def flops_per_token(self, sequence_length: int, attention: Attention = "full") -> Flops:
        """FLOPs per token of one sequence of ``sequence_length`` tokens."""
        weights = self.attention_parameters + self.ffn_parameters
        return Flops(forward=2 * weights + self.attention_flops(sequence_length, attention))

    def recompute_flops_per_token(
        self, sequence_length: int, mode: Checkpointing, attention: Attention = "full"
    ) -> int:
        """FLOPs per token that activation checkpointing adds to a training step."""
        if mode == "none":
            return 0
        products = self.attention_flops(sequence_length, attention)
        if mode == "layer":
            # The output of down_proj is not needed again, so its last product is not repeated.
            last = self.linears["down_proj"].last_product
            return 2 * (self.attention_parameters + self.ffn_parameters - last) + products
        again = (self.linears[name] for name in COLA_M_RECOMPUTED)
        return products + sum(2 * item.last_product for item in again)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Everything a design costs that does not depend on how it is trained."""

    hidden_size: int
    vocab_size: int
    tie_word_embeddings: bool
    layers: tuple[LayerBudget, ...]

    @property
    def parameters(self) -> Parameters:
        matrices = 1 if self.tie_word_embeddings else 2
        return Parameters(
            embedding=matrices * self.vocab_size * self.hidden_size,
            attention=sum(layer.attention_parameters for layer in self.layers),
            ffn=sum(layer.ffn_parameters for layer in self.layers),
            norms=sum(layer.norm_parameters for layer in self.layers) + self.hidden_size,
        )

    @property
    def head_flops(self) -> Flops:
        """FLOPs per token of the vocabulary head."""
        return Flops(forward=2 * self.vocab_size * self.hidden_size)

    def flops_per_token(self, sequence_length: int, attention: Attention = "full") -> Flops:
        """FLOPs per token, forward and backward, of sequences of ``sequence_length`` tokens.

        Args:
            sequence_length: t; attention's share grows with it.
            attention: ``full``: the whole t x t square, as torch's FLOP counter has it; the figure
                of every table and log. ``causal``: the half that a causal kernel needs.
        """
        layers = (layer.flops_per_token(sequence_length, attention) for layer in self.layers)
        forward = self.head_flops.forward + sum(flops.forward for flops in layers)
        return Flops(forward=forward)

    def recompute_flops_per_token(
        self, sequence_length: int, mode: Checkpointing, attention: Attention = "full"
    ) -> int:
        """FLOPs per token that activation checkpointing adds to a training step.

        ``layer`` repeats each layer's forward but for its last product; ``cola_m`` repeats
        attention and the second factors of q, k, v, gate and up.
        """
        return sum(
            layer.recompute_flops_per_token(sequence_length, mode, attention)
            for layer in self.layers
        )

    def saved_flops_per_token(
        self,
        sequence_length: int,
        keep: Sequence[float] | None,
        attention: Attention = "full",
        mode: Checkpointing = "none",
    ) -> float:
        """FLOPs per token of training that layers save on average by not running in each pass.

        Args:
            sequence_length: t.
            keep: Each layer's probability to run; None: 1.
            attention: As in :meth:`flops_per_token`.
            mode: The activation checkpointing, whose recomputation is saved too.
        """
        return sum(
            (1 - probability)
            * (
                layer.flops_per_token(sequence_length, attention).training
                + layer.recompute_flops_per_token(sequence_length, mode, attention)
            )
            for probability, layer in zip(keep or (), self.layers, strict=keep is not None)
        )

    def kv_cache_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes that one more token of context takes in the KV cache (2: 16-bit)."""
        return bytes_per_element * sum(layer.kv_cache_elements for layer in self.layers)

    def model_flops_utilization(
        self, *, tokens_per_second: float, sequence_length: int, peak_flops: float
    ) -> float:
        """MFU of training: the share of the device's peak that went into the model's own work.

        Attention counts at its causal half; recomputation does not count.

        Args:
            tokens_per_second: Of one device.
            sequence_length: t.
            peak_flops: FLOP/s of one device at the precision used.
        """
        flops = self.flops_per_token(sequence_length, "causal").training
        return tokens_per_second * flops / peak_flops


@dataclass(frozen=True, kw_only=True)
class ActiveLayers:
    """The layers that run in a pass where layers are dropped: always as many, not the same ones.

    Attributes:
        count: Their number.
        always: Those among them in every pass, counted from 0.
    """

    count: int
    always: frozenset[int] = frozenset()

    def largest(self, sizes: Sequence[int]) -> frozenset[int]:
        """The layers of the pass whose sizes add up to most."""
        rest = [layer for layer in range(len(sizes)) if layer not in self.always]
        rest.sort(key=lambda layer: -sizes[layer])
        return self.always | frozenset(rest[: self.count - len(self.always)])


def budget(design: ModelConfig) -> Budget:
    """Compute what a design costs.

    Args:
        design: The model section of a recipe; shorthand is expanded here where it is not yet.

    Raises:
        ConfigError: If the design names no ``vocab_size``.
    """
    full = design.expand()
    assert isinstance(full.num_query_heads, tuple)
    assert isinstance(full.num_kv_heads, tuple)
    assert isinstance(full.ffn_dim, tuple)
    assert full.vocab_size is not None
    ranks: tuple[LayerRank | None, ...] = (None,) * full.num_hidden_layers
    if full.cola is not None:
        assert isinstance(full.cola.rank, tuple)
        ranks = full.cola.rank
    layers = tuple(
        _layer(full, queries, keys, ffn_dim, rank)
        for queries, keys, ffn_dim, rank in zip(
            full.num_query_heads, full.num_kv_heads, full.ffn_dim, ranks, strict=True
        )
    )
    return Budget(
        hidden_size=full.hidden_size,
        vocab_size=full.vocab_size,
        tie_word_embeddings=full.tie_word_embeddings,
        layers=layers,
    )


def _layer(
    design: ModelConfig, queries: int, keys: int, ffn_dim: int, rank: LayerRank | None
) -> LayerBudget:
    d, query_dim, kv_dim = design.hidden_size, queries * design.head_dim, keys * design.head_dim
    shapes: dict[Projection, tuple[int, int]] = {
        "q_proj": (d, query_dim),
        "k_proj": (d, kv_dim),
        "v_proj": (d, kv_dim),
        "o_proj": (query_dim, d),
        "gate_proj": (d, ffn_dim),
        "up_proj": (d, ffn_dim),
        "down_proj": (ffn_dim, d),
    }
    linears = {
        name: LinearBudget(in_features=i, out_features=o, rank=_projection_rank(rank, name))
        for name, (i, o) in shapes.items()
    }
    return LayerBudget(
        hidden_size=d,
        num_query_heads=queries,
        num_kv_heads=keys,
        head_dim=design.head_dim,
        ffn_dim=ffn_dim,
        rank=rank,
        linears=linears,
        qk_norm=design.qk_norm,
    )


def _projection_rank(rank: LayerRank | None, name: Projection) -> int:
    if rank is None:
        return 0
    return rank.get(name, 0) if isinstance(rank, dict) else rank
