"""The Flower driver: the same server and clients, messages carried by Flower's simulation.

The server runs as a ``ServerApp``, every client is a virtual SuperNode, and its ``ClientApp`` runs
in one of a few Ray actors, each with a model of its own. One message goes to each client and one
comes back (Message API of flwr 1.41): an ``ArrayRecord`` of named float32 arrays, and a
``ConfigRecord`` with the rest as one JSON text, which holds every float exactly. Flower's own
aggregation is not used: it wants the same keys from every client.

The result is that of the in-process driver bit for bit, given the same number of threads.

What a client keeps does not travel: its app reads and writes it on the client's own disk (here the
run folder), by the round that the server names, so that it survives the run. A node's id is random;
clients go by their ``partition-id``.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samara.config import validate
from samara.errors import CheckpointError, ConfigError, ResourceError
from samara.federated.aggregation import Tensor
from samara.federated.config import FederateConfig
from samara.federated.driver import Driver
from samara.federated.job import Job
from samara.federated.messages import Instruction, Reply, lost
from samara.federated.secure_client import protect, secure_stage
from samara.runs import RunFolder
from samara.train.stop import StopSignal

ARRAYS, CONTENT = "arrays", "content"
IDENTITY = "identity"
SECURE = "secure"
SECONDS_TO_START = 300.0
"""Until all virtual nodes are there."""
NO_SIDE_EFFECTS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def require_flower() -> None:
    """Check that Flower and Ray are installed.

    Raises:
        ConfigError: If one is not.
    """
    try:
        with _quiet_environment():
            import flwr.simulation  # noqa: F401
            import ray  # noqa: F401
    except ImportError:
        raise ConfigError(
            "engine: flower needs the packages flwr and ray; pip install 'samara[federated]', or "
            "use in_process"
        ) from None


class FlowerDriver(Driver):
    """Clients as virtual nodes of Flower's simulation."""

    _grid: Any = None
    _nodes: Mapping[int, int]

    def run_rounds(self, stop: StopSignal) -> None:
        """See :class:`~samara.federated.driver.Driver`; the rounds run in Flower's server thread.

        Raises:
            ResourceError: If the nodes do not come up.
        """
        with _quiet_environment():
            from flwr.app import Context
            from flwr.serverapp import Grid, ServerApp
            from flwr.simulation import run_simulation

            app = ServerApp()
            problems: list[BaseException] = []

            @app.main()
            def main(grid: Grid, context: Context) -> None:
                del context
                try:
                    self._grid, self._nodes = grid, self._find_nodes(grid)
                    super(FlowerDriver, self).run_rounds(stop)
                except BaseException as error:  # to be raised where the user sees it
                    problems.append(error)

            if not self.is_done:
                actors = self.server.config.actors
                gpus = 1 / actors if self.trainer.model.device.type == "cuda" else 0.0
                run_simulation(
                    server_app=app,
                    client_app=make_client_app(),
                    num_supernodes=self.trainer.data.num_clients,
                    backend_config={
                        "init_args": {"num_cpus": actors, "include_dashboard": False},
                        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
                    },
                )
        if problems:
            raise problems[0]

    def ask(self, instructions: Sequence[Instruction]) -> list[Reply]:
        """See :class:`~samara.federated.driver.Driver`."""
        asked = {instruction.client: instruction for instruction in instructions}
        contents = {client: self.question(asked[client]) for client in asked}
        replies = []
        for client, message in self.carry(contents, "train").items():
            if message.has_error():
                replies.append(lost(asked[client], reason_of(message)))
                continue
            content = json.loads(message.content[CONTENT]["json"])
            reply = Reply.from_plain(
                content["reply"],
                tensors=from_record(message.content[ARRAYS]),
                cpu_seconds=content["cpu_seconds"],
            )
            replies.append(reply)
            if reply.verdict == "ok":
                self.store.note_client(reply.client, round=reply.round)
        return replies

    def exchange(
        self, stage: str, questions: Mapping[int, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """See :class:`~samara.federated.driver.Driver`."""
        contents = {
            client: content_of({}, {"stage": stage, "payload": payload})
            for client, payload in questions.items()
        }
        return {
            client: json.loads(answer.content[CONTENT]["json"])
            for client, answer in self.carry(contents, f"query.{SECURE}").items()
            if not answer.has_error()
        }

    def question(self, instruction: Instruction) -> Any:
        """The content of an instruction's message."""
        return content_of(
            self.server.given(instruction),
            {
                "instruction": instruction.to_dict(),
                "state_round": self.store.newest_round(instruction.client),
                "identity": dict(self.store.identity),
                "recipe": self.server.config.model_dump(mode="json"),
                "run": str(self.run_folder.path.absolute()),
                "threads": torch.get_num_threads(),
            },
        )

    def carry(self, contents: Mapping[int, Any], kind: str) -> dict[int, Any]:
        """Send each client its message and wait for the answers.

        Args:
            contents: Client -> its message's content.
            kind: Of the messages: `train`, or one of Flower's others.

        Returns:
            Client -> its answer, which may be an error.
        """
        from flwr.app import Message

        clients = {self._nodes[client]: client for client in contents}
        messages = [
            Message(content=contents[client], message_type=kind, dst_node_id=node)
            for node, client in clients.items()
        ]
        answers = self._grid.send_and_receive(messages)
        return {clients[answer.metadata.src_node_id]: answer for answer in answers}

    def _find_nodes(self, grid: Any) -> dict[int, int]:
        """The node of each client, by asking each for its partition."""
        from flwr.app import Message, MessageType, RecordDict

        number, deadline = self.trainer.data.num_clients, time.monotonic() + SECONDS_TO_START
        while len(nodes := list(grid.get_node_ids())) < number:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"engine: flower started {len(nodes)} of {number} nodes in "
                    f"{SECONDS_TO_START:.0f} s; use fewer clients, or engine: in_process"
                )
            time.sleep(0.1)
        questions = [
            Message(
                content=RecordDict(),
                message_type=f"{MessageType.QUERY}.{IDENTITY}",
                dst_node_id=node,
            )
            for node in nodes
        ]
        found = {}
        for answer in grid.send_and_receive(questions):
            client = json.loads(answer.content[CONTENT]["json"])["client"]
            found[int(client)] = int(answer.metadata.src_node_id)
        assert sorted(found) == list(range(number)), "every client has a node"
        return found


# --- the client's app -----------------------------------------------------------------------------


def make_client_app() -> Any:
    """The app of a client: trains when asked, and says which client it is."""
    from flwr.clientapp import ClientApp

    app = ClientApp()
    app.train()(train_message)
    app.query(IDENTITY)(identity_message)
    app.query(SECURE)(secure_message)
    return app


def train_message(message: Any, context: Any) -> Any:
    """Carry out an instruction, from message to message."""
    from flwr.app import ConfigRecord, Message

    content = json.loads(message.content[CONTENT]["json"])
    instruction = Instruction.from_dict(content["instruction"])
    job = _job(json.dumps(content["recipe"]), content["run"], content["threads"])
    job.store.identity = content["identity"]
    round = content["state_round"]
    memory = json.loads(context.state[SECURE]["json"]) if SECURE in context.state else None
    try:
        state = job.store.load_client(instruction.client, round=round)
        tensors = from_record(message.content[ARRAYS])
        reply, state = job.trainer.train(instruction, tensors, state)
        reply = protect(job.trainer, reply, tensors, memory)
    except CheckpointError as error:
        reply = lost(instruction, error)
    if reply.verdict == "ok":
        job.store.save_client(instruction.client, state, round=instruction.round)
    if memory is not None:
        context.state[SECURE] = ConfigRecord({"json": json.dumps(memory)})
    return Message(content=answer_of(reply), reply_to=message)


def secure_message(message: Any, context: Any) -> Any:
    """Carry out a stage of a secure sum; its secrets stay in the node's own state, for a round."""
    from flwr.app import ConfigRecord, Message

    content = json.loads(message.content[CONTENT]["json"])
    memory = json.loads(context.state[SECURE]["json"]) if SECURE in context.state else None
    answer, memory = secure_stage(content["stage"], content["payload"], memory)
    context.state[SECURE] = ConfigRecord({"json": json.dumps(memory)})
    return Message(content=content_of({}, answer), reply_to=message)


def identity_message(message: Any, context: Any) -> Any:
    """Say which client this is."""
    from flwr.app import Message

    client = int(context.node_config["partition-id"])
    return Message(content=content_of({}, {"client": client}), reply_to=message)


@functools.lru_cache(maxsize=1)
def _job(recipe: str, run: str, threads: int) -> Job:
    """The model and data of this actor, loaded once."""
    torch.set_num_threads(threads)
    config = validate(FederateConfig, json.loads(recipe))
    return Job(config, RunFolder(Path(run)))


# --- records --------------------------------------------------------------------------------------


def content_of(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> Any:
    """A message's content: named arrays, and the rest as one JSON text."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = ArrayRecord({name: Array(np.ascontiguousarray(tensors[name])) for name in tensors})
    return RecordDict({ARRAYS: arrays, CONTENT: ConfigRecord({"json": json.dumps(plain)})})


def answer_of(reply: Reply) -> Any:
    """The content of a reply's message."""
    return content_of(reply.tensors, {"reply": reply.plain(), "cpu_seconds": reply.cpu_seconds})


def reason_of(message: Any) -> str:
    """The last line of an error."""
    return str(message.error.reason).strip().rpartition("\n")[2]


def from_record(record: Any) -> dict[str, Tensor]:
    """The named arrays of a message."""
    return {name: np.array(array.numpy()) for name, array in record.items()}


@contextmanager
def _quiet_environment() -> Iterator[None]:
    """No telemetry, no look for updates; the environment is as it was afterwards."""
    before = {name: os.environ.get(name) for name in NO_SIDE_EFFECTS}
    os.environ.update(NO_SIDE_EFFECTS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
