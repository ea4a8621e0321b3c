"""What sparse training takes, as a formula; the measured peak stands beside it in the results.

    bytes = weights + state + activations + workspace + libraries

weights: as stored, 2 bytes each in bfloat16. state, per selected entry: position 4, value 4,
moments 8, gradient 4, and the base model's number as stored (2): 22 in bfloat16, 24 in float32.
Blocks, and supports that are sliced but not whole in the slice (two-level), keep a second position
(26).
activations: those of the layers from the lowest selected one up; a tap keeps its layer's input, or
only the columns that hold entries. workspace: one tile of a dense gradient, or the logits that the
chunked cross-entropy has in hand, whichever is larger: the two are never there at once. libraries:
on CUDA what cuBLAS keeps for the threads of forward and backward.

For comparison: full fine-tuning with AdamW in mixed precision takes 16 bytes a weight, LoRA 2 a
weight and 16 a parameter of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samara.measure.memory import CUBLAS_HANDLES, CUBLAS_WORKSPACE
from samara.model.cross_entropy import CHUNK_ELEMENTS
from samara.sparse.attach import Attachment
from samara.sparse.gradients import WORKSPACE_BYTES, Plan

POSITION, EXACT = 4, 4
MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class SparseMemory:
    """Bytes of sparse training on one device.

    Attributes:
        weights: Of the model, all frozen.
        state: Of the selected entries: positions, values, moments, gradients, base numbers.
        activations: What forward leaves for backward.
        workspace: The largest tile, or the logits of a chunk.
        libraries: What the library of products keeps beside tensors.
    """

    weights: int
    state: int
    activations: int
    workspace: int
    libraries: int

    @property
    def total(self) -> int:
        """The sum, the estimate of the peak."""
        return self.weights + self.state + self.activations + self.workspace + self.libraries


def sparse_memory(
    *,
    num_weights: int,
    num_entries: int,
    weight_bytes: int = 2,
    sliced_entries: int = 0,
    activations: int = 0,
    largest_matrix: int | None = None,
    logits: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> SparseMemory:
    """The formula.

    Args:
        num_weights: Weights of the model.
        num_entries: Selected ones, k.
        weight_bytes: Bytes of a stored weight.
        sliced_entries: Entries that keep a second position (blocks, two-level).
        activations: Bytes that forward leaves for backward, for the batch at hand.
        largest_matrix: Entries of the largest matrix; smaller ones need no whole workspace.
        logits: Bytes of a language model's logits in hand, from :func:`logits_bytes`.
        device: Where products are made; on CUDA that takes memory of its own.
    """
    dense = WORKSPACE_BYTES if largest_matrix is None else weight_bytes * largest_matrix
    entry = 2 * POSITION + EXACT * (1 + MOMENTS) + weight_bytes
    return SparseMemory(
        weights=weight_bytes * num_weights,
        state=entry * num_entries + POSITION * sliced_entries,
        activations=activations,
        workspace=max(min(WORKSPACE_BYTES, dense), logits),
        libraries=CUBLAS_HANDLES * CUBLAS_WORKSPACE if device == "cuda" else 0,
    )


def logits_bytes(
    *, tokens: int, vocabulary: int, device: Literal["cpu", "cuda"], element_size: int
) -> int:
    """Bytes of logits that :func:`samara.model.cross_entropy.linear_cross_entropy` has in hand.

    Logits and log-probabilities of a chunk, in float32; with several chunks those of the one
    before, too, which Python still holds; and below float32 the logits and gradient as stored.

    Args:
        tokens: Of a micro-batch.
        vocabulary: Rows of the output matrix.
        device: Decides the size of a chunk.
        element_size: Bytes of a hidden state's number.
    """
    rows = min(tokens, max(1, CHUNK_ELEMENTS[device] // vocabulary))
    exact = 3 if rows < tokens else 2
    stored = 0 if element_size == EXACT else exact - 1
    return rows * vocabulary * (EXACT * exact + element_size * stored)


def kept_input_bytes(attachment: Attachment, *, tokens: int, element_size: int) -> int:
    """Bytes of layer inputs that the taps keep for backward; a shared one is counted each time.

    Args:
        attachment: Its plans say which columns are kept.
        tokens: Of a micro-batch.
        element_size: Bytes of a number of the activations.
    """
    features = 0
    for name, plan in attachment.plans.items():
        if isinstance(plan, Plan):
            weight = attachment.selected[name].weight
            features += weight.shape[plan.input_dim] if plan.inputs is None else plan.inputs.numel()
    return tokens * features * element_size
