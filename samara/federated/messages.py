"""What server and client tell each other: plain values and named arrays, no torch.

The fields fit the records of a message of Flower (numbers, texts and flat lists of them beside
arrays), so that nothing but these messages passes between the two sides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from samara.federated.aggregation import Tensor
from samara.federated.configurator import Verdict
from samara.federated.sharing import SharingState
from samara.runs import hash_json
from samara.train.layer_rates import Shape


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """Server to client: train.

    Attributes:
        round: The present one.
        client: The client's stable number.
        rate, shape: Of layer dropout; rate 0: no layer is dropped.
        must_share: Layers that the client sends even if it keeps its own.
        population: Mean importance per layer over the clients; empty before any is known.
        group: Of a trial; empty: there is none.
        trained_layers: Upper layers that are trained; None: all.
        lora_rank: Rows of the adapters that are trained; None: all.
    """

    round: int
    client: int
    rate: float = 0.0
    shape: Shape = "uniform"
    must_share: tuple[int, ...] = ()
    population: tuple[float, ...] = ()
    group: str = ""
    trained_layers: int | None = None
    lora_rank: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Instruction:
        """Read what :meth:`to_dict` gave, also by way of JSON."""
        lists = {name: tuple(data[name]) for name in ("must_share", "population")}
        return cls(**{**data, **lists})


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Client to server: trained.

    Attributes:
        round, client: Of the instruction.
        verdict: ``ok``, or why there are no tensors.
        message: Of a failure.
        num_examples: The weight in the mean.
        tensors: The layers that are shared and were active, and the head unless it is personal.
        active_layers: Of each batch.
        loss_before, loss_after: On the client's validation rows.
        accuracy_before, accuracy_after: The same; None of a task without labels.
        sharing: The client's choice after this training.
        personal_hash: Of what it keeps; None: it keeps nothing.
        tokens, flops: Of its training.
        cpu_seconds: Of its training, measured on this machine.
        epsilon: Spent of the client's own privacy budget; None: it has none, or keeps it to itself.
    """

    round: int
    client: int
    verdict: Verdict = "ok"
    message: str = ""
    num_examples: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    active_layers: tuple[int, ...] = ()
    loss_before: float = 0.0
    loss_after: float = 0.0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    sharing: SharingState = field(default_factory=SharingState)
    personal_hash: str | None = None
    tokens: int = 0
    flops: float = 0.0
    cpu_seconds: float = 0.0
    epsilon: float | None = None

    @property
    def gain(self) -> float:
        """Fall of the client's validation loss."""
        return self.loss_before - self.loss_after

    @property
    def accuracy_change(self) -> float:
        """Of the client's validation rows; 0 of a task without labels."""
        if self.accuracy_before is None or self.accuracy_after is None:
            return 0.0
        return self.accuracy_after - self.accuracy_before

    def plain(self) -> dict[str, Any]:
        """Everything but the tensors and what differs from run to run."""
        fields = {k: v for k, v in vars(self).items() if k not in ("tensors", "cpu_seconds")}
        return {**fields, "sharing": self.sharing.to_dict()}

    @classmethod
    def from_plain(
        cls, plain: Mapping[str, Any], *, tensors: Mapping[str, Tensor], cpu_seconds: float
    ) -> Reply:
        """Put together again what :meth:`plain` left apart, also by way of JSON."""
        read = {
            "sharing": SharingState.from_dict(plain["sharing"]),
            "active_layers": tuple(plain["active_layers"]),
        }
        return cls(**{**plain, **read}, tensors=tensors, cpu_seconds=cpu_seconds)


def lost(asked: Instruction | Reply, error: Exception | str) -> Reply:
    """The reply in place of one that a client could not give."""
    return Reply(round=asked.round, client=asked.client, verdict="error", message=str(error))


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """What a client keeps between its participations.

    Attributes:
        sharing: Importance, personal layers, and how firmly.
        personal: The values of the personal layers, and of the head if it is personal.
    """

    sharing: SharingState = field(default_factory=SharingState)
    personal: Mapping[str, Tensor] = field(default_factory=dict)


def message_bytes(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Size of a message: its arrays, and the rest as JSON."""
    return len(json.dumps(plain).encode()) + sum(tensor.nbytes for tensor in tensors.values())


def is_sound(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all values are finite numbers."""
    return all(bool(np.isfinite(tensor).all()) for tensor in tensors.values())


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named values."""
    return hash_json({name: np.asarray(tensors[name]).tobytes().hex() for name in sorted(tensors)})
