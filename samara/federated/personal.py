"""What clients keep, taken out of a run, put into another, or removed.

A client's own layers are about its data: whoever runs the server has to be able to hand them over
and to delete them. The run must not be running.
"""

from __future__ import annotations

from pathlib import Path

from samara.errors import CheckpointError
from samara.federated.messages import hash_of
from samara.federated.sharing import SharingAudit
from samara.federated.store import Saved, Store


def export_personal(run: Path, client: int, target: Path) -> None:
    """Write what a client of a run keeps into a folder of its own.

    Raises:
        CheckpointError: If the run has no checkpoint, or the client keeps nothing.
    """
    store, _ = _open(run)
    store.export_client(client, target)


def import_personal(run: Path, client: int, source: Path) -> None:
    """Give a client of a run what :func:`export_personal` wrote.

    Raises:
        CheckpointError: If the run has no checkpoint, or the folder is damaged or another client's.
    """
    store, saved = _open(run)
    round = saved.plain["round"]
    state = store.import_client(client, source, round=round)
    audit = SharingAudit.from_dict(saved.plain["audit"])
    kept = hash_of(state.personal) if state.personal else None
    audit.record(round, client=client, state=state.sharing, sent=(), hash=kept)
    _save(store, saved, audit)


def reset_personal(run: Path, client: int) -> None:
    """Remove everything a run keeps for a client, from its files too; it starts as a new one.

    Raises:
        CheckpointError: If the run has no checkpoint, or the client never took part.
    """
    store, saved = _open(run)
    if not store.holds(client):
        raise CheckpointError(f"{run}: client {client} never took part, there is nothing to remove")
    audit = SharingAudit.from_dict(saved.plain["audit"])
    audit.forget(client)
    store.forget_client(client)
    _save(store, saved, audit)  # before anything goes: what is named is always there
    store.erase_client(client)


def _save(store: Store, saved: Saved, audit: SharingAudit) -> None:
    plain = {**saved.plain, "audit": audit.to_dict()}
    store.save(plain, saved.tensors, saved.best_tensors, saved.beside)


def _open(run: Path) -> tuple[Store, Saved]:
    store = Store.of_run(run)
    saved = store.latest()
    if saved is None:
        raise CheckpointError(f"{run}: has no checkpoint of a federation")
    return store, saved
