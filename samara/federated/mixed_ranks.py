"""Adapters of several ranks in one round: each client trains the first rows of the global adapter.

After HetLoRA (Cho et al., arXiv 2401.06432): a client of rank r gets the first r rows of every A
and the first r columns of every B, trains them, and sends them back. The server's adapter has the
largest rank R. All clients scale B A by alpha / R, whatever their rank, so that their products mean
the same and are combined without another factor. In the model in memory the rest of A and B is
zero; then its gradients are zero too, and it stays so.

What becomes of a row that a client has not, is a choice (:func:`mean_over_ranks`):

    zero        it counts as zero, as in the paper; with few clients of a large rank that shrinks
                what they alone trained
    leave_out   the mean is over those who have it

Not taken from the paper: weights by the norm of the update, and clients that prune their own rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from samara.errors import ConfigError, did_you_mean
from samara.federated.aggregation import Contribution, Layout, Tensor, average_tensors
from samara.federated.config import FederatedDevice
from samara.federated.methods_config import MixedRanks

DOWN, UP = ".lora_A.", ".lora_B."


def ranks_of_devices(
    config: MixedRanks, devices: Sequence[FederatedDevice], *, rank: int
) -> dict[str, int]:
    """The rank of each kind of device.

    Left out, the quickest kind has the whole rank and each slower one half of the one before.

    Raises:
        ConfigError: If a kind is named that no client has, or a rank is larger than that of all.
    """
    slowness = {device.name: device.slowness for device in devices}
    by_speed = sorted(slowness, key=lambda name: (slowness[name], name))
    found = {name: max(1, rank >> place) for place, name in enumerate(by_speed)}
    for name, own in config.ranks.items():
        if name not in found:
            raise ConfigError(
                f"mixed_ranks.ranks: no client has a {name}{did_you_mean(name, found)}; there are "
                f"{', '.join(sorted(found))}"
            )
        if own > rank:
            raise ConfigError(
                f"mixed_ranks.ranks.{name}: {own} is more than lora.rank {rank}; lower it, or "
                "raise lora.rank"
            )
        found[name] = own
    return found


def truncate(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first rows of every A and the first columns of every B; the rest as it is."""
    return {name: _first(name, value, rank) for name, value in tensors.items()}


def widen(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Whole tensors from parts of some: zero where there is nothing."""
    found = {}
    for name, shape in shapes.items():
        found[name] = np.zeros(shape, dtype=np.float32)
        if name in tensors:
            part = tensors[name]
            found[name][tuple(slice(length) for length in part.shape)] = part
    return found


def restored(item: Contribution, *, rank: int, previous: Mapping[str, Tensor]) -> Contribution:
    """A client's part filled up with what the server has, where it is a part of the right shape.

    What it does not have thus did not move. Anything else stays, and is refused for its shape.
    """
    whole = {}
    for name, value in item.tensors.items():
        whole[name] = value
        known = previous.get(name)
        if known is not None and value.shape == _first(name, known, rank).shape != known.shape:
            whole[name] = known.astype(value.dtype)
            whole[name][tuple(slice(length) for length in value.shape)] = value
    return replace(item, tensors=whole)


def mean_over_ranks(
    previous: Mapping[str, Tensor],
    accepted: Sequence[Contribution],
    layout: Layout,
    *,
    ranks: Mapping[int, int],
    missing: str,
) -> dict[str, Tensor]:
    """The mean of sound parts; of equal ranks that of :func:`average_tensors`, bit for bit.

    Args:
        previous: The server's values.
        accepted: Parts filled up by :func:`restored`, in the order of their clients.
        layout: What there is.
        ranks: Of each client.
        missing: ``zero`` or ``leave_out``.
    """
    means = average_tensors(previous, accepted, layout)
    for name in layout.shapes:
        senders = [item for item in accepted if name in item.tensors]
        have = [ranks[item.client] for item in senders]
        axis = 0 if DOWN in name else 1
        if not senders or not (DOWN in name or UP in name):
            continue
        rank = layout.shapes[name][axis]
        if min(have) >= rank:
            continue
        total = np.zeros(layout.shapes[name], dtype=np.float64)
        weight = np.zeros(rank, dtype=np.float64)
        for item, own in zip(senders, have, strict=True):
            part = _first(name, item.tensors[name], own).astype(np.float64)
            total[tuple(slice(length) for length in part.shape)] += item.weight * part
            weight[: rank if missing == "zero" else own] += item.weight
        along = (1, rank) if axis == 1 else (rank, 1)
        mean = (total / np.where(weight > 0, weight, 1).reshape(along)).astype(np.float32)
        seen = (np.arange(rank) < max(have)).reshape(along)
        means[name] = np.where(seen, mean, previous[name])  # what nobody has keeps its value
    return means


def _first(name: str, value: Tensor, rank: int) -> Tensor:
    if DOWN in name:
        return value[:rank]
    return value[:, :rank] if UP in name else value
