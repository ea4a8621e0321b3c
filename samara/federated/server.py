"""The server's side of a round: whom to ask for what, and what to make of the replies.

Functions of plain values. No torch, no files, no clock: whoever drives it carries the messages.

A round: *plan* draws clients from those available and chooses an arm for each; the driver has them
trained; *finish* counts what it cost on the virtual clock, refuses what is late or unsound,
averages the rest, teaches the configurator, and goes back to the best weights if the validation
loss has risen too far above its best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from samara.data.draws import Draws, Purpose
from samara.federated.aggregation import (
    HEAD,
    Aggregate,
    Contribution,
    Layout,
    Tensor,
    aggregate,
)
from samara.federated.class_arms import ClassArms
from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.configurator import (
    Candidate,
    Configurator,
    Decision,
    Outcome,
    Verdict,
)
from samara.federated.devices import ClientCost, CostModel, client_cost, is_available
from samara.federated.messages import Instruction, Reply, message_bytes
from samara.federated.protection import Protection
from samara.federated.secure_round import SecureSum
from samara.federated.sharing import SharingAudit
from samara.train.layer_rates import Shape


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of the server's validation rows; accuracy is None of a task without labels."""

    loss: float
    accuracy: float | None = None


@dataclass(kw_only=True)
class ServerState:
    """What the server knows between rounds.

    Attributes:
        round: The next one, counted from 0; so many are done.
        tensors: The global values of everything that is trained.
        best_tensors: Those of the best validation loss so far.
        best_loss, best_round: After how many rounds that was; None: not measured yet.
        last_loss: Of the values as they are.
        typical_change: See :func:`samara.federated.aggregation.aggregate`.
        audit: Who holds which layers.
        totals: Sums over all rounds, of what was modelled and what was measured.
    """

    tensors: dict[str, Tensor]
    best_tensors: dict[str, Tensor]
    audit: SharingAudit
    round: int = 0
    best_loss: float | None = None
    best_round: int | None = None
    last_loss: float | None = None
    typical_change: float | None = None
    totals: dict[str, float] = field(
        default_factory=lambda: {
            "modelled_seconds": 0.0,
            "modelled_client_seconds": 0.0,
            "modelled_joules": 0.0,
            "bytes_down": 0.0,
            "bytes_up": 0.0,
            "tokens": 0.0,
            "flops": 0.0,
        }
    )
    measured_cpu_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A round as decided.

    Attributes:
        instructions: One per client that trains.
        arms: Client -> its arm; empty without a configurator.
        decisions: Of the configurator.
        sat_out: Clients that were drawn, and on whose devices nothing fits.
    """

    instructions: tuple[Instruction, ...]
    arms: Mapping[int, int]
    decisions: tuple[Decision, ...]
    sat_out: tuple[int, ...]


class Server:
    """Plans rounds and finishes them.

    Attributes:
        state: Changed by :meth:`finish` alone.
        configurator: None where the method has fixed rates.
    """

    def __init__(
        self,
        config: FederateConfig,
        *,
        layout: Layout,
        devices: Sequence[FederatedDevice],
        costs: CostModel,
        arm_layers: Sequence[int],
        tensors: Mapping[str, Tensor],
        protection: Protection | None = None,
    ) -> None:
        """Start.

        Args:
            config: The recipe.
            layout: What is trained.
            devices: Of each client.
            costs: Of a batch on the reference device.
            arm_layers: Most layers that a batch runs, for each arm of the configurator; of a
                method without one, a single number.
            tensors: The values to begin with.
            protection: What is done for privacy; None: nothing.
        """
        self.protection = protection
        self.config, self.layout = config, layout
        self.devices, self.costs = devices, costs
        self.peaks = [costs.peak_bytes(layers) for layers in arm_layers]
        self.classes = ClassArms(config, devices=devices, costs=costs, arm_layers=arm_layers)
        self.configurator: Configurator | None = None
        if config.method == "droppeft":
            self.configurator = Configurator(config.configurator, seed=config.seed)
            assert len(self.configurator.arms) == len(self.peaks)
        self.state = ServerState(
            tensors=dict(tensors),
            best_tensors=dict(tensors),
            audit=SharingAudit(num_layers=layout.num_layers),
        )

    def start(self, evaluate: Callable[[Mapping[str, Tensor]], Scores]) -> dict[str, Any]:
        """Score the values to begin with, the best so far; returns the record for the log."""
        scores = evaluate(self.state.tensors)
        if math.isfinite(scores.loss):
            self.state.best_loss, self.state.best_round = scores.loss, 0
        self.state.last_loss = scores.loss
        return {
            "step": 0,
            **self.state.totals,
            "validation_loss": scores.loss,
            "validation_accuracy": scores.accuracy,
        }

    # --- before the clients -----------------------------------------------------------------------

    def plan(self) -> Plan:
        """Decide whom to ask for what; a function of the state and the seed."""
        config, state = self.config, self.state
        drawn = self._draw_clients()
        arms: dict[int, int] = {}
        decisions: list[Decision] = []
        if self.configurator is not None:
            of_classes = config.configurator.rewards == "server"
            candidates = [self._candidate(client) for client in drawn]
            decisions = self.configurator.choose(
                state.round, self.classes.candidates() if of_classes else candidates
            )
            arms = {own.client: own.arm for own in decisions if own.arm is not None}
            if of_classes:
                arms = self.classes.arms(decisions, drawn)
            clients = [client for client in drawn if client in arms]
        else:
            margin = 1 + config.configurator.memory_margin
            needed = self.peaks[0] * margin
            clients = [c for c in drawn if needed <= self.devices[c].memory_bytes]
        must_share, population = self._must_share(), state.audit.population()
        if self.protection is not None:
            population = self.protection.population
        instructions = []
        for client in clients:
            rate, shape = self._rates(arms.get(client))
            instructions.append(
                Instruction(
                    round=state.round,
                    client=client,
                    rate=rate,
                    shape=shape,
                    must_share=must_share,
                    population=population,
                )
            )
        return Plan(
            instructions=tuple(instructions),
            arms=arms,
            decisions=tuple(decisions),
            sat_out=tuple(client for client in drawn if client not in clients),
        )

    def _rates(self, arm: int | None) -> tuple[float, Shape]:
        """Rate and shape of layer dropout for a client."""
        if self.configurator is not None:
            assert arm is not None
            return self.configurator.arms[arm].rate, self.configurator.arms[arm].shape
        if self.config.method == "static_stld":
            return self.config.layer_dropout.rate, self.config.layer_dropout.shape
        return 0.0, "uniform"

    def _draw_clients(self) -> list[int]:
        """So many of the clients that are available, all equally likely, ascending."""
        config, round = self.config, self.state.round
        available = [
            client
            for client, device in enumerate(self.devices)
            if is_available(device, seed=config.seed, client=client, round=round)
        ]
        if self.protection is not None:
            drawn = self.protection.draw(available, round)
            if drawn is not None:
                return drawn
        number = min(config.clients.per_round, len(available))
        draws = Draws(seed=config.seed, purpose=Purpose.CLIENT_SAMPLE, draw=round)
        return [available[place] for place in draws.subset(number, of=len(available))]

    def _candidate(self, client: int) -> Candidate:
        device = self.devices[client]
        return Candidate(
            client=client,
            device_class=device.name,
            peaks=self.peaks,
            memory=device.memory_bytes,
        )

    def _must_share(self) -> tuple[int, ...]:
        sharing = self.config.sharing
        if self.config.method != "droppeft" or sharing.direction in ("all", "none"):
            return ()
        if self.config.privacy.client is not None:
            return ()  # who shared what does not leave the sum
        return self.state.audit.must_share(self.state.round, every=sharing.share_every_rounds)

    # --- after the clients ------------------------------------------------------------------------

    def finish(
        self,
        plan: Plan,
        replies: Sequence[Reply],
        evaluate: Callable[[Mapping[str, Tensor]], Scores],
        secure: SecureSum | None = None,
    ) -> dict[str, Any]:
        """Work the replies into the state.

        Args:
            plan: Of this round.
            replies: Of the clients that sent one, in any order.
            evaluate: Scores global values on the server's validation rows.
            secure: The sum over the replies, where these are masked.

        Returns:
            The round's record for the log.
        """
        state = self.state
        by_client = {reply.client: reply for reply in replies}
        asked = {own.client: own for own in plan.instructions}
        costs = {c: self._cost(asked[c], by_client[c]) for c in sorted(by_client)}
        verdicts, reasons = self._verdicts(plan, by_client, costs)
        used = [by_client[client] for client in sorted(by_client) if verdicts[client] == "ok"]
        result = self._aggregate(used, secure)
        for client, reason in result.refused.items():
            verdicts[client], reasons[client] = "refused", reason
        state.tensors, state.typical_change = result.tensors, result.typical_change
        self._note([by_client[c] for c in sorted(by_client) if verdicts[c] == "ok"], result)
        seconds = self._count(by_client, costs)
        before = state.last_loss
        scores, rolled_back = self._evaluate(evaluate)
        state.last_loss = state.best_loss if rolled_back else scores.loss
        gain = math.nan if before is None else before - scores.loss
        self._teach(plan, by_client, costs, verdicts, gain)
        record = {
            "step": state.round + 1,
            **state.totals,
            "round_modelled_seconds": seconds,
            "validation_loss": scores.loss,
            "validation_accuracy": scores.accuracy,
            "rolled_back": rolled_back,
            "senders": {group: len(own) for group, own in result.senders.items()},
            "best_arms": self.configurator.best_arms(state.round + 1) if self.configurator else {},
            "clients": [
                self._client_record(plan, own, by_client, costs, verdicts, reasons)
                for own in plan.instructions
            ],
            "sat_out": list(plan.sat_out),
            "warnings": list(self.configurator.warnings) if self.configurator else [],
        }
        if self.protection is not None:
            record["privacy"] = self.protection.summary(state.round + 1)
        state.round += 1
        return record

    def _aggregate(self, used: Sequence[Reply], secure: SecureSum | None) -> Aggregate:
        """The new values: a mean of checked replies, or what can be made of a sum of vectors."""
        state, config = self.state, self.config
        if self.protection is not None and config.privacy.sums_vectors:
            return self.protection.aggregate(state.tensors, used, secure, state.round)
        return aggregate(
            state.tensors,
            [Contribution(client=r.client, weight=r.num_examples, tensors=r.tensors) for r in used],
            self.layout,
            max_change=config.server.max_change,
            typical_change=state.typical_change,
        )

    def _cost(self, instruction: Instruction, reply: Reply) -> ClientCost:
        return client_cost(
            self.devices[reply.client],
            self.costs,
            active_layers=reply.active_layers,
            bytes_down=message_bytes(instruction.to_dict(), self.state.tensors),
            bytes_up=message_bytes(reply.plain(), reply.tensors),
            round=reply.round,
        )

    def _verdicts(
        self, plan: Plan, replies: Mapping[int, Reply], costs: Mapping[int, ClientCost]
    ) -> tuple[dict[int, Verdict], dict[int, str]]:
        """What became of every client that was asked, before its tensors are looked at."""
        verdicts: dict[int, Verdict] = {}
        reasons: dict[int, str] = {}
        deadline = self.config.server.deadline_seconds
        for instruction in plan.instructions:
            client = instruction.client
            if client not in replies:
                verdicts[client], reasons[client] = "error", "sent no reply"
                continue
            verdicts[client], reasons[client] = replies[client].verdict, replies[client].message
            if verdicts[client] == "ok" and deadline and costs[client].seconds > deadline:
                verdicts[client] = "timeout"
                reasons[client] = f"took {costs[client].seconds:.3g} s of {deadline:g} s (modelled)"
        return verdicts, reasons

    def _note(self, used: Sequence[Reply], result: Aggregate) -> None:
        """Remember who holds what, as far as it was said."""
        audit = self.state.audit
        if self.protection is not None:
            self.protection.note(used, result, audit, self.state.round)
            return
        for reply in used:
            sent = {self.layout.groups[name] for name in reply.tensors} - {HEAD}
            audit.record(
                reply.round,
                client=reply.client,
                state=reply.sharing,
                sent=sorted(map(int, sent)),
                hash=reply.personal_hash,
            )

    def usable(self, plan: Plan, replies: Sequence[Reply]) -> list[int]:
        """The clients whose replies came back well and in time."""
        by_client = {reply.client: reply for reply in replies}
        asked = {own.client: own for own in plan.instructions}
        costs = {c: self._cost(asked[c], by_client[c]) for c in sorted(by_client)}
        verdicts, _ = self._verdicts(plan, by_client, costs)
        return [client for client in sorted(by_client) if verdicts[client] == "ok"]

    def expected_costs(self) -> dict[str, float]:
        """See :meth:`~samara.federated.class_arms.ClassArms.expected`."""
        message = message_bytes({}, self.state.tensors)
        return self.classes.expected(round=self.state.round, message=message)

    def _teach(
        self,
        plan: Plan,
        replies: Mapping[int, Reply],
        costs: Mapping[int, ClientCost],
        verdicts: Mapping[int, Verdict],
        gain: float,
    ) -> None:
        if self.configurator is None:
            return
        if self.config.configurator.rewards == "server":
            message = message_bytes({}, self.state.tensors)
            outcomes = self.classes.outcomes(
                plan.decisions, gain=gain, round=self.state.round, message=message
            )
            self.configurator.observe(self.state.round, outcomes)
            return
        per_joule = self.config.configurator.per == "joule"
        outcomes = []
        for client, arm in sorted(plan.arms.items()):
            outcome = Outcome(
                client=client,
                device_class=self.devices[client].name,
                arm=arm,
                peaks=self.peaks,
                verdict=verdicts[client],
            )
            if verdicts[client] == "ok":
                reply, cost = replies[client], costs[client]
                outcome = replace(
                    outcome,
                    gain=reply.gain,
                    cost=max(cost.joules if per_joule else cost.seconds, 1e-12),
                    accuracy_change=reply.accuracy_change,
                    slowness=cost.slowness,
                )
            outcomes.append(outcome)
        self.configurator.observe(self.state.round, outcomes)

    def _count(self, replies: Mapping[int, Reply], costs: Mapping[int, ClientCost]) -> float:
        """Add up the round; returns how long it lasted on the virtual clock."""
        totals, deadline = self.state.totals, self.config.server.deadline_seconds
        longest = 0.0
        for client in sorted(replies):
            reply, cost = replies[client], costs[client]
            longest = max(longest, min(cost.seconds, deadline or math.inf))
            totals["modelled_client_seconds"] += cost.seconds
            totals["modelled_joules"] += cost.joules
            totals["bytes_down"] += cost.bytes_down
            totals["bytes_up"] += cost.bytes_up
            totals["tokens"] += reply.tokens
            totals["flops"] += reply.flops
            self.state.measured_cpu_seconds += reply.cpu_seconds
        totals["modelled_seconds"] += longest
        return longest

    def _evaluate(self, evaluate: Callable[[Mapping[str, Tensor]], Scores]) -> tuple[Scores, bool]:
        """Score the new weights; keep them as the best, or go back to the best."""
        state, rise = self.state, self.config.server.rollback_rise
        scores = evaluate(state.tensors)
        best = state.best_loss
        if math.isfinite(scores.loss) and (best is None or scores.loss < best):
            state.best_loss, state.best_round = scores.loss, state.round + 1
            state.best_tensors = dict(state.tensors)
            return scores, False
        too_high = rise is not None and best is not None and scores.loss > best * (1 + rise)
        if too_high or not math.isfinite(scores.loss):
            state.tensors = dict(state.best_tensors)
            return scores, True
        return scores, False

    def _client_record(
        self,
        plan: Plan,
        instruction: Instruction,
        replies: Mapping[int, Reply],
        costs: Mapping[int, ClientCost],
        verdicts: Mapping[int, Verdict],
        reasons: Mapping[int, str],
    ) -> dict[str, Any]:
        client = instruction.client
        record: dict[str, Any] = {
            "client": client,
            "device": self.devices[client].name,
            "rate": instruction.rate,
            "shape": instruction.shape,
            "verdict": verdicts[client],
            "reason": reasons[client],
        }
        decided = {own.client: own.reason for own in plan.decisions}
        if client in decided:
            record["decision"] = decided[client]
        if client not in replies:
            return record
        reply, cost = replies[client], costs[client]
        most = max(reply.active_layers, default=0)
        return {
            **record,
            "num_examples": reply.num_examples,
            "loss_before": reply.loss_before,
            "loss_after": reply.loss_after,
            "accuracy_before": reply.accuracy_before,
            "accuracy_after": reply.accuracy_after,
            "active_layers_mean": sum(reply.active_layers) / max(1, len(reply.active_layers)),
            "active_layers_max": most,
            "personal_layers": list(reply.sharing.personal),
            "modelled_seconds": cost.seconds,
            "modelled_joules": cost.joules,
            "modelled_peak_bytes": self.costs.peak_bytes(most),
            "bytes_down": cost.bytes_down,
            "bytes_up": cost.bytes_up,
            "measured_cpu_seconds": reply.cpu_seconds,
            **({} if reply.epsilon is None else {"epsilon": reply.epsilon}),
        }

    # --- state ------------------------------------------------------------------------------------

    def plain_state(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        state = self.state
        return {
            "round": state.round,
            "best_loss": state.best_loss,
            "best_round": state.best_round,
            "last_loss": state.last_loss,
            "typical_change": state.typical_change,
            "audit": state.audit.to_dict(),
            "totals": state.totals,
            "measured_cpu_seconds": state.measured_cpu_seconds,
            "configurator": self.configurator.state() if self.configurator else None,
            "privacy": self.protection.state() if self.protection else None,
        }

    def restore(
        self,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        best_tensors: Mapping[str, Tensor],
    ) -> None:
        """Take over what :meth:`plain_state` gave, and the tensors beside it."""
        self.state = ServerState(
            tensors=dict(tensors),
            best_tensors=dict(best_tensors),
            audit=SharingAudit.from_dict(plain["audit"]),
            totals=dict(plain["totals"]),
            **{
                name: plain[name]
                for name in (
                    "round",
                    "best_loss",
                    "best_round",
                    "last_loss",
                    "typical_change",
                    "measured_cpu_seconds",
                )
            },
        )
        if self.configurator is not None:
            self.configurator.restore(plain["configurator"])
        if self.protection is not None:
            self.protection.restore(plain["privacy"], self.state.round)
