"""What the server makes of the tensors it got: check each reply, then a mean per tensor.

A client sends only the layers that it shares and that were active, so every tensor has senders of
its own, and its mean is over them alone:

    θ_l <- sum_{i in S_l} w_i θ_l^i / sum_{i in S_l} w_i          S_l empty: θ_l unchanged

Dividing by the weights of all clients would shrink a layer that half of them sent to a half.
Sums are in float64 and in the order of the clients' numbers: the result does not depend on who
replied first, bit for bit.

Of LoRA's factors A and B each has a mean of its own, as in federated LoRA in general; the mean of
the products is another matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Tensor = npt.NDArray[np.float32]
HEAD = "head"
"""The group of all tensors that belong to no layer."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors that are trained, and which group each belongs to.

    Attributes:
        shapes: By name.
        groups: Name -> layer as ``"0"``, ``"1"``, …, or :data:`HEAD`.
        num_layers: Layers of the model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, str]
    num_layers: int

    def names(self, group: str | int) -> list[str]:
        """The tensors of a group, in their order."""
        return [name for name, own in self.groups.items() if own == str(group)]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one client sent.

    Attributes:
        client: Its stable number.
        weight: Of it in the mean: its examples.
        tensors: Trained values, whole layers, float32.
    """

    client: int
    weight: float
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """The result of a round.

    Attributes:
        tensors: All trained tensors of the model.
        senders: Group -> clients that it was averaged over; empty where the old value was kept.
        refused: Client -> why its tensors were not used.
        typical_change: Median change per element of a reply, to judge the next round by.
    """

    tensors: dict[str, Tensor]
    senders: dict[str, tuple[int, ...]]
    refused: dict[int, str] = field(default_factory=dict)
    typical_change: float | None = None


Average = Callable[[Mapping[str, Tensor], Sequence[Contribution], Layout], dict[str, Tensor]]
"""From the old values and the sound replies, by client, to the new values."""


def aggregate(
    previous: Mapping[str, Tensor],
    contributions: Sequence[Contribution],
    layout: Layout,
    *,
    max_change: float | None,
    typical_change: float | None = None,
    average: Average | None = None,
    others: Sequence[float] = (),
) -> Aggregate:
    """Check the replies of a round and average what is sound.

    Args:
        previous: The server's tensors, all of them.
        contributions: One a client, in any order.
        layout: What there is to send.
        max_change: A reply that moved more than so many times the median reply is refused; None:
            none is for that.
        typical_change: Of an earlier round; judges a reply that is alone in its round.
        average: Makes the values of the sound replies. Left out: :func:`average_tensors`.
        others: Changes of replies of this round that are averaged elsewhere; the median is theirs
            too.
    """
    ordered = sorted(contributions, key=lambda item: item.client)
    assert len({item.client for item in ordered}) == len(ordered), "one reply a client"
    refused: dict[int, str] = {}
    sound: list[Contribution] = []
    for item in ordered:
        problem = malformed(item, layout)
        if problem is None:
            sound.append(item)
        else:
            refused[item.client] = problem
    changes = {item.client: _change(item, previous) for item in sound}
    usual = _lower_median([value for value in (*changes.values(), *others) if value > 0])
    if len(sound) == 1 and not others and typical_change is not None:
        usual = typical_change
    accepted = []
    for item in sound:
        change = changes[item.client]
        if usual is not None and max_change is not None and change > max_change * usual:
            refused[item.client] = (
                f"moved {change:.3g} per element, more than {max_change:g} times the median "
                f"{usual:.3g}"
            )
        else:
            accepted.append(item)
    tensors = (average or average_tensors)(previous, accepted, layout)
    senders = {
        group: tuple(item.client for item in accepted if name in item.tensors)
        for name, group in layout.groups.items()
    }
    left = _lower_median([changes[item.client] for item in accepted if changes[item.client] > 0])
    return Aggregate(
        tensors=tensors,
        senders=senders,
        refused=dict(sorted(refused.items())),
        typical_change=typical_change if left is None else left,
    )


def changes_of(
    previous: Mapping[str, Tensor], contributions: Sequence[Contribution], layout: Layout
) -> list[float]:
    """How much each reply moved that is well formed, per element."""
    return [_change(own, previous) for own in contributions if malformed(own, layout) is None]


def average_tensors(
    previous: Mapping[str, Tensor], accepted: Sequence[Contribution], layout: Layout
) -> dict[str, Tensor]:
    """The mean of each tensor over those who sent it; the old value where nobody did."""
    tensors: dict[str, Tensor] = {}
    for name in layout.shapes:
        own = [item for item in accepted if name in item.tensors]
        tensors[name] = previous[name]
        if own:
            tensors[name] = _mean([i.tensors[name] for i in own], [i.weight for i in own])
    return tensors


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean, summed in float64 in the given order; of one value, that value."""
    if len(values) == 1:
        return values[0]
    total = np.zeros(values[0].shape, dtype=np.float64)
    for value, weight in zip(values, weights, strict=True):
        total += np.float64(weight) * value.astype(np.float64)
    mean: Tensor = (total / np.float64(sum(weights))).astype(np.float32)
    return mean


def malformed(item: Contribution, layout: Layout) -> str | None:
    """What is wrong with a reply by itself; None if nothing is."""
    if not np.isfinite(item.weight) or item.weight <= 0:
        return f"weight {item.weight} is not a positive number"
    for name, tensor in item.tensors.items():
        if name not in layout.shapes:
            return f"sent unknown tensor {name}"
        if tuple(tensor.shape) != layout.shapes[name]:
            expected = list(layout.shapes[name])
            return f"{name} has shape {list(tensor.shape)}, expected {expected}"
        if tensor.dtype != np.float32:
            return f"{name} is {tensor.dtype}, expected float32"
        if not np.isfinite(tensor).all():
            return f"{name} holds values that are not finite"
    for group in dict.fromkeys(layout.groups[name] for name in item.tensors):
        missing = [name for name in layout.names(group) if name not in item.tensors]
        if missing:
            return f"sent a part of group {group} only: {missing[0]} is missing"
    return None


def _change(item: Contribution, previous: Mapping[str, Tensor]) -> float:
    """Root of the mean squared change over all elements that were sent; 0 if none were."""
    squares, count = 0.0, 0
    for name in sorted(item.tensors):
        difference = item.tensors[name].astype(np.float64) - previous[name]
        squares += float((difference**2).sum())
        count += difference.size
    return float(np.sqrt(squares / count)) if count else 0.0


def _lower_median(values: Sequence[float]) -> float | None:
    """The middle value, of two the smaller: one huge reply of two must not judge itself."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2] if ordered else None
