"""What a federation needs to go on: one checkpoint a round, complete or absent.

    checkpoints/round-00000007/     after 7 rounds
        global.safetensors          the server's values
        best.safetensors            those of the best round
        beside.safetensors          what else the server keeps in tensors, if anything
        state.json                  everything else, and the round of each client's newest state
    clients/client-00000012/
        round-00000006/             what client 12 keeps since its part in round 6
            personal.safetensors, state.json

A client's folders are written first and counted only once a checkpoint names them: a process killed
between the two goes on from the checkpoint before, and finds the clients as they were then.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samara.errors import CheckpointError
from samara.federated.aggregation import Tensor
from samara.federated.messages import ClientState
from samara.federated.sharing import SharingState
from samara.runs import differences, read_json
from samara.train.checkpoint import STATE, sweep, verify, write_tensors

GLOBAL, BEST, PERSONAL = "global.safetensors", "best.safetensors", "personal.safetensors"
BESIDE = "beside.safetensors"
ROUND = re.compile(r"round-(\d{8})")
KEEP_LAST = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A verified checkpoint.

    Attributes:
        plain: The server's state without its tensors.
        tensors, best_tensors: Of the server.
        beside: What else it keeps in tensors.
    """

    plain: dict[str, Any]
    tensors: dict[str, Tensor]
    best_tensors: dict[str, Tensor]
    beside: dict[str, Tensor]


