"""What training minimises: from a model and a micro-batch to summed losses.

The loop counts the targets of a whole step first, and divides sums by that count; an objective
therefore never takes a mean, and accumulation over micro-batches is exact whatever their padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.data.tokens import IGNORE_INDEX
from samara.model.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the counted targets of a micro-batch, scalar tensors on the model's device.

    Attributes:
        loss: What is minimised, differentiable.
        nll: The negative log-likelihood, for the log; the two differ by regularisers such as
            z-loss.
    """

    loss: Tensor
    nll: Tensor


class Objective(Protocol):
    """A function from a model and a micro-batch to :class:`Sums`."""

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """Run the model forward. The batch is on the model's device."""
        ...


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Next-token prediction, for any decoder of ``transformers`` whose head is one matrix.

    Attributes:
        z_loss: Weight of the squared log-partition, summed over the targets like the loss
            (OpenELM's configs: 1e-4).
    """

    z_loss: float = 0.0

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`Objective`."""
        hidden_btd = model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        weight_vd = output_weight(model)
        assert weight_vd is not None, "a causal language model has a matrix to the vocabulary"
        result = linear_cross_entropy(hidden_btd, weight_vd, batch["targets"], z_loss=self.z_loss)
        return Sums(loss=result.loss_sum, nll=result.nll_sum)


def output_weight(model: PreTrainedModel) -> Tensor | None:
    """The matrix (v, d) from hidden states to the vocabulary; None if the model has none."""
    head: nn.Linear | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return None if head is None else head.weight


def count_targets(micro_batches: Sequence[Batch]) -> int:
    """Targets that count, over all micro-batches of a step."""
    return sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in micro_batches)
