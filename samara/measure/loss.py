"""Loss on held-out text, exactly: summed over all targets of a fixed set, divided by their number.

The set is the first rows of a packed split, all of them by default; nothing depends on how they are
batched, and padding never counts. A mean of batch means would weigh a short last batch like a full
one, and a batch counter started at 1 has made published perplexities 1 to 3 % too low (CoLA and its
relatives, see the paper's code): neither can happen here.

Sums are kept per document, in float64, on the CPU: the unit of resampling for intervals
(:mod:`samara.measure.compare`) and of bits per byte. Where text is masked or denoised the unit
is the row: noise is drawn for each, and a row of UL2 may hold parts of several documents.

Shapes: b batch, t positions, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from samara.data.rows import Batch, Rows
from samara.data.tokens import IGNORE_INDEX, PackedSequences
from samara.model.cross_entropy import per_token_nll
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """Sums per document of the split, in its order, up to the last document that was reached.

    Of other rows than packed ones: sums per row, and no bytes.

    Attributes:
        nll_sum: (documents,) summed negative log-likelihood in nats.
        num_targets: (documents,) targets counted.
        num_bytes: (documents,) UTF-8 bytes of the text; 0 for a document that was not reached to
            its end, so that bits per byte are those of whole documents only.
    """

    nll_sum: npt.NDArray[np.float64]
    num_targets: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats per target; NaN if nothing was counted."""
        return _divide(float(self.nll_sum.sum()), int(self.num_targets.sum()))

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits(self) -> npt.NDArray[np.float64]:
        """(documents,) bits of the whole documents; 0 for one not reached to its end."""
        return np.where(self.num_bytes > 0, self.nll_sum / math.log(2), 0.0)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text, comparable between tokenizers; NaN without a whole document.

        The end mark of a document is one of its targets; its first token is one only where the
        tokenizer has a start mark to predict it from.
        """
        return _divide(float(self.bits.sum()), int(self.num_bytes.sum()))


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that is no number any more."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def rows_within(dataset: Rows, max_tokens: int | None) -> int:
    """Rows that ``max_tokens`` tokens fill, at least one; all of them for None."""
    if max_tokens is None:
        return len(dataset)
    return min(len(dataset), max(1, max_tokens // dataset.sequence_length))


def evaluate_loss(
    model: PreTrainedModel,
    dataset: Rows,
    *,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda _: None,
    rank: int = 0,
    world_size: int = 1,
) -> LossResult:
    """Score a model on the rows of a split.

    Args:
        model: Any causal language model of ``transformers``, on ``device``, or for other than
            packed rows the model of ours that they are for. It is put into evaluation mode and
            left in the mode it was in.
        dataset: The rows. Of packed ones without ``document_boundaries``, the step to a document's
            first token counts for the document before it.
        batch_size: Rows at a time; the result depends on it by rounding only.
        device: Where the model is.
        precision: ``bfloat16``: autocast; softmax and sums keep full precision.
        max_tokens: Use the first rows only, :func:`rows_within` this many tokens.
        on_progress: Called with the number of rows done.
        rank: This process among those of ``torch.distributed`` that share the rows; all of them
            call this, and get the same result.
        world_size: How many share them.
    """
    num_rows = rows_within(dataset, max_tokens)
    packed = dataset if isinstance(dataset, PackedSequences) else None
    num_units = num_rows if packed is None else packed.shards.num_documents
    nll_sum = torch.zeros(num_units, dtype=torch.float64)
    num_targets = torch.zeros(num_units, dtype=torch.int64)
    training = model.training
    model.train(False)
    try:
        for first in range(0, num_rows, batch_size * world_size):
            own = first + rank * batch_size
            # Past the end, the first batch again, uncounted: a sharded model needs all to run it.
            start = own if own < num_rows else 0
            stop = min(start + batch_size, num_rows)
            batch = dataset.batch(range(start, stop))
            nll_bt = _batch_nll(model, batch, device, precision)
            counted_bt = (batch["targets"] != IGNORE_INDEX) & (start == own)
            rows_bt = torch.arange(start, stop)[:, None].expand_as(counted_bt)
            units = (rows_bt if packed is None else batch["document_ids"])[counted_bt]
            nll_sum.index_add_(0, units, nll_bt[counted_bt])
            num_targets.index_add_(0, units, torch.ones_like(units))
            on_progress(min(first + batch_size * world_size, num_rows))
    finally:
        model.train(training)
    if world_size > 1:
        distributed.all_reduce(nll_sum)
        distributed.all_reduce(num_targets)
    if packed is not None:
        return _result(packed, num_rows, nll_sum.numpy(), num_targets.numpy())
    return LossResult(
        nll_sum=nll_sum.numpy(),
        num_targets=num_targets.numpy(),
        num_bytes=np.zeros(num_rows, dtype=np.int64),
    )


@torch.no_grad()
def _batch_nll(
    model: PreTrainedModel, batch: Batch, device: torch.device, precision: Precision
) -> Tensor:
    """Negative log-likelihood of each target (b, t), float64 on the CPU; 0 where not counted."""
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    input_ids, targets_bt = on_device["input_ids"], on_device["targets"]
    position_ids = on_device["position_ids"]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        if isinstance(model, SamaraForCausalLM | SamaraForMaskedLM):
            hidden_btd = model.model(
                input_ids=input_ids,
                position_ids=position_ids,
                prefix_length=on_device.get("prefix_length"),
            ).last_hidden_state
            nll_bt = per_token_nll(hidden_btd, model.lm_head.weight, targets_bt)
        else:
            # transformers reads packed documents from positions that restart, as our model does.
            logits_btv = model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits
            nll_bt = torch.stack(list(_row_nll(logits_btv, targets_bt)))
    return nll_bt.to("cpu", torch.float64)


def _row_nll(logits_btv: Tensor, targets_bt: Tensor) -> Iterator[Tensor]:
    """Row by row, so that only one row of logits exists in float32."""
    for logits_tv, targets_t in zip(logits_btv, targets_bt, strict=True):
        exact_tv = logits_tv if logits_tv.dtype == torch.float64 else logits_tv.float()
        yield cross_entropy(exact_tv, targets_t, ignore_index=IGNORE_INDEX, reduction="none")


def _result(
    dataset: PackedSequences,
    num_rows: int,
    nll_sum: npt.NDArray[np.float64],
    num_targets: npt.NDArray[np.int64],
) -> LossResult:
    """Cut the sums to the documents that were reached, and give bytes to those that are whole."""
    offsets = np.asarray(dataset.shards.document_offsets)
    # The targets of the first rows end with this position of the stream.
    last = min(num_rows * dataset.sequence_length, dataset.shards.num_tokens - 1)
    reached = int(np.searchsorted(offsets[:-1], last, side="right"))
    whole = offsets[1 : reached + 1] <= last + 1
    num_bytes = np.asarray(dataset.shards.document_bytes[:reached])
    return LossResult(
        nll_sum=nll_sum[:reached],
        num_targets=num_targets[:reached],
        num_bytes=np.where(whole, num_bytes, 0),
    )


def _divide(numerator: float, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
