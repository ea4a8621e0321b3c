"""What a layer keeps for backward: its input only, or CoLA-M's choice.

CoLA-M (arXiv 2502.10940, section 4): of each layer keep the two residual streams (2d a token) and
the seven low-rank pre-activations u = x A (7r); recompute norms, SiLUs, the products with B and
attention. Differs from the released code, which keeps silu(u), from which u cannot be had back, and
so repeats the products with A: here none is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Layers draw no random numbers, so there is no random state to keep.


def checkpoint_layer(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run ``layer``, keep its input, recompute everything in backward."""
    result: Tensor = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    return result


def checkpoint_keeping_pre_activations(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run ``part``, keep its input and each u = x A in it, recompute the rest in backward.

    Recomputation stops at the last tensor that backward needs. A part that ends in a low-rank
    projection therefore does not repeat that projection's product with B either.
    """
    result: Tensor = checkpoint(
        part,
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_pre_activations),
    )
    return result


def _keep_pre_activations(
    context: Any, operator: Any, *arguments: Any, **keywords: Any
) -> CheckpointPolicy:
    del context, arguments, keywords
    if operator is torch.ops.samara.low_rank_down.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
