"""What the page shows of federations, read from their run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from samara.report.run_files import (
    Record,
    read_metrics,
    read_record,
    run_folder,
    said,
    state_of,
)
from samara.runs import RunFolder


class ClientScore(Record):
    """Of some rows; accuracy is None of a task without labels."""

    loss: float
    accuracy: float | None


class FederatedClient(Record):
    """One client at the end: its test rows, scored by its own model."""

    client: NonNegativeInt
    personal: ClientScore
    personal_layers: tuple[NonNegativeInt, ...]


class FederatedClients(Record):
    """All clients; of each kind of score the mean and the worst decile.

    Of a run that promises privacy nothing but their number is known.
    """

    number: PositiveInt
    personal: dict[str, float] = Field(default_factory=dict)
    each: tuple[FederatedClient, ...] = ()


class FederatedTest(Record):
    """The global model of the best round on the test rows."""

    best: ClientScore


class FederatedModelled(Record):
    """Of the virtual clock."""

    seconds: float
    joules: float
    clock: dict[str, Any]


class FederatedMeasured(Record):
    """Counted and measured here."""

    cpu_seconds: float
    bytes_down: float
    bytes_up: float


class FederatedTask(Record):
    """What was learnt."""

    name: str
    kind: str


class FederatedResults(Record):
    """``results.json`` of a federation."""

    task: FederatedTask
    method: str
    rounds: NonNegativeInt
    test: FederatedTest
    clients: FederatedClients
    trained_parameters: PositiveInt
    modelled: FederatedModelled
    measured: FederatedMeasured | None = None
    """None where it would tell which clients took part."""
    privacy: dict[str, Any] = Field(default_factory=dict)
    """What is promised."""


class SharedLayers(Record):
    """``sharing.json``: who took part, of a model with so many layers."""

    num_layers: PositiveInt
    clients: dict[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RoundEnd:
    """Where a federation stood after a round.

    Attributes:
        score: Validation accuracy, or the loss of a task without labels.
        seconds, joules: Spent so far, modelled.
        bytes: Sent and received so far.
    """

    round: int
    score: float
    seconds: float
    joules: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A client that trained in a round: its kind of device, and what it was told to drop."""

    round: int
    device: str
    rate: float
    peak_bytes: float
    is_refused: bool


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One federated run."""

    name: str
    color: int
    results: FederatedResults | None
    note: str
    """What became of a run without results."""
    rounds: tuple[RoundEnd, ...]
    asked: tuple[Asked, ...]
    shared: SharedLayers | None
    """None: before the end."""

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """What its scores are."""
        assert self.results is not None
        return "loss" if self.results.test.best.accuracy is None else "accuracy"


def read_federations(folders: Mapping[str, str]) -> tuple[Federation, ...]:
    """Read the runs that the report names.

    Raises:
        CheckpointError: If a folder does not exist, or a file in it is damaged.
    """
    found = []
    for number, (name, folder) in enumerate(folders.items()):
        run = RunFolder(run_folder(folder, f"federated.{name}"))
        path, sharing = run.path / "results.json", run.path / "sharing.json"
        results = read_record(FederatedResults, path) if path.exists() else None
        log = read_metrics(run)
        found.append(
            Federation(
                name=name,
                color=number % 8,
                results=results,
                note="" if results else said(state_of(run, finished=False)),
                rounds=tuple(_rounds(log)),
                asked=tuple(_asked(log)),
                shared=read_record(SharedLayers, sharing) if sharing.exists() else None,
            )
        )
    return tuple(found)


def _rounds(log: Sequence[Mapping[str, Any]]) -> list[RoundEnd]:
    """Those whose score is finite."""
    found = []
    for record in log:
        accuracy = record.get("validation_accuracy")
        score = record.get("validation_loss") if accuracy is None else accuracy
        if score is not None:
            found.append(
                RoundEnd(
                    round=int(record["step"]),
                    score=float(score),
                    seconds=float(record["modelled_seconds"]),
                    joules=float(record["modelled_joules"]),
                    bytes=float(record["bytes_down"]) + float(record["bytes_up"]),
                )
            )
    return found


def _asked(log: Sequence[Mapping[str, Any]]) -> list[Asked]:
    """Of clients that replied."""
    return [
        Asked(
            round=int(record["step"]),
            device=str(client["device"]),
            rate=float(client["rate"]),
            peak_bytes=float(client["modelled_peak_bytes"]),
            is_refused=client["verdict"] != "ok",
        )
        for record in log
        for client in record.get("clients", ())
        if "modelled_peak_bytes" in client
    ]
