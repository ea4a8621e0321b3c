"""The K best of many scores, exactly and the same each time, in two passes of 512 KiB.

Scores are at least 0, so the bits of a float32, read as an integer, are in the order of the
numbers. A histogram of their upper 16 bits finds the bin of the K-th best, a second one of the
lower 16 bits in that bin its value. Everything above is taken, then equal scores by tensor order
and position until K: no sort, no copy of the scores, no choice left to the machine. A score of 0 is
never taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from samara.errors import NonFiniteLossError

BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one tensor's units.

    Attributes:
        scores: Flat, float32, at least 0.
        unit: Entries of a unit: 1, or those of a block, column or row.
    """

    scores: Tensor
    unit: int = 1


Stream = Callable[[], Iterable[Scored]]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where the K best end.

    Attributes:
        bits: The K-th best score as an integer; better ones are taken, equal ones while they last.
        above: Entries that are better.
    """

    bits: int
    above: int


def find_threshold(stream: Stream, total: int) -> Threshold:
    """The threshold of the ``total`` best entries over all tensors of ``stream`` (read twice).

    Raises:
        NonFiniteLossError: If a score is not a number.
    """
    upper = torch.zeros(BINS, dtype=torch.int64)
    for scored in stream():
        bits = _bits(scored.scores)
        upper += scored.unit * torch.bincount(bits[bits > 0] >> 16, minlength=BINS).cpu()
    bin_, above = _boundary(upper, total)
    if bin_ is None:
        return Threshold(bits=0, above=above)
    lower = torch.zeros(BINS, dtype=torch.int64)
    for scored in stream():
        bits = _bits(scored.scores)
        inside = bits[(bits > 0) & (bits >> 16 == bin_)]
        lower += scored.unit * torch.bincount(inside & (BINS - 1), minlength=BINS).cpu()
    low, above_inside = _boundary(lower, total - above)
    assert low is not None
    return Threshold(bits=(bin_ << 16) | low, above=above + above_inside)


def _boundary(histogram: Tensor, total: int) -> tuple[int | None, int]:
    """The bin in which the count from the top reaches ``total``, and the count above it."""
    from_top = histogram.flip(0).cumsum(0)
    reached = torch.searchsorted(from_top, max(1, total))
    if reached == BINS:
        return None, int(from_top[-1])
    bin_ = BINS - 1 - int(reached)
    return bin_, int(from_top[reached] - histogram[bin_])


def count_best(stream: Stream, total: int) -> list[int]:
    """How many of the ``total`` best entries each tensor of ``stream`` holds (read three times)."""
    threshold = find_threshold(stream, total)
    left = total - threshold.above
    counts = []
    for scored in stream():
        bits = _bits(scored.scores)
        better = scored.unit * int((bits > threshold.bits).sum())
        equal = int((bits == threshold.bits).sum()) if threshold.bits else 0
        taken = scored.unit * min(equal, max(0, left) // scored.unit)
        left -= taken
        counts.append(better + taken)
    return counts


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` best positive scores, ascending, int64; equal ones: the first.

    Fewer than ``k`` if fewer are positive.

    Raises:
        NonFiniteLossError: If a score is not a number.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    flat = scores.flatten()
    threshold = find_threshold(lambda: [Scored(scores=flat)], k)
    bits = _bits(flat)
    taken = bits > threshold.bits
    if threshold.bits:
        equal = (bits == threshold.bits).nonzero().flatten()
        taken[equal[: k - threshold.above]] = True
    return taken.nonzero().flatten()


def _bits(scores: Tensor) -> Tensor:
    """Scores as int32 in their order; infinity is allowed, and the best."""
    if bool(torch.isnan(scores).any()):
        raise NonFiniteLossError(
            "selection: a gradient of the calibration samples is not a finite number; use "
            "precision float32, or look at the samples"
        )
    return scores.to(torch.float32).view(torch.int32)
