"""FLOPs of a pass as ``torch.utils.flop_counter`` counts them, attention included everywhere.

That counter knows the fused attention of CUDA alone, and torch 2.11's refuses grouped queries
there. The formulas below hold for every fused kernel, and count what the products would be without
one, as :mod:`samara.measure.budget` does: backward is twice forward, nothing recomputed. Causal
masks are not taken off, as torch does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A counter to use as a context; ``get_total_flops()`` and ``get_flop_counts()`` hold the sums.

    Causal masks count whole. FlexAttention is counted where the installed torch counts it.
    """
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def _forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values.

    Args:
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, key heads, keys, head_dim).
        value: Shape (batch, key heads, keys, value_dim).
    """
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    """Gradients of both products' factors; the scores that a kernel makes again do not count.

    Args:
        query: Shape as in :func:`_forward`, as all.
        key: Of the keys.
        value: Of the values.
    """
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * (width + value[3])


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_FORMULAS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{end}"): formula
    for kernel in _KERNELS
    for end, formula in (("", _forward), ("_backward", _backward))
}
