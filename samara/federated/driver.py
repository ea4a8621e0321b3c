"""The in-process driver: server and clients in one process, one client after another.

It carries the messages between :class:`~samara.federated.server.Server` and
:class:`~samara.federated.client.Trainer`, and saves after every round. Both sides depend on nothing
but their arguments, so a run that was killed at any moment goes on to the same result, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samara.errors import Stopped
from samara.federated.aggregation import Tensor
from samara.federated.client import Trainer
from samara.federated.devices import fails
from samara.federated.messages import Reply
from samara.federated.server import Scores, Server
from samara.federated.store import Store
from samara.progress import ProgressLine
from samara.runs import RunFolder
from samara.train.stop import StopSignal


class InProcessDriver:
    """Runs the rounds of one run."""

    def __init__(self, server: Server, trainer: Trainer, store: Store, run: RunFolder) -> None:
        self.server, self.trainer, self.store, self.run_folder = server, trainer, store, run

    def resume(self) -> None:
        """Go back to the newest checkpoint, or to the start, and cut the log to it."""
        saved = self.store.latest()
        if saved is not None:
            self.server.restore(saved.plain, saved.tensors, saved.best_tensors)
            self.run_folder.truncate_metrics(self.server.state.round)
            return
        self.run_folder.truncate_metrics(-1)
        self.run_folder.append_metrics(self.server.start(self.evaluate))

    def run(self) -> None:
        """Run the rounds that are left.

        Raises:
            Stopped: If a signal was caught; the round in hand is finished and saved.
            ResourceError: If the disk is full.
        """
        rounds = self.server.config.server.rounds
        label = f"federate {self.run_folder.path.name}"
        with StopSignal() as stop, ProgressLine(label, total=rounds, unit="rounds") as line:
            while self.server.state.round < rounds:
                record = self.run_round()
                shown = record["validation_accuracy"]
                loss = f"{record['validation_loss']:.3f}"
                accuracy = {} if shown is None else {"accuracy": f"{shown:.3f}"}
                line.update(self.server.state.round, loss=loss, **accuracy)
                if stop.number is not None and self.server.state.round < rounds:
                    raise Stopped(
                        f"stopped after round {self.server.state.round}; saved; run the same "
                        "command to go on",
                        signal_number=stop.number,
                    )

    def run_round(self) -> dict[str, Any]:
        """One round: plan, train each client, finish, save."""
        server, round = self.server, self.server.state.round
        plan = server.plan()
        replies: list[Reply] = []
        for instruction in plan.instructions:
            client = instruction.client
            where = {"seed": server.config.seed, "client": client, "round": round}
            if fails(server.devices[client], **where):
                continue
            reply, state = self.trainer.train(
                instruction, server.state.tensors, self.store.load_client(client)
            )
            replies.append(reply)
            if reply.verdict == "ok":
                self.store.save_client(client, state, round=round)
        record = server.finish(plan, replies, self.evaluate)
        self.run_folder.append_metrics(record)
        known = server.state
        self.store.save(server.plain_state(), known.tensors, known.best_tensors)
        return record

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Scores:
        """Score global values on the server's validation rows."""
        return self.trainer.score_values(tensors, self.trainer.data.validation)
