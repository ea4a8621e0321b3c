"""A client on a device of its own: the app that Flower's SuperNode runs there.

What belongs to the device is named by whoever runs it, in ``--node-config``, and by nobody else:

    partition-id   which client this is
    data           its rows, the only ones it ever reads
    model          its copy of the base model; its hash must be the server's
    state          folder of what it keeps between its participations, by run
    personal       (optional) folder of `samara personal export`: what it begins a run with
    device         (optional) auto, cpu or cuda

What goes wrong is said in the node's own log; the server learns no more than the kind of error.

The settings of the training come with the server's message. What is kept stays on this disk and not
in Flower's own state, which ends with the SuperNode's process.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.config import validate
from samara.errors import CheckpointError, ConfigError, SamaraError
from samara.federated.client import PassFlops, Trainer
from samara.federated.config import FederateConfig
from samara.federated.flower import (
    ARRAYS,
    CONTENT,
    SECURE,
    answer_of,
    content_of,
    from_record,
    secure_message,
)
from samara.federated.job import make_trainer
from samara.federated.messages import ClientState, Instruction, lost
from samara.federated.randomness import Secrets, require_packages
from samara.federated.results import score_client
from samara.federated.run_rows import read_own_rows
from samara.federated.secure_client import protect
from samara.federated.store import Store
from samara.runs import RunFolder, hash_weights

KEYS = ("partition-id", "data", "model", "state")
OPTIONAL = ("personal", "device")
FEDERATION_NAME = re.compile(r"[0-9a-f]{16}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What the device says of itself."""

    client: int
    data: str
    model: str
    state: str
    personal: str | None = None
    device: str | None = None

    @classmethod
    def read(cls, node_config: Mapping[str, Any]) -> NodeSettings:
        """Read Flower's node config.

        Raises:
            ConfigError: If something is missing or malformed.
        """
        for key in KEYS:
            if key not in node_config:
                raise ConfigError(
                    f"--node-config: {key} is missing; give "
                    '\'partition-id=NUMBER data="FILE" model="FOLDER" state="FOLDER"\''
                )
        client = node_config["partition-id"]
        if not isinstance(client, int) or isinstance(client, bool) or client < 0:
            raise ConfigError(f"--node-config: partition-id={client!r} is not a client's number")
        texts = {key: str(node_config[key]) for key in (*KEYS[1:], *OPTIONAL) if key in node_config}
        return cls(client=client, **texts)


class Node:
    """This device's client in one run: its model, its rows and what it keeps."""

    def __init__(self, settings: NodeSettings, message: Mapping[str, Any]) -> None:
        """Load.

        Args:
            settings: Of the device.
            message: The server's, as plain data.

        Raises:
            SamaraError: If rows, model and the server's settings do not fit each other.
        """
        self.client = settings.client
        recipe = dict(message["recipe"])
        recipe["init_from"] = settings.model
        recipe["data"] = {**recipe["data"], "train": settings.data}
        if settings.device is not None:
            recipe["local"] = {**recipe["local"], "device": settings.device}
        config = validate(FederateConfig, recipe)
        if not FEDERATION_NAME.fullmatch(str(message["federation"])):
            raise ConfigError(f"{message['federation']!r} is no name of a federation")
        require_packages(config.privacy)
        state = Path(settings.state).expanduser() / message["federation"]
        self.trainer: Trainer
        self.trainer, loaded = make_trainer(
            config,
            read_own_rows(config),
            run=RunFolder(state),
            secrets=Secrets(state, config.privacy, seed=config.seed),
            only_client=settings.client,
        )
        self.trainer.flops = PassFlops(**message["flops"])
        base = hash_weights(loaded.folder)
        if base != message["init_from"]:
            raise ConfigError(
                f"--node-config: model={settings.model} is not the server's base model; its hash "
                f"is {base[:12]}, the server's {str(message['init_from'])[:12]}"
            )
        personal = settings.personal
        self.store = Store(
            state,
            identity={"method": message["method"], "init_from": base},
            start=None if personal is None else Path(personal).expanduser(),
        )

    def kept(self, round: int | None) -> ClientState:
        """What the client keeps since a round; nothing where its owner has removed all of it.

        Raises:
            CheckpointError: If it is damaged.
        """
        if round is not None and not self.store.rounds_of(self.client):
            log.warning("client %d: what it kept was removed, it begins anew", self.client)
            return ClientState()
        return self.store.load_client(self.client, round=round)

    def keep(self, state: ClientState, *, round: int, before: int | None) -> None:
        """Keep a new state, and the one before as long as the server may go back to it."""
        self.store.save_client(self.client, state, round=round)
        self.store.drop_states(self.client, keep={round} if before is None else {round, before})


def make_client_app() -> Any:
    """The app of a client on a device of its own."""
    from flwr.clientapp import ClientApp

    app = ClientApp()
    app.train()(train_message)
    app.evaluate()(evaluate_message)
    app.query(SECURE)(secure_message)
    return app


def train_message(message: Any, context: Any) -> Any:
    """Carry out an instruction; what goes wrong is a reply, too."""
    from flwr.app import ConfigRecord, Message

    content = json.loads(message.content[CONTENT]["json"])
    instruction = Instruction.from_dict(content["instruction"])
    memory = json.loads(context.state[SECURE]["json"]) if SECURE in context.state else None
    try:
        node = _node_for(context, content)
        before = content["state_round"]
        tensors = from_record(message.content[ARRAYS])
        reply, state = node.trainer.train(instruction, tensors, node.kept(before))
        reply = protect(node.trainer, reply, tensors, memory)
        if reply.verdict == "ok":
            node.keep(state, round=instruction.round, before=before)
    except Exception as error:
        reply = lost(instruction, what_the_server_is_told(error))
    if memory is not None:  # it notes that the masks are used
        context.state[SECURE] = ConfigRecord({"json": json.dumps(memory)})
    return Message(content=answer_of(reply), reply_to=message)


def evaluate_message(message: Any, context: Any) -> Any:
    """Score this client's test rows by the global values and by its own."""
    from flwr.app import Message

    content = json.loads(message.content[CONTENT]["json"])
    answer: dict[str, Any]
    try:
        node = _node_for(context, content)
        if node.trainer.config.privacy.is_on:
            raise ConfigError("privacy: this node tells nobody how it scores")
        tensors = from_record(message.content[ARRAYS])
        kept = node.kept(content["state_round"])
        answer = {"scores": score_client(node.trainer, node.client, kept, tensors)}
    except Exception as error:
        answer = {"error": what_the_server_is_told(error)}
    return Message(content=content_of({}, answer), reply_to=message)


def what_the_server_is_told(error: Exception) -> str:
    """The kind of an error; the rest, which may quote rows and paths, stays in this node's log."""
    if isinstance(error, SamaraError):
        log.error("%s", error)
    else:
        log.error("internal error", exc_info=error)
    return f"{type(error).__name__} on the node; its log says more"


def _node_for(context: Any, content: Mapping[str, Any]) -> Node:
    settings = NodeSettings.read(context.node_config)
    if content["client"] != settings.client:
        raise CheckpointError(
            f"this node is client {settings.client}, and is registered as client "
            f"{content['client']}; mend partition-id, or register its key as "
            f"client-{settings.client}"
        )
    same_run = ("recipe", "flops", "federation", "method", "init_from")
    return _node(settings, json.dumps({key: content[key] for key in same_run}))


@functools.lru_cache(maxsize=1)
def _node(settings: NodeSettings, message: str) -> Node:
    """The model and rows of this process, loaded once."""
    return Node(settings, json.loads(message))
