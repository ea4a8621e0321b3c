"""Layer-wise scaling: give each layer its own number of heads and FFN width.

OpenELM (arXiv 2404.14619, section 2.1): the same parameters, spent less on the first layers and
more on the last ones. Width multipliers rise linearly with depth,

    alpha_i = alpha_min + (alpha_max - alpha_min) * i / (N - 1)      query width / hidden_size
    beta_i  = beta_min  + (beta_max  - beta_min)  * i / (N - 1)      FFN width  / hidden_size

and are rounded to two decimals before anything else, as the published models were: skipping that
gives other integers in four places of the published tables. Pure Python, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerwiseSchedule:
    """Integer widths of every layer, first layer first."""

    num_query_heads: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]


def make_divisible(value: float, divisor: int) -> int:
    """Round to the nearest multiple of ``divisor`` (half rounds up), at least ``divisor``.

    If that loses more than 10 % of ``value``, the next multiple up is taken. OpenELM section 2.1;
    the guard decides five head counts of the published sizes.
    """
    nearest = max(divisor, divisor * math.floor((value + divisor / 2) / divisor))
    return nearest + divisor if nearest < 0.9 * value else nearest


def multipliers(low: float, high: float, num_layers: int) -> tuple[float, ...]:
    """``num_layers`` evenly spaced values from ``low`` to ``high``, rounded to two decimals."""
    if num_layers == 1:
        return (round(low, 2),)
    step = (high - low) / (num_layers - 1)
    return tuple(round(low + step * layer, 2) for layer in range(num_layers))


def layerwise_schedule(
    *,
    num_layers: int,
    hidden_size: int,
    head_dim: int,
    gqa_group_size: int,
    alpha: tuple[float, float] = (0.5, 1.0),
    beta: tuple[float, float] = (0.5, 4.0),
    ffn_dim_divisor: int = 256,
) -> LayerwiseSchedule:
    """Return the widths of every layer.

    Args:
        num_layers: N, the number of layers.
        hidden_size: d, the width of the residual stream.
        head_dim: Width of one attention head.
        gqa_group_size: Query heads that share one key-value head (1: multi-head attention).
            OpenELM's config calls this ``num_gqa_groups``.
        alpha: Query width of the first and last layer, as a multiple of ``hidden_size``.
        beta: FFN width of the first and last layer, as a multiple of ``hidden_size``.
        ffn_dim_divisor: FFN widths are multiples of this.
    """
    query_heads = tuple(
        make_divisible(hidden_size * a, head_dim * gqa_group_size) // head_dim
        for a in multipliers(*alpha, num_layers)
    )
    return LayerwiseSchedule(
        num_query_heads=query_heads,
        num_kv_heads=tuple(heads // gqa_group_size for heads in query_heads),
        ffn_dims=tuple(
            make_divisible(hidden_size * b, ffn_dim_divisor) for b in multipliers(*beta, num_layers)
        ),
    )
