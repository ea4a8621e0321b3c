"""What training minimises: from a model and a micro-batch to summed losses.

The loop counts the targets of a whole step first, and divides sums by that count; an objective
therefore never takes a mean, and accumulation over micro-batches is exact whatever their padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from samara.data.objectives import CausalObjective, MaskedObjective, UL2Objective
from samara.data.objectives import Objective as ObjectiveSettings
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
        return _sums(model, hidden_btd, batch["targets"], z_loss=self.z_loss)


@dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """Next-token prediction behind a prefix that is seen both ways, for Samara's decoder.

    Attributes:
        z_loss: As in :class:`CausalLM`.
    """

    z_loss: float = 0.0

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`Objective`; the batch holds ``prefix_length`` too."""
        hidden_btd = model.base_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            prefix_length=batch["prefix_length"],
        ).last_hidden_state
        return _sums(model, hidden_btd, batch["targets"], z_loss=self.z_loss)


@dataclass(frozen=True, kw_only=True)
class MaskedLM:
    """What stood under the masks, for Samara's bidirectional model; rows may be packed.

    Attributes:
        z_loss: As in :class:`CausalLM`.
    """

    z_loss: float = 0.0

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`Objective`."""
        hidden_btd = model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"]
        ).last_hidden_state
        return _sums(model, hidden_btd, batch["targets"], z_loss=self.z_loss)


@dataclass(frozen=True, kw_only=True)
class MaskedLMByLogits:
    """What stood under the masks, for any masked language model of ``transformers``, as BERT.

    Their heads are more than one matrix, and they know no packed documents: give them
    :class:`~samara.data.masked_lm.DocumentRows`.
    """

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`Objective`; the batch holds ``attention_mask`` too."""
        logits_btv = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        counted_bt = batch["targets"] != IGNORE_INDEX
        chosen_nv, targets_n = logits_btv[counted_bt], batch["targets"][counted_bt]
        exact_nv = chosen_nv if chosen_nv.dtype == torch.float64 else chosen_nv.float()
        nll = cross_entropy(exact_nv, targets_n, reduction="sum")
        return Sums(loss=nll, nll=nll)


def make_objective(settings: ObjectiveSettings, *, z_loss: float) -> Objective:
    """The objective of a recipe's ``objective:`` section, for Samara's models."""
    match settings:
        case MaskedObjective():
            return MaskedLM(z_loss=z_loss)
        case UL2Objective():
            return PrefixLM(z_loss=z_loss)
        case CausalObjective():
            return CausalLM(z_loss=z_loss)


def _sums(model: PreTrainedModel, hidden_btd: Tensor, targets_bt: Tensor, *, z_loss: float) -> Sums:
    weight_vd = output_weight(model)
    assert weight_vd is not None, "a language model has a matrix to the vocabulary"
    result = linear_cross_entropy(hidden_btd, weight_vd, targets_bt, z_loss=z_loss)
    return Sums(loss=result.loss_sum, nll=result.nll_sum)


def output_weight(model: PreTrainedModel) -> Tensor | None:
    """The matrix (v, d) from hidden states to the vocabulary; None if the model has none."""
    head: nn.Linear | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return None if head is None else head.weight


def count_targets(micro_batches: Sequence[Batch]) -> int:
    """Targets that count, over all micro-batches of a step."""
    return sum(int((batch["targets"] != IGNORE_INDEX).sum()) for batch in micro_batches)
