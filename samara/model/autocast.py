"""The number format that products run in: autocast's where it is on, else the tensor's own."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of ``x`` runs.

    The meta device has no autocast. It is told by its name: torch 2.11 cannot compile
    ``torch.amp.is_autocast_available``.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
