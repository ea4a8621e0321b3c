"""Drivers: who carries the messages between server and clients, round after round.

A driver takes what :class:`~samara.federated.server.Server` plans, has it carried out, hands the
replies back, and saves after every round. Both sides depend on nothing but their arguments, so a
run that was killed at any moment goes on to the same result, bit for bit, whoever drives it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from samara.errors import CheckpointError, Stopped
from samara.federated.aggregation import Tensor
from samara.federated.client import Trainer
from samara.federated.devices import fails
from samara.federated.messages import Instruction, Reply, lost
from samara.federated.overhead import CpuWatch
from samara.federated.results import client_scores
from samara.federated.round_records import Plan
from samara.federated.secure_client import Memory, protect, secure_stage
from samara.federated.secure_round import SecureSum, secure_sum
from samara.federated.server import Server
from samara.federated.server_state import Scores
from samara.federated.store import Store
from samara.progress import ProgressLine, say
from samara.runs import RunFolder
from samara.train.stop import StopSignal


class Driver(ABC):
    """Runs the rounds of one run.

    Attributes:
        trainer: Of this process: scores the server's rows, and may play clients.
        watch: Counts what the server costs.
    """

    def __init__(self, server: Server, trainer: Trainer, store: Store, run: RunFolder) -> None:
        self.server, self.trainer, self.store, self.run_folder = server, trainer, store, run
        self.watch = CpuWatch()

    @abstractmethod
    def ask(self, instructions: Sequence[Instruction]) -> list[Reply]:
        """Have clients trained; replies in any order, none for a client that is lost.

        What a client keeps is in the store when it has replied well.
        """

    @abstractmethod
    def exchange(
        self, stage: str, questions: Mapping[int, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """Carry a stage of a secure sum to clients; the answers of those that gave one."""

    def resume(self) -> None:
        """Go back to the newest checkpoint, or to the start, and cut the log to it."""
        saved = self.store.latest()
        if saved is not None:
            self.server.restore(saved.plain, saved.tensors, saved.best_tensors, saved.beside)
            self._truncate(self.server.state.round)
            self.watch.seconds = self.server.state.strategy_cpu_seconds
            return
        self._truncate(-1)
        self._log(self.server.start(self.evaluate))

    def run(self) -> None:
        """Run the rounds that are left.

        Raises:
            Stopped: If a signal was caught; the round in hand is finished and saved.
            ResourceError: If the disk is full.
        """
        with StopSignal() as stop:
            self.run_rounds(stop)
            if stop.number is not None and not self.is_done:
                raise Stopped(
                    f"stopped after round {self.server.state.round}; saved; run the same command "
                    "to go on",
                    signal_number=stop.number,
                )
        round = self.server.state.round
        if round < self.server.config.server.rounds:
            assert self.server.protection is not None
            spent = self.server.protection.summary(round)["client"]
            say(
                f"federate: stopped after round {round}: the next one would pass the privacy "
                f"budget; epsilon {spent['epsilon']:.3g} of {spent['budget']:g} is spent"
            )

    @property
    def is_done(self) -> bool:
        round, protection = self.server.state.round, self.server.protection
        if protection is not None and not protection.allows(round):
            return True
        return round >= self.server.config.server.rounds

    def run_rounds(self, stop: StopSignal) -> None:
        """Run rounds until all are done or a signal was caught."""
        label = f"federate {self.run_folder.path.name}"
        total = self.server.config.server.rounds
        with ProgressLine(label, total=total, unit="rounds") as line:
            while not self.is_done and stop.number is None:
                record = self.run_round()
                accuracy = record["validation_accuracy"]
                shown = {} if accuracy is None else {"accuracy": f"{accuracy:.3f}"}
                loss = f"{record['validation_loss']:.3f}"
                line.update(self.server.state.round, loss=loss, **shown)

    def run_round(self) -> dict[str, Any]:
        """One round: plan, have each client trained, finish, save."""
        with self.watch.running():
            record = self._run_round()
        self.server.state.strategy_cpu_seconds = self.watch.seconds
        return record

    def _run_round(self) -> dict[str, Any]:
        server, before = self.server, self.watch.seconds
        plan = server.plan()
        reached = [
            own
            for own in plan.instructions
            if not fails(
                server.devices[own.client],
                seed=server.config.seed,
                client=own.client,
                round=own.round,
            )
        ]
        secure = self._secure_sum(plan, reached) if server.config.privacy.secure_sum else None
        replies = secure.replies if secure is not None else self.ask(reached)
        record = server.finish(plan, replies, self.evaluate, secure)
        server.state.strategy_cpu_seconds = self.watch.read()
        record["strategy_cpu_seconds"] = server.state.strategy_cpu_seconds - before
        self._log(record)
        known = server.state
        self.store.save(server.plain_state(), known.tensors, known.best_tensors, server.beside())
        return record

    def _secure_sum(self, plan: Plan, reached: Sequence[Instruction]) -> SecureSum:
        """The round's sum; who fails does so in training, after the keys were exchanged."""
        server = self.server
        settings, lasting = server.config.privacy.secure_sum, {own.client for own in reached}
        assert settings is not None
        return secure_sum(
            plan.instructions,
            settings=settings,
            context=f"{server.config.seed}/{server.state.round}",
            exchange=self.exchange,
            train=lambda ready: self.ask([own for own in ready if own.client in lasting]),
            usable=lambda replies: server.usable(plan, replies),
        )

    # --- the log ----------------------------------------------------------------------------------

    def _log(self, record: Mapping[str, Any]) -> None:
        """Write a round's record; where something is protected, what may be released apart."""
        protection = self.server.protection
        if protection is not None:
            unprotected(self.run_folder).append_metrics(record)
            record = protection.public_record(record, self.server.expected_costs())
        self.run_folder.append_metrics(record)

    def _truncate(self, step: int) -> None:
        self.run_folder.truncate_metrics(step)
        if self.server.protection is not None:
            unprotected(self.run_folder).truncate_metrics(step)

    def evaluate(self, tensors: Mapping[str, Tensor]) -> Scores:
        """Score global values on the server's validation rows."""
        with self.watch.paused():
            return self.trainer.score_values(tensors, self.trainer.data.validation)

    def score_clients(self) -> list[dict[str, Any]]:
        """Score each client's test rows by the global values and by its own, in order.

        Of nodes of a deployment a client that cannot be reached is left out.
        """
        return client_scores(self.trainer, self.store, self.server.state.tensors)


