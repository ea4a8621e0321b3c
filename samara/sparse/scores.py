"""Scores: which weights are worth training. One family, with the published rules as presets.

    S_i = |g_i|^a * (F_i + lambda)^b * (|w_i| + epsilon)^c

g is the mean gradient and F the mean squared one (:mod:`samara.sparse.calibration`); per matrix,
lambda = 1e-3 * median F (of the non-zero mean where the median is 0) and epsilon = 1e-3 * RMS(w).
A matrix whose F is 0 everywhere gets no entries by a score that looks at gradients.

    preset       a  b     c    who
    grad         1  0     0    SIFT (2312.11875), SHiRA-Grad (2406.13175), SPEFT (2412.13488)
    fisher       0  1     0    FISH mask (2111.09839)
    grad_fisher  1  0.5   0    |g| sqrt(F): large gradients, discounted where samples disagree
    newton       2  -1    0    g^2 / F, the predicted fall of the loss; wants 256 samples or more
    snip         1  0     1    SHiRA-SNIP (2406.13175)
    gallop       1  0     -1   GaLLoP (2510.19778), in ratio form
    magnitude    0  0     1    Super-Tuning (2607.09287)
    small        0  0     -1   PaFi

Besides: ``lift``, the entries of the best low-rank approximation (LIFT, 2506.00772); its product
with grad_fisher; and ``random``, which every other has to beat.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samara.sparse.calibration import GradientSums
from samara.sparse.config import ScoreName

FLOOR = 1e-3
"""lambda and epsilon, relative to the median of F and the RMS of w."""

Exponents = tuple[float, float, float]
PRESETS: dict[ScoreName, Exponents] = {
    "grad": (1.0, 0.0, 0.0),
    "fisher": (0.0, 1.0, 0.0),
    "grad_fisher": (1.0, 0.5, 0.0),
    "newton": (2.0, -1.0, 0.0),
    "snip": (1.0, 0.0, 1.0),
    "gallop": (1.0, 0.0, -1.0),
    "magnitude": (0.0, 0.0, 1.0),
    "small": (0.0, 0.0, -1.0),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A rule from weight and gradients to scores.

    Attributes:
        name: A preset, or one of the rules beside the family.
        exponents: In place of the preset's.
        density: Share of the weights that will be chosen: decides the rank of ``lift``.
        seed: Of ``random``, and of the projections behind ``lift``.
    """

    name: ScoreName
    exponents: Exponents | None = None
    density: float = 0.005
    seed: int = 0

    @property
    def needs_gradients(self) -> bool:
        """Whether samples have to be run."""
        if self.name == "lift_x_grad_fisher":
            return True
        exponents = self.exponents or PRESETS.get(self.name)
        return exponents is not None and any(exponents[:2])

    def __call__(self, tensor: str, weight: Tensor, sums: GradientSums | None) -> Tensor:
        """Scores in the shape of ``weight``, float32 or better, all at least 0.

        Args:
            tensor: The weight's name: ``random`` depends on it, not on the order of the weights.
            weight: Two-dimensional.
            sums: Its gradients; None where none are needed.
        """
        weight = weight.detach()
        match self.name:
            case "random":
                return _random(tensor, weight, seed=self.seed)
            case "lift":
                return self._lift(tensor, weight)
            case "lift_x_grad_fisher":
                gradient = family(PRESETS["grad_fisher"], weight, sums)
                product = rms_normalized(self._lift(tensor, weight)) * rms_normalized(gradient)
                return product.sqrt()
            case _:
                return family(self.exponents or PRESETS[self.name], weight, sums)

    def _lift(self, tensor: str, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        rank = max(1, round(self.density * rows * columns / (rows + columns)))
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return low_rank_approximation(exact, rank=rank, seed=_key(self.seed, tensor)).abs_()


def family(exponents: Exponents, weight: Tensor, sums: GradientSums | None) -> Tensor:
    """|g|^a (F + lambda)^b (|w| + epsilon)^c; 0 where gradients are asked for and all are 0."""
    a, b, c = exponents
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    score = torch.ones_like(exact)
    if a or b:
        assert sums is not None
        typical = sums.typical_fisher
        if typical == 0:
            return torch.zeros_like(exact)
        score = score * _power(sums.mean.abs(), a) * _power(sums.fisher + FLOOR * typical, b)
        if sums.index is not None:  # candidates only
            kept = torch.zeros_like(score)
            kept.view(-1)[sums.index] = score.view(-1)[sums.index]
            score = kept
    if c:
        score = score * _power(exact.abs() + FLOOR * exact.square().mean().sqrt(), c)
    return score


def _power(x: Tensor, exponent: float) -> Tensor | float:
    """x^exponent, exact under scaling by powers of two for the presets' exponents."""
    match exponent:
        case 0.0:
            return 1.0
        case 1.0:
            return x
        case 2.0:
            return x.square()
        case 0.5:
            return x.sqrt()
        case -1.0:
            return x.reciprocal()
        case _:
            return x.pow(exponent)


def rms_normalized(score: Tensor) -> Tensor:
    """Scores divided by their root mean square; zeros stay.

    The largest is divided out first: squares of small scores would vanish in float32.
    """
    largest = score.amax()
    if largest == 0:
        return score
    scaled = score / largest
    return scaled / scaled.square().mean().sqrt()


def low_rank_approximation(weight: Tensor, *, rank: int, seed: int, rounds: int = 2) -> Tensor:
    """The best approximation of a matrix by one of a lower rank, in the Frobenius norm.

    Exact where the rank is no small share of the matrix, else by randomised subspace iteration with
    twice the rank (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1).
    """
    width = 2 * rank
    if width >= min(weight.shape):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(weight.shape[1], width, generator=generator, dtype=weight.dtype)
        q = torch.linalg.qr(weight @ start.to(weight.device)).Q
        for _ in range(rounds):
            q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ weight, full_matrices=False)
        u = q @ u
    result: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return result


def _random(tensor: str, weight: Tensor, *, seed: int) -> Tensor:
    """Uniform in (0, 1], by a counter-based generator keyed by seed and name."""
    bits = np.random.Philox(key=np.array([seed % 2**64, _key(0, tensor)], dtype=np.uint64))
    raw = bits.random_raw(weight.numel()) >> np.uint64(40)
    uniform = (raw.astype(np.float32) + np.float32(1.0)) * np.float32(2.0**-24)
    scores: Tensor = torch.from_numpy(uniform).view(weight.shape).to(weight.device)
    return scores


def _key(seed: int, tensor: str) -> int:
    """A number in [0, 2^63) from seed and name."""
    digest = hashlib.sha256(f"{seed} {tensor}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
