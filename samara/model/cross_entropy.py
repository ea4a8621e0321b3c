"""Cross-entropy straight from hidden states: the logits of a batch never exist whole.

Token rows go through the output matrix in chunks. In training each chunk's gradient is taken while
its probabilities are at hand, so that nothing of size (rows, vocabulary) waits for backward and no
product is computed twice.

Shapes: b batch, t positions, n = b * t rows, c rows of a chunk, d hidden, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samara.model.autocast import compute_dtype

IGNORE_INDEX = -100
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Logits of one chunk: on CPU what stays in the last-level cache, on CUDA enough to fill it."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Sums over the counted targets; divide by ``num_targets``, over all batches, for means.

    Attributes:
        loss_sum: ``nll_sum + z_loss * z_sum``, a scalar; the one that is differentiable.
        nll_sum: Summed negative log-likelihood in nats, a scalar.
        z_sum: Summed squared log-partition, a scalar; 0 without z-loss.
        num_targets: Targets counted, an int64 scalar.
    """

    loss_sum: Tensor
    nll_sum: Tensor
    z_sum: Tensor
    num_targets: Tensor


def linear_cross_entropy(
    hidden_btd: Tensor, weight_vd: Tensor, targets_bt: Tensor, *, z_loss: float = 0.0
) -> CrossEntropy:
    """Cross-entropy of the logits ``hidden @ weight.T`` against targets.

    Under autocast the products run in its dtype; softmax and sums in float32 (float64 for float64).

    Args:
        hidden_btd: Hidden states (b, t, d).
        weight_vd: Output matrix (v, d).
        targets_bt: Token after each position (b, t), int64; -100 is not counted.
        z_loss: Weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
    """
    rows = hidden_btd.flatten(0, -2)
    targets = targets_bt.flatten()
    differentiate = torch.is_grad_enabled() and (rows.requires_grad or weight_vd.requires_grad)
    loss_sum, nll_sum, z_sum = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight_vd, targets, z_loss, differentiate
    )
    num_targets = (targets != IGNORE_INDEX).sum()
    return CrossEntropy(loss_sum=loss_sum, nll_sum=nll_sum, z_sum=z_sum, num_targets=num_targets)


@torch.no_grad()
def per_token_nll(hidden_btd: Tensor, weight_vd: Tensor, targets_bt: Tensor) -> Tensor:
    """Negative log-likelihood of each target (b, t) in nats, 0 where the target is -100."""
    rows, targets = hidden_btd.flatten(0, -2), targets_bt.flatten()
    dtype = compute_dtype(rows)
    weight = weight_vd.to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        chunks = [
            _log_probabilities(rows[span].to(dtype), weight, targets[span]).nll
            for span in _spans(rows, weight)
        ]
    nll = torch.cat(chunks) if chunks else rows.new_zeros(0)
    return nll.view(targets_bt.shape)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    log_p: Tensor  # (c, v)
    nll: Tensor  # (c,), 0 where not counted
    log_z: Tensor  # (c,), the log-partition
    counted: Tensor  # (c,), booleans
    targets: Tensor  # (c, 1), 0 where not counted


def _log_probabilities(rows: Tensor, weight: Tensor, targets: Tensor) -> _Chunk:
    counted = targets != IGNORE_INDEX
    safe = torch.where(counted, targets, 0)[:, None]
    logits = rows @ weight.T
    exact = logits.dtype if logits.dtype == torch.float64 else torch.float32
    logit = logits.gather(1, safe)[:, 0].to(exact)
    log_p = torch.log_softmax(logits, dim=-1, dtype=exact)
    nll = -log_p.gather(1, safe)[:, 0]
    return _Chunk(
        log_p=log_p,
        nll=torch.where(counted, nll, 0.0),
        log_z=torch.where(counted, logit + nll, 0.0),
        counted=counted,
        targets=safe,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """The sums, with the gradient of the loss computed in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight_vd: Tensor,
        targets: Tensor,
        z_loss: float,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(rows)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        weight = weight_vd.to(dtype)
        nll_sum = torch.zeros((), dtype=exact, device=rows.device)
        z_sum = torch.zeros_like(nll_sum)
        if differentiate:
            d_rows = torch.empty_like(rows, dtype=exact)
            # A frozen matrix needs none: it is as large as the vocabulary.
            d_weight = torch.zeros_like(weight_vd, dtype=exact) if ctx.needs_input_grad[1] else None
        with torch.autocast(rows.device.type, enabled=False):
            for span in _spans(rows, weight):
                chunk_rows = rows[span].to(dtype)
                chunk = _log_probabilities(chunk_rows, weight, targets[span])
                nll_sum += chunk.nll.sum()
                if z_loss:
                    z_sum += chunk.log_z.square().sum()
                if differentiate:
                    d_logits = _logit_gradient(chunk, z_loss).to(dtype)
                    d_rows[span] = d_logits @ weight
                    if d_weight is not None:
                        d_weight += d_logits.T @ chunk_rows
        if differentiate:
            ctx.save_for_backward(d_rows, d_weight)
            ctx.dtypes = rows.dtype, weight_vd.dtype
        loss_sum = nll_sum + z_loss * z_sum
        ctx.mark_non_differentiable(nll_sum, z_sum)
        return loss_sum, nll_sum, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that forward left."""
        d_rows, d_weight = ctx.saved_tensors
        rows_dtype, weight_dtype = ctx.dtypes
        return (
            (d_rows * grad_loss).to(rows_dtype),
            None if d_weight is None else (d_weight * grad_loss).to(weight_dtype),
            None,
            None,
            None,
        )


def _logit_gradient(chunk: _Chunk, z_loss: float) -> Tensor:
    """D (nll + z_loss * log_z^2) / d logits = (1 + 2 z_loss log_z) p - onehot(target), (c, v)."""
    counted = chunk.counted[:, None].to(chunk.log_p.dtype)
    gradient = chunk.log_p.exp_()
    gradient *= counted + 2.0 * z_loss * chunk.log_z[:, None]  # log_z is 0 where not counted
    return gradient.scatter_add_(1, chunk.targets, -counted)


def _spans(rows: Tensor, weight_vd: Tensor) -> list[slice]:
    """Equal-sized slices of the rows; the last may be shorter."""
    num_rows, elements = rows.shape[0], CHUNK_ELEMENTS["cuda" if rows.is_cuda else "cpu"]
    size = max(1, elements // weight_vd.shape[0])
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