class Store:
    """Checkpoints and client states of one run.

    Args:
        folder: Of the run.
        identity: What the run is made from; a checkpoint with another one is refused.
        start: What :meth:`export_client` wrote for clients, a folder each: they begin with it.
    """

    def __init__(
        self, folder: Path, *, identity: Mapping[str, Any], start: Path | None = None
    ) -> None:
        self.checkpoints, self.clients = folder / "checkpoints", folder / "clients"
        self.identity = dict(identity)
        self.start = start
        self._newest: dict[int, int] = {}
        self._written: set[int] | None = None  # since the last sweep; None: not swept yet

    @classmethod
    def of_run(cls, folder: Path) -> Store:
        """The store of a run that exists, whatever it is made from.

        On a node there are no checkpoints: each client's newest state on disk counts.
        """
        paths = _rounds(folder / "checkpoints")
        if paths:
            return cls(folder, identity=read_json(paths[-1] / STATE)["identity"])
        store = cls(folder, identity={})
        for path in sorted((folder / "clients").glob("client-????????")):
            client = int(path.name[-8:])
            rounds = store.rounds_of(client)
            if rounds:
                store.note_client(client, round=rounds[-1])
        return store

    # --- the server -------------------------------------------------------------------------------

    def save(
        self,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        best_tensors: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
    ) -> None:
        """Write a checkpoint, then drop what no kept checkpoint needs.

        Raises:
            ResourceError: If the disk is full; the checkpoints before are untouched.
        """
        write_tensors(
            self.checkpoints / f"round-{plain['round']:08d}",
            {
                GLOBAL: to_torch(tensors),
                BEST: to_torch(best_tensors),
                **({BESIDE: to_torch(beside)} if beside else {}),
            },
            state={
                "server": plain,
                "clients": {str(client): self._newest[client] for client in sorted(self._newest)},
            },
            identity=self.identity,
        )
        for old in _rounds(self.checkpoints)[:-KEEP_LAST]:
            shutil.rmtree(old)
        self._drop_unneeded()

    def latest(self) -> Saved | None:
        """Find the newest whole checkpoint and the clients as they were then; None: there is none.

        Raises:
            CheckpointError: If all are damaged, or the newest belongs to a run of something else.
        """
        if not self.checkpoints.exists():
            return None
        sweep(self.checkpoints)
        problem: CheckpointError | None = None
        for path in reversed(_rounds(self.checkpoints)):
            try:
                data = verify(path)
            except CheckpointError as error:
                problem = problem or error
                log.warning("%s; the checkpoint before is taken", error)
                continue
            changed = differences(data["identity"], self.identity)
            if changed:
                raise CheckpointError(
                    f"{path}: belongs to a run of something else ({'; '.join(changed[:3])}); give "
                    "another run folder"
                )
            self._newest = {int(c): round for c, round in data["state"]["clients"].items()}
            return Saved(
                plain=data["state"]["server"],
                tensors=to_numpy(load_file(path / GLOBAL)),
                best_tensors=to_numpy(load_file(path / BEST)),
                beside=to_numpy(load_file(path / BESIDE)) if (path / BESIDE).exists() else {},
            )
        if problem is not None:
            raise CheckpointError(
                f"{problem}; no whole checkpoint is left in {self.checkpoints}: remove that folder "
                "to start from round 0"
            )
        return None

    # --- the clients ------------------------------------------------------------------------------

    def save_client(self, client: int, state: ClientState, *, round: int) -> None:
        """Write what a client keeps since its part in a round."""
        write_tensors(
            self._folder(client) / f"round-{round:08d}",
            {PERSONAL: to_torch(state.personal)},
            state=state.sharing.to_dict(),
            identity={"client": client, **self.identity},
        )
        self.note_client(client, round=round)

    def note_client(self, client: int, *, round: int) -> None:
        """Take note of a state that the client itself has written."""
        self._newest[client] = round
        if self._written is not None:
            self._written.add(client)

    def known_clients(self) -> list[int]:
        """The clients that keep a state, ascending."""
        return sorted(self._newest)

    def newest_round(self, client: int) -> int | None:
        """The round of a client's newest state; None: it never took part."""
        return self._newest.get(client)

    def load_client(self, client: int, *, round: int | None = None) -> ClientState:
        """What a client keeps; one that never took part keeps nothing, or what it begins with.

        Args:
            client: Its number.
            round: Of the state. Left out: the newest that the store knows of.

        Raises:
            CheckpointError: If its folder is damaged.
        """
        number = self._newest.get(client) if round is None else round
        if number is None:
            begins = None if self.start is None else self.start / client_name(client)
            if begins is None or not begins.exists():
                return ClientState()
            self._check_export(client, begins)
            return _read_state(begins)
        return _read_state(self._folder(client) / f"round-{number:08d}")

    def rounds_of(self, client: int) -> list[int]:
        """The rounds of which a client's states are on disk, ascending."""
        return [int(path.name.removeprefix("round-")) for path in _rounds(self._folder(client))]

    def drop_states(self, client: int, *, keep: Collection[int]) -> None:
        """Remove a client's states of other rounds than these."""
        for path in _rounds(self._folder(client)):
            if int(path.name.removeprefix("round-")) not in keep:
                shutil.rmtree(path)

    def export_client(self, client: int, target: Path) -> None:
        """Copy what a client keeps into a folder of its own, for another run or another machine.

        Raises:
            CheckpointError: If it keeps nothing, or its folder is damaged.
        """
        if client not in self._newest:
            raise CheckpointError(f"client {client}: never took part, there is nothing to export")
        source = self._folder(client) / f"round-{self._newest[client]:08d}"
        data = verify(source)
        tensors = load_file(source / PERSONAL)
        base = data["identity"]["init_from"]
        write_tensors(
            target,
            {PERSONAL: tensors},
            state=data["state"],
            identity={"client": client, "init_from": base},
        )

    def import_client(self, client: int, source: Path, *, round: int) -> ClientState:
        """Give a client what :meth:`export_client` wrote, and return it.

        Raises:
            CheckpointError: If the folder is damaged, another client's, or for another base model.
        """
        self._check_export(client, source)
        state = _read_state(source)
        self.save_client(client, state, round=round)
        return state

    def _check_export(self, client: int, source: Path) -> None:
        identity = verify(source)["identity"]
        if identity.get("client") != client:
            raise CheckpointError(
                f"{source}: holds the layers of client {identity.get('client')}, not of {client}"
            )
        if identity.get("init_from") != self.identity["init_from"]:
            raise CheckpointError(
                f"{source}: holds layers for another base model than this run's; export them "
                "again from a run with the same init_from"
            )

    def forget_client(self, client: int) -> None:
        """Name a client no more: the next checkpoint that is saved is without it."""
        self._newest.pop(client, None)

    def erase_client(self, client: int) -> None:
        """Remove what is kept for a client that was forgotten, and the checkpoints that name it."""
        assert client not in self._newest, "forgotten, and saved so, before"
        for path in _rounds(self.checkpoints)[:-1]:
            shutil.rmtree(path)
        shutil.rmtree(self._folder(client), ignore_errors=True)

    def holds(self, client: int) -> bool:
        """Whether anything of a client is on disk."""
        return self._folder(client).exists()

    def _folder(self, client: int) -> Path:
        return self.clients / client_name(client)

    def _drop_unneeded(self) -> None:
        """Remove client states that no kept checkpoint names.

        Only clients that wrote since the checkpoints that are kept can have any: those of a run
        that goes on are all looked at once.
        """
        kept = [read_json(path / STATE)["state"]["clients"] for path in _rounds(self.checkpoints)]
        written = set(self._newest) if self._written is None else self._written
        moving = {c for c in written if len({own.get(str(c)) for own in kept}) > 1}
        for client in written:
            needed = {own[str(client)] for own in kept if str(client) in own}
            for path in _rounds(self._folder(client)):
                if int(path.name.removeprefix("round-")) not in needed:
                    shutil.rmtree(path)
        self._written = moving


def client_name(client: int) -> str:
    """The name of a client's folder, here and in an export."""
    return f"client-{client:08d}"


def _read_state(path: Path) -> ClientState:
    data = verify(path)
    return ClientState(
        sharing=SharingState.from_dict(data["state"]),
        personal=to_numpy(load_file(path / PERSONAL)),
    )


def _rounds(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if ROUND.fullmatch(path.name))


def to_torch(tensors: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """The same values as torch's tensors."""
    return {name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}


def to_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """The same values as numpy's arrays, not shared with the tensors."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}
