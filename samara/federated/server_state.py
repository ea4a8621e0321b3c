"""What the server knows between rounds, and how it goes to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from samara.federated.aggregation import Tensor
from samara.federated.server_optimizers import Moments
from samara.federated.sharing import SharingAudit

PLAIN = (
    "round",
    "best_loss",
    "best_round",
    "last_loss",
    "typical_change",
    "measured_cpu_seconds",
    "strategy_cpu_seconds",
)
"""Fields of the state that are numbers."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of the server's validation rows; accuracy is None of a task without labels."""

    loss: float
    accuracy: float | None = None


@dataclass(kw_only=True)
class ServerState:
    """What the server knows between rounds.

    Attributes:
        round: The next one, counted from 0; so many are done.
        tensors: The global values of everything that is trained.
        best_tensors: Those of the best validation loss so far.
        best_loss, best_round: After how many rounds that was; None: not measured yet.
        last_loss: Of the values as they are.
        typical_change: See :func:`samara.federated.aggregation.aggregate`.
        moments, best_moments: Of the server's optimizer, beside either values.
        audit: Who holds which layers.
        totals: Sums over all rounds, of what was modelled and what was counted.
        measured_cpu_seconds: Of the clients.
        strategy_cpu_seconds: Of the server (:mod:`samara.federated.overhead`).
    """

    tensors: dict[str, Tensor]
    best_tensors: dict[str, Tensor]
    audit: SharingAudit
    round: int = 0
    best_loss: float | None = None
    best_round: int | None = None
    last_loss: float | None = None
    typical_change: float | None = None
    moments: Moments = field(default_factory=Moments)
    best_moments: Moments = field(default_factory=Moments)
    totals: dict[str, float] = field(
        default_factory=lambda: {
            "modelled_seconds": 0.0,
            "modelled_client_seconds": 0.0,
            "modelled_joules": 0.0,
            "bytes_down": 0.0,
            "bytes_up": 0.0,
            "tokens": 0.0,
            "flops": 0.0,
        }
    )
    measured_cpu_seconds: float = 0.0
    strategy_cpu_seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "steps": dict(self.moments.steps),
            "best_steps": dict(self.best_moments.steps),
            "audit": self.audit.to_dict(),
            "totals": self.totals,
        }

    def beside(self) -> dict[str, Tensor]:
        """The tensors other than the values."""
        return {**self.moments.tensors("last"), **self.best_moments.tensors("best")}

    @classmethod
    def of(
        cls,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        best_tensors: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
    ) -> ServerState:
        """Put together what :meth:`plain` and :meth:`beside` gave, and the values."""
        return cls(
            tensors=dict(tensors),
            best_tensors=dict(best_tensors),
            moments=Moments.of("last", beside, plain["steps"]),
            best_moments=Moments.of("best", beside, plain["best_steps"]),
            audit=SharingAudit.from_dict(plain["audit"]),
            totals=dict(plain["totals"]),
            **{name: plain[name] for name in PLAIN},
        )
