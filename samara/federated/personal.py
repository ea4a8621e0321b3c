"""What clients keep: listed, taken out of a run, put into another, or removed.

A client's own layers are about its data: whoever holds them has to be able to hand them over and to
delete them. They are safetensors and JSON, and checked by hashes. A folder here is a run folder, or
the folder that a node keeps of one federation (``state/…``), which has no checkpoints: there the
newest state on disk counts. The run must not be running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samara.errors import CheckpointError
from samara.federated.messages import hash_of
from samara.federated.sharing import SharingAudit
from samara.federated.store import Saved, Store, client_name


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one client keeps.

    Attributes:
        client: Its number.
        round: Of its newest participation, counted from 0.
        layers: That are its own.
        tensors: Names of the values, with those of the head if it is its own, too.
        bytes: Of them.
        hash: Of them; None: it keeps none.
        as_reported: Whether that is the hash that the client told the server; None on a node.
    """

    client: int
    round: int
    layers: tuple[int, ...]
    tensors: tuple[str, ...]
    bytes: int
    hash: str | None
    as_reported: bool | None


def list_personal(folder: Path) -> list[Holding]:
    """Who holds which layers, by what is on disk.

    Raises:
        CheckpointError: If the folder holds no federation, or a client's state is damaged.
    """
    store, saved = _open(folder)
    audit = {} if saved is None else saved.plain["audit"]["clients"]
    found = []
    for client in store.known_clients():
        state, round = store.load_client(client), store.newest_round(client)
        assert round is not None, "it is known by its round"
        kept = hash_of(state.personal) if state.personal else None
        reported = audit.get(str(client))
        found.append(
            Holding(
                client=client,
                round=round,
                layers=state.sharing.personal,
                tensors=tuple(sorted(state.personal)),
                bytes=sum(value.nbytes for value in state.personal.values()),
                hash=kept,
                as_reported=None if reported is None else reported["hash"] == kept,
            )
        )
    return found


def export_personal(folder: Path, client: int, target: Path) -> None:
    """Write what a client keeps into a folder of its own.

    Raises:
        CheckpointError: If the folder holds no federation, or the client keeps nothing.
    """
    store, _ = _open(folder)
    store.export_client(client, target)


def export_clients(folder: Path, target: Path, *, clients: Sequence[int] = ()) -> list[int]:
    """Write what clients keep, a folder each, as ``clients.personal_from`` reads it.

    Args:
        folder: Of the run, or of a node.
        target: Where to.
        clients: Which; none given: all that took part.

    Returns:
        The clients.

    Raises:
        CheckpointError: If the folder holds no federation, or a client keeps nothing.
    """
    store, _ = _open(folder)
    chosen = list(clients) or store.known_clients()
    for client in chosen:
        store.export_client(client, target / client_name(client))
    return chosen


def import_personal(run: Path, client: int, source: Path) -> None:
    """Give a client of a run what :func:`export_personal` wrote.

    Raises:
        CheckpointError: If the run has no checkpoint, or the folder is damaged or another client's.
    """
    store, saved = _open(run)
    if saved is None:
        raise CheckpointError(
            f"{run}: is no run folder; a node begins with other layers by personal=FOLDER in its "
            "--node-config, a new run by clients.personal_from"
        )
    round = saved.plain["round"]
    state = store.import_client(client, source, round=round)
    audit = SharingAudit.from_dict(saved.plain["audit"])
    kept = hash_of(state.personal) if state.personal else None
    audit.record(round, client=client, state=state.sharing, sent=(), hash=kept)
    _save(store, saved, audit)


def reset_personal(folder: Path, client: int) -> None:
    """Remove everything that is kept of a client, from its files too; it starts as a new one.

    Raises:
        CheckpointError: If the folder holds no federation, or the client never took part.
    """
    store, saved = _open(folder)
    if not store.holds(client):
        raise CheckpointError(
            f"{folder}: client {client} never took part, there is nothing to remove"
        )
    store.forget_client(client)
    if saved is not None:
        audit = SharingAudit.from_dict(saved.plain["audit"])
        audit.forget(client)
        _save(store, saved, audit)  # before anything goes: what is named is always there
    store.erase_client(client)


def exported_clients(source: Path) -> list[int]:
    """The clients of an export.

    Raises:
        CheckpointError: If the folder is none.
    """
    found = sorted(source.glob("client-????????"))
    if not found:
        raise CheckpointError(f"{source}: holds nothing that `samara personal export` wrote")
    return [int(path.name.removeprefix("client-")) for path in found]


def _save(store: Store, saved: Saved, audit: SharingAudit) -> None:
    plain = {**saved.plain, "audit": audit.to_dict()}
    store.save(plain, saved.tensors, saved.best_tensors, saved.beside)


def _open(folder: Path) -> tuple[Store, Saved | None]:
    store = Store.of_run(folder)
    saved = store.latest()
    if saved is None and not store.known_clients():
        raise CheckpointError(f"{folder}: has no checkpoint of a federation")
    return store, saved
