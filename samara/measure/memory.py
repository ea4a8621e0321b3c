"""How much memory training a design takes, before a byte of it is allocated.

The estimate follows one training step through its tensors: weights in float32, the optimizer's
state, gradients, what each layer leaves for backward (by width, rank, precision and checkpointing),
the chunks of the cross-entropy, and the largest passing tensors. ``total`` is the largest sum on
the way, which is less than the sum of all parts: a layer's activations are gone by the time the
gradients of the layers below it arrive.

What is counted are bytes of tensors, and what the libraries of products keep beside them: cuBLAS a
workspace for each thread that launches, oneDNN (bfloat16 on CPU) the code of every product of
another shape. ``benchmarks/memory.py`` compares with measured peaks; docs/results.md has its table.
CUDA's context (about 0.5 GB) comes on top. On a CPU the process takes 1.2 to 1.9 times its tensors,
as measured: glibc's heap keeps freed blocks too fragmented to be used again. That is no property of
the design, and outside the estimate. ``torch.compile`` fuses and recomputes on its own and takes
less.

Everything is in bytes. Names: n tokens of a micro-batch, d hidden, f FFN width, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from samara.measure.budget import ActiveLayers, Budget, Checkpointing, LayerBudget, budget
from samara.model.attention import MAX_KEYS_BY_PRODUCTS
from samara.model.config import PROJECTIONS, ModelConfig
from samara.model.cross_entropy import CHUNK_ELEMENTS

Precision = Literal["float32", "bfloat16"]
OptimizerKind = Literal["adamw", "muon"]
DeviceKind = Literal["cpu", "cuda"]

FLOAT32 = 4
INDEX = 8
# Tensors of int64 that a micro-batch consists of: ids, targets, positions, documents.
BATCH_TENSORS = 4

CUBLAS_WORKSPACE = 32 * 2**20
"""PyTorch's workspace of a cuBLAS handle on Hopper and Blackwell; 8.1 MiB before."""
CUBLAS_HANDLES = 2
"""One of the thread that runs forward, one of autograd's for backward."""
PRODUCT_CODE = 560_000
"""What a bfloat16 product of a shape of its own takes in oneDNN: the kernel generated for it
(measured on AMD EPYC with AVX-512: 0.54 to 0.58 MB whatever the shape; nothing in float32)."""
MAX_PRODUCTS = 1024
"""oneDNN keeps the newest ones."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of training one micro-batch at a time on one device.

    Attributes:
        weights: Parameters in float32.
        gradients: Of all parameters, float32.
        optimizer: Moments, float32.
        activations: All that forward leaves for backward at its largest, autocast's copies of the
            weights and the gradients that the fused cross-entropy takes ahead included.
        kernels: What the libraries of products keep, no tensors.
        total: The peak over a step. Not the sum: not all of them are there at once.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    kernels: int
    total: int


def training_memory(
    design: ModelConfig,
    *,
    micro_batch_size: int,
    sequence_length: int,
    precision: Precision,
    optimizer: OptimizerKind,
    activation_checkpointing: Checkpointing,
    accumulates: bool = False,
    device: DeviceKind = "cpu",
    active_layers: ActiveLayers | None = None,
) -> Memory:
    """Estimate the memory of training a design.

    Args:
        design: The model section of a recipe.
        micro_batch_size: Rows of one forward pass.
        sequence_length: Tokens of a row, t.
        precision: ``bfloat16``: autocast over float32 weights.
        optimizer: ``adamw`` keeps two moments of everything, ``muon`` one of the hidden matrices.
        activation_checkpointing: What layers keep for backward.
        accumulates: Whether a step has several micro-batches; gradients then wait in memory.
        device: Decides the kernels, and with them what they keep.
        active_layers: Layers that run in a pass, the worst of which is estimated; None: all.
    """
    costs = budget(design)
    shape = _Shape(
        micro_batch_size=micro_batch_size,
        sequence_length=sequence_length,
        element=2 if precision == "bfloat16" else FLOAT32,
        mode=activation_checkpointing,
        on_cuda=device == "cuda",
        gate_silu=design.cola is None or design.cola.activation == "both",
    )
    active = active_layers or ActiveLayers(count=len(costs.layers))
    weights = FLOAT32 * costs.parameters.total
    kernels = _kernels(costs, shape)
    step = _Step(
        costs=costs,
        shape=shape,
        fixed=weights + _optimizer_state(costs, optimizer) + kernels,
        accumulates=accumulates,
        chunk_elements=CHUNK_ELEMENTS[device],
        active=active,
    )
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=_optimizer_state(costs, optimizer),
        activations=step.activations,
        kernels=kernels,
        total=max(step.cross_entropy(), step.backward(), step.update()),
    )


def _optimizer_state(costs: Budget, optimizer: OptimizerKind) -> int:
    parameters = costs.parameters
    if optimizer == "adamw":
        return 2 * FLOAT32 * parameters.total
    hidden = parameters.attention + parameters.ffn
    return FLOAT32 * hidden + 2 * FLOAT32 * (parameters.embedding + parameters.norms)


def _kernels(costs: Budget, shape: _Shape) -> int:
    """What is kept beside tensors for the products of forward and backward."""
    if shape.on_cuda:
        return CUBLAS_HANDLES * CUBLAS_WORKSPACE
    if not shape.mixed:
        return 0
    matrices = {(costs.hidden_size, costs.vocab_size)}
    for layer in costs.layers:
        for item in layer.linears.values():
            ranks = (item.rank,) if item.rank else ()
            matrices.update(pairwise((item.in_features, *ranks, item.out_features)))
    products = 3 * len(matrices)  # forward, and the gradients of input and weight
    if shape.by_products:
        heads = {(layer.num_query_heads, layer.num_kv_heads) for layer in costs.layers}
        products += 6 * len(heads)  # scores and mix, and the gradients of their two factors each
    return PRODUCT_CODE * min(products, MAX_PRODUCTS)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """How a layer is run; gives what it leaves for backward."""

    micro_batch_size: int
    sequence_length: int
    element: int
    mode: Checkpointing
    on_cuda: bool
    gate_silu: bool

    @property
    def tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length

    @property
    def mixed(self) -> bool:
        return self.element != FLOAT32

    @property
    def by_products(self) -> bool:
        """Whether attention is computed without a fused kernel (`samara.model.attention`)."""
        short = self.sequence_length <= MAX_KEYS_BY_PRODUCTS
        return self.mixed and short and not self.on_cuda

    def norm(self, width: int) -> int:
        """RMSNorm of the float32 residual stream: its input (ours for CPU: normalised values) and
        statistics.
        """
        return self.tokens * FLOAT32 * (width + 1)

    def query_key_norm(self, width: int, heads: int) -> int:
        """RMSNorm of each head; under autocast of bfloat16 values, with float32 statistics."""
        inputs = 0
        if self.mixed:  # the weight is multiplied apart; autocast casts what CUDA's kernel reads
            inputs = FLOAT32 * width if self.on_cuda else self.element * width
        return self.tokens * (self.element * width + FLOAT32 * heads + inputs)

    def attention(self, layer: LayerBudget) -> int:
        """The attention half of a layer, with its norm."""
        query_dim = layer.num_query_heads * layer.head_dim
        kv_dim = layer.num_kv_heads * layer.head_dim
        total = self.norm(layer.hidden_size)
        if layer.qk_norm:
            total += self.query_key_norm(query_dim, layer.num_query_heads)
            total += self.query_key_norm(kv_dim, layer.num_kv_heads)
        # Input of the projections; queries, keys, values, result.
        per_token = self.element * (layer.hidden_size + 2 * query_dim + 2 * kv_dim)
        if self.by_products:
            # Keys and values are repeated for the queries that share them; all weights are kept.
            per_token += self.element * 2 * (query_dim - kv_dim)
            per_token += self.element * layer.num_query_heads * self.sequence_length
        else:
            per_token += FLOAT32 * layer.num_query_heads  # log-sum-exp
        return total + self.tokens * per_token + self._bottlenecks(layer, PROJECTIONS[:4])

    def ffn(self, layer: LayerBudget) -> int:
        """The FFN half of a layer, with its norm."""
        keeps_silu = self.gate_silu or layer.linears["gate_proj"].rank == 0
        wide = 4 if keeps_silu else 3
        per_token = self.element * (layer.hidden_size + wide * layer.ffn_dim)
        bottlenecks = self._bottlenecks(layer, PROJECTIONS[4:])
        return self.norm(layer.hidden_size) + self.tokens * per_token + bottlenecks

    def _bottlenecks(self, layer: LayerBudget, names: tuple[str, ...]) -> int:
        """The low-rank linears' pre-activations and their SiLU."""
        ranks = sum(item.rank for name, item in layer.linears.items() if name in names)
        return 2 * self.tokens * self.element * ranks

    def kept(self, layer: LayerBudget) -> int:
        """What a layer leaves when forward has passed it."""
        stream = FLOAT32 * self.tokens * layer.hidden_size
        if self.mode == "layer":
            return stream
        if self.mode == "cola_m":
            ranks = sum(item.rank for item in layer.linears.values())
            return 2 * stream + self.element * self.tokens * ranks
        return self.attention(layer) + self.ffn(layer) + self.weight_copies(layer)

    def recomputed(self, layer: LayerBudget) -> int:
        """What backward makes again for a layer before it uses it."""
        if self.mode == "none":
            return 0
        if self.mode == "layer":
            return self.attention(layer) + self.ffn(layer) + self.weight_copies(layer)
        halves = max(self.attention(layer), self.ffn(layer))
        return halves + self.weight_copies(layer)

    def weight_copies(self, layer: LayerBudget) -> int:
        """Autocast's bfloat16 copies of a layer's matrices, kept for backward."""
        if not self.mixed:
            return 0
        return self.element * (layer.attention_parameters + layer.ffn_parameters)

    def passing(self, layer: LayerBudget) -> int:
        """Gradients that pass through a layer's FFN at once, beyond the activations they replace.

        The stream's gradient twice, and three of FFN width while one activation is freed.
        """
        return self.tokens * (2 * FLOAT32 * layer.hidden_size + 2 * self.element * layer.ffn_dim)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The moments of a training step at which memory may peak."""

    costs: Budget
    shape: _Shape
    fixed: int
    accumulates: bool
    chunk_elements: int
    active: ActiveLayers

    @property
    def ran(self) -> tuple[LayerBudget, ...]:
        """The layers of the pass that leaves most for backward, from the bottom."""
        layers = self.costs.layers
        largest = self.active.largest([self.shape.kept(layer) for layer in layers])
        return tuple(layers[number] for number in sorted(largest))

    @property
    def gradients(self) -> int:
        """Gradients that wait for the next micro-batch."""
        return FLOAT32 * self.costs.parameters.total if self.accumulates else 0

    @property
    def stream(self) -> int:
        return FLOAT32 * self.shape.tokens * self.costs.hidden_size

    @property
    def vocabulary(self) -> int:
        """A gradient of the output matrix."""
        return FLOAT32 * self.costs.vocab_size * self.costs.hidden_size

    @property
    def ends(self) -> int:
        """What embedding, rotary tables, mask and final norm leave, and the batch itself."""
        shape, tokens = self.shape, self.shape.tokens
        tables = 2 * FLOAT32 * tokens * self.costs.layers[0].head_dim
        mask = 0 if shape.on_cuda else shape.element * tokens * shape.sequence_length
        return tables + mask + BATCH_TENSORS * INDEX * tokens + shape.norm(self.costs.hidden_size)

    @property
    def taken_ahead(self) -> int:
        """Gradients that the cross-entropy takes in its forward pass."""
        return self.stream + self.vocabulary

    @property
    def activations(self) -> int:
        layers = sum(self.shape.kept(layer) for layer in self.ran)
        return layers + self.ends + self.taken_ahead

    def cross_entropy(self) -> int:
        """Forward has passed all layers; the last chunk of logits is in hand."""
        shape, costs = self.shape, self.costs
        rows = min(shape.tokens, max(1, self.chunk_elements // costs.vocab_size))
        elements = rows * costs.vocab_size
        # Logits, log-probabilities, and those of the chunk before, which Python still holds.
        chunk = (3 if rows < shape.tokens else 2) * FLOAT32 * elements
        if shape.mixed:
            # Logits before they are cast up, and the gradient of those of the chunk before.
            chunk += (2 if rows < shape.tokens else 1) * shape.element * elements
            if not shape.on_cuda:
                # Adding a chunk's bfloat16 gradient of the matrix casts it up on the way.
                added = (FLOAT32 + shape.element) * (
                    elements + costs.vocab_size * costs.hidden_size
                )
                chunk = max(chunk, added)
            chunk += shape.element * costs.vocab_size * costs.hidden_size
            if shape.mode != "none":  # autocast's cache lives until its context ends
                chunk += sum(shape.weight_copies(layer) for layer in self.ran)
        chunk += self.stream  # the final norm's output
        return self.fixed + self.gradients + self.activations + chunk

    def backward(self) -> int:
        """The largest moment on the way back through the layers."""
        shape = self.shape
        left = self.activations
        arrived = self.gradients
        # The gradients taken ahead and their scaled copies; then the taken ones go.
        peak = left + arrived + self.stream + self.vocabulary
        left -= self.taken_ahead
        # Tied, the head's gradient waits for the embedding's; untied, it is there for good.
        waiting = self.vocabulary
        for layer in reversed(self.ran):
            now = left + arrived + waiting + shape.recomputed(layer) + shape.passing(layer)
            peak = max(peak, now)
            left -= shape.kept(layer)
            if not self.accumulates:
                arrived += FLOAT32 * layer.parameters
        peak = max(peak, left + arrived + waiting + 2 * self.vocabulary + self.stream)
        return self.fixed + peak

    def update(self) -> int:
        """The optimizer's step: everything but activations."""
        parameters = self.costs.parameters.total
        if not self.accumulates:  # what did not run has no gradient
            sizes = [layer.parameters for layer in self.costs.layers]
            parameters -= sum(sizes)
            parameters += sum(sizes[number] for number in self.active.largest(sizes))
        return self.fixed + FLOAT32 * parameters
