"""Which layers of a client are shared and which stay its own (PTLS of DropPEFT).

DropPEFT (arXiv 2503.10217) states that each device shares some layers and keeps others, against
data that differs between devices. Importance, the choice, its direction and its guards are ours.

The importance of a layer is accumulated over the batches in which it was active and divided by
their number: otherwise a layer that is dropped often would look unimportant. A client's scores sum
to 1, so only their proportions matter, and run on over its participations. A layer is kept or
shared by its place in an order, and changes side only after it was clearly on the other side of the
cut several times in a row.

Everything here is a pure function of plain values; numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from samara.federated.config import SharingConfig

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SharingState:
    """What a client remembers between its participations.

    Attributes:
        importance: Running score per layer, summing to 1; empty before the first participation.
        personal: Layers that it keeps, ascending.
        streaks: Per layer, participations in a row in which it was clearly on the other side.
    """

    importance: tuple[float, ...] = ()
    personal: tuple[int, ...] = ()
    streaks: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SharingState:
        """Read what :meth:`to_dict` gave, also by way of JSON."""
        return cls(
            importance=tuple(map(float, data["importance"])),
            personal=tuple(map(int, data["personal"])),
            streaks=tuple(map(int, data["streaks"])),
        )


def update_importance(
    sums: Sequence[float],
    active_batches: Sequence[int],
    *,
    before: Sequence[float],
    memory: float,
) -> tuple[float, ...]:
    """A client's running importance after a local training.

    Args:
        sums: Per layer, the score summed over the batches in which it was active.
        active_batches: Their number.
        before: The running importance; empty at first.
        memory: Weight of this participation, if it is not the first.

    Returns:
        Scores that sum to 1. A layer that was never active keeps its share.
    """
    counts = np.array(active_batches, dtype=np.float64)
    num_layers = len(counts)
    old = np.array(before, dtype=np.float64) if before else np.full(num_layers, 1 / num_layers)
    seen = counts > 0
    rates = np.where(seen, np.array(sums, dtype=np.float64) / np.where(seen, counts, 1), 0.0)
    if not np.isfinite(rates).all() or rates.sum() <= 0:
        return tuple(old.tolist())
    new = np.where(seen, rates / rates.sum() * old[seen].sum(), old)
    if before:
        new = memory * new + (1 - memory) * old
    return tuple((new / new.sum()).tolist())


def update_personal(
    state: SharingState,
    importance: Sequence[float],
    *,
    population: Sequence[float],
    config: SharingConfig,
) -> SharingState:
    """Choose anew which layers a client keeps.

    Args:
        state: As after its last participation.
        importance: Its running importance, this participation included.
        population: Mean importance per layer over the clients; empty before any is known.
        config: How to choose.
    """
    num_layers = len(importance)
    kept = num_kept(config, num_layers)
    mine = np.array(importance, dtype=np.float64)
    others = np.array(population, dtype=np.float64) if population else np.ones_like(mine)
    if config.direction in ("all", "none", "depth") or kept in (0, num_layers):
        personal = tuple(range(num_layers - kept, num_layers))
        return SharingState(
            importance=tuple(importance), personal=personal, streaks=(0,) * num_layers
        )
    keen = mine / np.maximum(others, 1e-12)
    if config.direction == "share_important":
        keen = 1 / np.maximum(keen, 1e-12)
    order = sorted(range(num_layers), key=lambda layer: (-keen[layer], -layer))
    cut = float(keen[order[kept - 1]] + keen[order[kept]]) / 2
    wanted = set(order[:kept])
    personal_now, streaks = set(state.personal), list(state.streaks or (0,) * num_layers)
    for layer in range(num_layers):
        clear = abs(float(keen[layer]) - cut) > config.hysteresis * cut
        moves = (layer in wanted) != (layer in personal_now)
        streaks[layer] = streaks[layer] + 1 if moves and clear else 0
        if streaks[layer] >= config.patience:
            personal_now ^= {layer}
            streaks[layer] = 0
    keenest = sorted(personal_now, key=lambda layer: (-keen[layer], -layer))
    personal = tuple(sorted(keenest[: max_kept(config, num_layers)]))
    return SharingState(importance=tuple(importance), personal=personal, streaks=tuple(streaks))


def num_kept(config: SharingConfig, num_layers: int) -> int:
    """Layers that a client is to keep."""
    match config.direction:
        case "all":
            return 0
        case "none":
            return num_layers
        case _:
            shared = config.shared_layers or -(-num_layers // 2)
            return min(max_kept(config, num_layers), max(0, num_layers - shared))


def max_kept(config: SharingConfig, num_layers: int) -> int:
    """The most that it may keep: the policy's number, and never all of them."""
    limit = num_layers - 1
    if config.max_personal_layers is not None:
        limit = min(limit, config.max_personal_layers)
    return limit


def population_mean(importances: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Mean importance per layer, in the given order; empty of none."""
    if not importances:
        return ()
    return tuple(np.array(importances, dtype=np.float64).mean(axis=0).tolist())


@dataclass(kw_only=True)
class SharingAudit:
    """Who holds what: the server's list of the clients' layers, and when each was shared last.

    Attributes:
        num_layers: Layers of the model.
        last_shared: Per layer, the newest round in which somebody sent it; -1: never.
        clients: Client -> its newest round, the layers that it keeps, and their hash.
        importance: Client -> its running importance.
    """

    num_layers: int
    last_shared: list[int] = field(default_factory=list)
    clients: dict[int, dict[str, Any]] = field(default_factory=dict)
    importance: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.last_shared = self.last_shared or [-1] * self.num_layers

    def must_share(self, round: int, *, every: int) -> tuple[int, ...]:
        """Layers that the clients of this round are asked for, whatever they keep."""
        return tuple(layer for layer, last in enumerate(self.last_shared) if round - last > every)

    def record(
        self, round: int, *, client: int, state: SharingState, sent: Sequence[int], hash: str | None
    ) -> None:
        """Note what a client sent and kept in a round.

        Args:
            round: The present one.
            client: Its number.
            state: Of its layers.
            sent: Layers that it sent.
            hash: Of the values that it kept; None: it kept none.
        """
        for layer in sent:
            self.last_shared[layer] = max(self.last_shared[layer], round)
        self.clients[client] = {"round": round, "personal": list(state.personal), "hash": hash}
        self.importance[client] = state.importance

    def population(self) -> tuple[float, ...]:
        """Mean importance over all clients that ever took part."""
        return population_mean([self.importance[client] for client in sorted(self.importance)])

    def holders(self) -> list[list[int]]:
        """Per layer, the clients that keep one of their own."""
        return [
            [client for client in sorted(self.clients) if layer in self.clients[client]["personal"]]
            for layer in range(self.num_layers)
        ]

    def forget(self, client: int) -> None:
        """Strike a client whose layers were removed off the list."""
        self.clients.pop(client, None)
        self.importance.pop(client, None)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "num_layers": self.num_layers,
            "last_shared": list(self.last_shared),
            "clients": {str(client): self.clients[client] for client in sorted(self.clients)},
            "importance": {str(c): list(self.importance[c]) for c in sorted(self.importance)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SharingAudit:
        """Read what :meth:`to_dict` gave, also by way of JSON."""
        return cls(
            num_layers=data["num_layers"],
            last_shared=list(data["last_shared"]),
            clients={int(client): dict(entry) for client, entry in data["clients"].items()},
            importance={int(c): tuple(values) for c, values in data["importance"].items()},
        )
