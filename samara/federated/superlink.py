"""The driver of a deployment: clients on devices of their own, reached through Flower's SuperLink.

Server and clients are those of the other drivers, and so is the result, bit for bit, given the same
rows per client and the same number of threads. What differs is what a device may know: a node reads
its rows, its base model and what it keeps from places that *it* names (see
:mod:`samara.federated.node`); a message names no path.

A node is found by the name under which the server's operator registered its public key
(``client-3``), which it cannot choose itself. A node that was restarted gets its message again:
training depends on nothing but the message and what the client kept, so it does not matter how
often it is asked.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from samara.errors import ConfigError, ResourceError
from samara.federated.aggregation import Tensor
from samara.federated.driver import Driver
from samara.federated.flower import CONTENT, FlowerDriver, content_of, reason_of
from samara.federated.messages import Instruction
from samara.progress import say
from samara.runs import read_json, write_json
from samara.train.stop import StopSignal

FEDERATION = "federation.json"
NODE_NAME = re.compile(r"client-(\d+)")
OF_THE_NODE = "of-the-node"
"""In a recipe that is sent, in place of the server's paths."""
SECONDS_BETWEEN_LOOKS = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What Flower gives a server's app.

    Attributes:
        grid: Of Flower.
        wait_seconds: How long to wait for a node that is not there.
        reply_seconds: How long to wait for the reply of one that is.
    """

    grid: Any
    wait_seconds: float
    reply_seconds: float


_session: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def serving(session: Session) -> Iterator[None]:
    """Let ``federate`` with ``engine: superlink`` use a session."""
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def require_session() -> Session:
    """The session of the app that runs.

    Raises:
        ConfigError: If none does.
    """
    session = _session.get()
    if session is None:
        raise ConfigError(
            "engine: superlink runs in an app on Flower's SuperLink; write one with "
            "`samara federate RECIPE --deploy FOLDER`, or use in_process"
        )
    return session


@dataclass(frozen=True, kw_only=True)
class _Node:
    id: int
    activated: str


@dataclass(frozen=True, kw_only=True)
class _Sent:
    client: int
    activated: str
    at: float


class SuperLinkDriver(FlowerDriver):
    """Clients as nodes of a SuperLink."""

    def run_rounds(self, stop: StopSignal) -> None:
        """See :class:`~samara.federated.driver.Driver`.

        Raises:
            ResourceError: If no node is there.
        """
        if not self.is_done:
            self._wait_for_nodes()
        Driver.run_rounds(self, stop)

    def question(self, instruction: Instruction) -> Any:
        """The content of an instruction's message."""
        given = self.server.given(instruction)
        return self._content(instruction.client, given, instruction=instruction.to_dict())

    def carry(self, contents: Mapping[int, Any], kind: str) -> dict[int, Any]:
        """Send each client its message, again if its node was lost, and wait for the answers.

        Args:
            contents: Client -> its message's content.
            kind: Of the messages.

        Returns:
            Client -> its answer, which may be an error; clients that gave none are left out.
        """
        from flwr.common.constant import ErrorCode

        session = require_session()
        lost = (
            ErrorCode.NODE_UNAVAILABLE,
            ErrorCode.MESSAGE_UNAVAILABLE,
            ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        )
        found: dict[int, Any] = {}
        sent: dict[str, _Sent] = {}
        started = time.monotonic()
        waiting = dict.fromkeys(contents, started)
        while waiting or sent:
            nodes, now = self._nodes_online(), time.monotonic()
            for message, own in list(sent.items()):
                node = nodes.get(own.client)
                if node is not None and node.activated != own.activated:
                    del sent[message]  # it was restarted, and has forgotten what it was asked
                    waiting[own.client] = now
                elif now - own.at > session.reply_seconds:
                    del sent[message]
            for client, since in list(waiting.items()):
                node = nodes.get(client)
                away = node is None and now - since > session.wait_seconds
                if away or now - started > session.wait_seconds + session.reply_seconds:
                    log.warning("client %d: its node is not there, or never for long", client)
                    del waiting[client]
                elif node is not None and (own_id := self._send(node, contents[client], kind)):
                    sent[own_id] = _Sent(client=client, activated=node.activated, at=now)
                    del waiting[client]
            for answer in session.grid.pull_messages(list(sent)) if sent else ():
                own = sent.pop(answer.metadata.reply_to_message_id)
                if answer.has_error() and answer.error.code in lost:
                    waiting[own.client] = now
                else:
                    found[own.client] = answer
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return {client: found[client] for client in sorted(found)}

    def score_clients(self) -> list[dict[str, Any]]:
        """See :class:`~samara.federated.driver.Driver`; each client scores its own rows."""
        if self.server.config.privacy.is_on:
            return []  # scores on their rows would leave the clients
        clients = range(self.trainer.data.num_clients)
        values = self.server.state.tensors
        contents = {client: self._content(client, values) for client in clients}
        scores: list[dict[str, Any]] = []
        for client, answer in self.carry(contents, "evaluate").items():
            plain: dict[str, Any] = {"error": reason_of(answer)} if answer.has_error() else {}
            plain = plain or json.loads(answer.content[CONTENT]["json"])
            if "error" in plain:
                say(f"client {client}: could not be scored: {plain['error']}")
            else:
                scores.append(plain["scores"])
        if not scores:
            raise ResourceError(
                "no client could be scored; the rounds are saved, start the nodes and run it again"
            )
        return scores

    def _content(self, client: int, tensors: Mapping[str, Tensor], **more: Any) -> Any:
        return content_of(
            tensors,
            {
                "client": client,
                "state_round": self.store.newest_round(client),
                "method": self.store.identity["method"],
                "init_from": self.store.identity["init_from"],
                "recipe": _without_paths(self.server.config.model_dump(mode="json")),
                "flops": asdict(self.trainer.flops),
                "federation": self._federation(),
                **more,
            },
        )

    def _federation(self) -> str:
        """A name of this run that no other has: clients keep what they keep under it."""
        path = self.run_folder.path / FEDERATION
        if not path.exists():
            write_json(path, {"federation": secrets.token_hex(8)})
        return str(read_json(path)["federation"])

    # --- nodes ------------------------------------------------------------------------------------

    def _nodes_online(self) -> dict[int, _Node]:
        """Client -> its node; of several registered under one name the newest."""
        found = {}
        grid = require_session().grid
        for node in sorted(grid.get_nodes(), key=lambda node: str(node.registered_at)):
            named = NODE_NAME.fullmatch(node.name)
            if named:
                found[int(named[1])] = _Node(id=node.node_id, activated=node.last_activated_at)
        return found

    def _wait_for_nodes(self) -> None:
        wanted, seconds = set(range(self.trainer.data.num_clients)), require_session().wait_seconds
        deadline = time.monotonic() + seconds
        while missing := wanted - self._nodes_online().keys():
            if time.monotonic() > deadline:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if missing == wanted:
            raise ResourceError(
                f"engine: superlink found none of {len(wanted)} nodes in {seconds:.0f} s; register "
                "each key with --name client-NUMBER and start its flower-supernode"
            )
        if missing:
            say(f"{len(missing)} of {len(wanted)} nodes are not there: {_some(sorted(missing))}")

    def _send(self, node: _Node, content: Any, kind: str) -> str | None:
        from flwr.app import Message

        message = Message(content=content, message_type=kind, dst_node_id=node.id)
        ids = list(require_session().grid.push_messages([message]))
        return str(ids[0]) if ids and ids[0] else None


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe as clients may see it."""
    return {
        **recipe,
        "init_from": OF_THE_NODE,
        "task": {**recipe["task"], "data": OF_THE_NODE},
        "data": {**recipe["data"], "train": OF_THE_NODE, "validation": OF_THE_NODE},
        "clients": {**recipe["clients"], "devices": [{"profile": OF_THE_NODE}]},
    }


def _some(clients: list[int]) -> str:
    more = f" and {len(clients) - 5} more" if len(clients) > 5 else ""
    return ", ".join(f"client-{client}" for client in clients[:5]) + more
