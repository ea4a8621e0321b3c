"""FedProx: a pull back to where a local training began (Li et al., arXiv 1812.06127).

The paper adds (μ/2) ||w - w₀||² to each client's loss, with w₀ the global weights that it was
given. Its gradient μ (w - w₀) is added here to that of the batch. Two things follow for layers of
DropPEFT: one that was skipped has no gradient and gets none, so that it stays untouched; one that
the client keeps as its own is pulled to the client's own value, where its training began.

The importance of layers is measured before: it is that of the data.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class ProximalTerm:
    """The pull on some parameters, from the values that they have when it is made."""

    def __init__(self, mu: float, parameters: Iterable[nn.Parameter]) -> None:
        self._mu = mu
        self._pairs = [(p, p.detach().clone()) for p in parameters] if mu > 0 else []

    @torch.no_grad()
    def add(self) -> None:
        """Add its gradient where there is one; with μ = 0 nothing happens."""
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)
