"""How much each layer matters in a local training, summed over the batches in which it was active.

Four scores, of a layer's trained parameters θ with gradients g of a batch's mean loss, before
clipping:

    grad_norm       ||g||
    fisher          ||g||²
    taylor          |<θ, g>|
    weight_change   ||θ_after - θ_before|| / ||θ_before|| over the whole training. Of LoRA the
                    product B A is compared, since how a change is split between A and B is
                    arbitrary; B A is 0 before the first training, so it is divided by ||A|| ||B||
                    of before where that is more, and by 1 where that is nothing too.

The mean over active batches is taken by :func:`samara.federated.sharing.update_importance`. A layer
that was active in n of N batches had n chances to change: its change counts N times, over n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

Score = Literal["grad_norm", "fisher", "weight_change", "taylor"]


class ImportanceMeter:
    """Sums of a score per layer.

    Attributes:
        sums: Per layer, over its active batches.
        active_batches: Their number.
    """

    def __init__(self, score: Score, layers: Sequence[Mapping[str, nn.Parameter]]) -> None:
        """Start at zero.

        Args:
            score: Which.
            layers: Per layer its trained parameters by name.
        """
        self._score, self._layers = score, layers
        self.sums = [0.0] * len(layers)
        self.active_batches = [0] * len(layers)
        self._batches = 0
        self._before: list[dict[str, Tensor]] = []

    def start(self) -> None:
        """Note the weights that training begins with."""
        if self._score == "weight_change":
            self._before = [_copies(layer) for layer in self._layers]

    def add(self, runs: Sequence[bool]) -> None:
        """Take a batch into account, its gradients in place.

        Args:
            runs: Of each layer whether it was active.
        """
        self._batches += 1
        for number, (layer, is_active) in enumerate(zip(self._layers, runs, strict=True)):
            if not is_active:
                continue
            self.active_batches[number] += 1
            if self._score != "weight_change":
                self.sums[number] += self._of_gradients(layer)

    def finish(self) -> None:
        """Take the change of the weights into account."""
        for number, before in enumerate(self._before):
            self.sums[number] = self._batches * relative_change(before, self._layers[number])

    def _of_gradients(self, layer: Mapping[str, nn.Parameter]) -> float:
        pairs = [(p.detach(), p.grad) for p in layer.values() if p.grad is not None]
        if self._score == "taylor":
            return abs(sum(float((value * grad).double().sum()) for value, grad in pairs))
        squares = sum(float(grad.double().square().sum()) for _, grad in pairs)
        return squares if self._score == "fisher" else squares**0.5


def _copies(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().cpu().clone() for name, value in layer.items()}


def relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """||θ_after - θ_before|| over ||θ_before||, with LoRA's factors taken as their products."""
    new = _copies(after)
    changed, size = 0.0, 0.0
    for name, old in before.items():
        if ".lora_B." in name:
            continue
        partner = name.replace(".lora_A.", ".lora_B.")
        if partner == name or partner not in before:
            changed += float((new[name] - old).square().sum())
            size += float(old.square().sum())
            continue
        one, other = (before[partner], old), (new[partner], new[name])
        # Of the products only r x r matrices are ever made.
        square = _inner(one, one) - 2 * _inner(one, other) + _inner(other, other)
        changed += max(0.0, square)
        size += max(_inner(one, one), float(old.square().sum() * before[partner].square().sum()))
    return float((changed / size) ** 0.5) if size > 0 else float(changed**0.5)


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """<B1 A1, B2 A2> = trace((B2ᵀ B1)(A1 A2ᵀ))."""
    (b1, a1), (b2, a2) = one, other
    return float(((b2.T @ b1) * (a2 @ a1.T)).sum())