class InProcessDriver(Driver):
    """Server and clients in one process, one client after another."""

    def __init__(self, server: Server, trainer: Trainer, store: Store, run: RunFolder) -> None:
        super().__init__(server, trainer, store, run)
        self._memories: dict[int, Memory | None] = {}

    def exchange(
        self, stage: str, questions: Mapping[int, dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """See :class:`Driver`."""
        answers = {}
        with self.watch.paused():
            for client, payload in questions.items():
                remembered = self._memories.get(client)
                answers[client], self._memories[client] = secure_stage(stage, payload, remembered)
        return answers

    def ask(self, instructions: Sequence[Instruction]) -> list[Reply]:
        """See :class:`Driver`."""
        with self.watch.paused():
            return [self._train(instruction) for instruction in instructions]

    def _train(self, instruction: Instruction) -> Reply:
        client = instruction.client
        given = self.server.given(instruction)
        try:
            kept = self.store.load_client(client)
            reply, state = self.trainer.train(instruction, given, kept)
        except CheckpointError as error:
            return lost(instruction, error)
        reply = protect(self.trainer, reply, given, self._memories.get(client))
        if reply.verdict == "ok":
            self.store.save_client(client, state, round=instruction.round)
        return reply


def unprotected(run: RunFolder) -> RunFolder:
    """Where everything is written that a promise of privacy does not cover."""
    return RunFolder(run.path / "unprotected")
