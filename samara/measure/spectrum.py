"""Spectra of activations, and how many directions hold them: the effective rank.

CoLA (arXiv 2502.10940, section 3): r(alpha) is the smallest k with
``sum_{i<=k} sigma_i^2 / sum_i sigma_i^2 >= alpha``, sigma the singular values of the activations X
(tokens, width). The squares are the eigenvalues of X^T X, which a stream of batches adds up without
keeping a token.

The paper's figure is **not centred**: the mean counts as a direction like any other, and a large
one (a few channels that are always far from zero) hides the rest. **Centred**, the eigenvalues are
those of the covariance: what differs between tokens. Both follow from the same two sums.

Everything here is float64: the squares of a float32 activation would lose the small directions.

Shapes: n tokens, d width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samara.errors import CheckpointError

FloatArray = npt.NDArray[np.float64]

# A share that equals alpha but for rounding reaches it: n equal eigenvalues have rank alpha * n.
TIE = 1e-9


class Covariance:
    """Sums over tokens from which their spectrum follows.

    Attributes:
        width: d.
        num_tokens: Rows added so far.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.num_tokens = 0
        self._sum_d = torch.zeros(width, dtype=torch.float64, device=device)
        self._products_dd = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x`` (..., d), of any floating dtype."""
        rows_nd = x.detach().reshape(-1, self.width).to(self._sum_d.device, torch.float64)
        self.num_tokens += rows_nd.shape[0]
        self._sum_d += rows_nd.sum(dim=0)
        self._products_dd.addmm_(rows_nd.T, rows_nd)

    def eigenvalues(self, *, centred: bool) -> FloatArray:
        """The spectrum per token, (d,), falling, none below zero.

        Args:
            centred: Of the covariance, rather than of the mean of x x^T.

        Raises:
            CheckpointError: If an activation was not finite.
        """
        if not self.num_tokens:
            return np.zeros(self.width)
        matrix_dd = self._products_dd / self.num_tokens
        if centred:
            mean_d = self._sum_d / self.num_tokens
            matrix_dd = matrix_dd - torch.outer(mean_d, mean_d)
        if not bool(torch.isfinite(matrix_dd).all()):
            raise CheckpointError(
                "an activation is infinite or no number; the weights are damaged, or float32 is "
                "needed (precision: float32)"
            )
        found: FloatArray = torch.linalg.eigvalsh(matrix_dd).flip(0).cpu().numpy()
        return np.maximum(found, 0.0)


def effective_rank(eigenvalues: FloatArray, alpha: float) -> int:
    """The fewest directions that hold the share ``alpha`` of the energy.

    Args:
        eigenvalues: Squared singular values, falling.
        alpha: Between 0 and 1.

    Returns:
        From 1 to their number; 0 where all are zero.
    """
    cumulative = np.cumsum(eigenvalues)
    if not len(cumulative) or cumulative[-1] <= 0:
        return 0
    reached = cumulative >= (alpha - TIE) * cumulative[-1]
    return int(np.argmax(reached)) + 1
