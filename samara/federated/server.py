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
from samara.federated.aggregation import HEAD, Contribution, Layout, Tensor
from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.configurator import (
    Candidate,
    Configurator,
    Decision,
    Outcome,
    Verdict,
)
from samara.federated.depth_search import DepthParts
from samara.federated.devices import ClientCost, CostModel, client_cost, is_available
from samara.federated.messages import Instruction, Reply, message_bytes
from samara.federated.parts import Parts, RankParts
from samara.federated.server_optimizers import Moments, update
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
        typical_change: See :func:`samara.federated.aggregation.aggregate`.
        moments, best_moments: Of the server's optimizer, beside either values.
        audit: Who holds which layers.
        totals: Sums over all rounds, of what was modelled and what was counted.
        measured_cpu_seconds: Of the clients.
        strategy_cpu_seconds: Of the server (:mod:`samara.federated.overhead`).
    """

    tensors: dict[str, Tensor]
    best_tensors: dict[str, Tensor]
    audit: SharingAudit
    round: int = 0
    best_loss: float | None = None
    best_round: int | None = None
    typical_change: float | None = None
    moments: Moments = field(default_factory=Moments)
    best_moments: Moments = field(default_factory=Moments)
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
    strategy_cpu_seconds: float = 0.0


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
        parts: Which part of the payload each client works on.
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
        """
        self.config, self.layout = config, layout
        self.devices, self.costs = devices, costs
        self.arm_layers = list(arm_layers)
        self.peaks = [costs.peak_bytes(layers) for layers in arm_layers]
        kinds: dict[str, type[Parts]] = {"hetlora": RankParts, "fedadapter": DepthParts}
        self.parts = kinds.get(config.method, Parts)(config, layout=layout, devices=devices)
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
        return {
            "step": 0,
            **self.state.totals,
            "validation_loss": scores.loss,
            "validation_accuracy": scores.accuracy,
        }

    # --- before the clients -----------------------------------------------------------------------

    def plan(self) -> Plan:
        """Decide whom to ask for what; a function of the state and the seed."""
        state = self.state
        drawn = self._draw_clients()
        arms: dict[int, int] = {}
        decisions: list[Decision] = []
        if self.configurator is not None:
            decisions = self.configurator.choose(state.round, [self._candidate(c) for c in drawn])
            arms = {own.client: own.arm for own in decisions if own.arm is not None}
            clients = [client for client in drawn if client in arms]
        else:
            least = self.parts.least_layers(self.arm_layers[0])
            clients = [client for client in drawn if self._fits(client, least)]
        parts = self.parts.instruct(state.round, clients, self._fits)
        must_share, population = self._must_share(), state.audit.population()
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
                    **parts[client],
                )
            )
        return Plan(
            instructions=tuple(instructions),
            arms=arms,
            decisions=tuple(decisions),
            sat_out=tuple(client for client in drawn if client not in clients),
        )

    def _fits(self, client: int, layers: int) -> bool:
        """Whether a client's device has the memory for so many layers, with a margin."""
        margin = 1 + self.config.configurator.memory_margin
        return self.costs.peak_bytes(layers) * margin <= self.devices[client].memory_bytes

    def given(self, instruction: Instruction) -> Mapping[str, Tensor]:
        """The values that are sent with an instruction."""
        return self.parts.given(instruction, self.state.tensors)

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
        return self.state.audit.must_share(self.state.round, every=sharing.share_every_rounds)

    # --- after the clients ------------------------------------------------------------------------

    def finish(
        self,
        plan: Plan,
        replies: Sequence[Reply],
        evaluate: Callable[[Mapping[str, Tensor]], Scores],
    ) -> dict[str, Any]:
        """Work the replies into the state.

        Args:
            plan: Of this round.
            replies: Of the clients that sent one, in any order.
            evaluate: Scores global values on the server's validation rows.

        Returns:
            The round's record for the log.
        """
        state, config = self.state, self.config
        by_client = {reply.client: reply for reply in replies}
        asked = {own.client: own for own in plan.instructions}
        costs = {c: self._cost(asked[c], by_client[c]) for c in sorted(by_client)}
        verdicts, reasons = self._verdicts(plan, by_client, costs)
        used = [by_client[client] for client in sorted(by_client) if verdicts[client] == "ok"]
        result = self.parts.combine(
            state.tensors,
            [Contribution(client=r.client, weight=r.num_examples, tensors=r.tensors) for r in used],
            asked,
            typical_change=state.typical_change,
        )
        for client, reason in result.refused.items():
            verdicts[client], reasons[client] = "refused", reason
        state.typical_change = result.typical_change
        state.tensors, state.moments = update(
            config.server.optimizer,
            state.moments,
            previous=state.tensors,
            averaged=result.tensors,
            sent=[group for group, own in result.senders.items() if own],
            layout=self.layout,
        )
        for client in sorted(by_client):
            if verdicts[client] == "ok":
                self._note_layers(by_client[client])
        self._teach(plan, by_client, costs, verdicts)
        seconds = self._count(by_client, costs)
        state.tensors, noted = self.parts.settle(
            state.tensors, {c: costs[c].seconds for c in costs}, asked, _ranking(evaluate)
        )
        scores, rolled_back = self._evaluate(evaluate)
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
            **noted,
            "warnings": list(self.configurator.warnings) if self.configurator else [],
        }
        state.round += 1
        return record

    def _cost(self, instruction: Instruction, reply: Reply) -> ClientCost:
        return client_cost(
            self.devices[reply.client],
            self.costs,
            active_layers=_paid_layers(instruction, reply),
            bytes_down=message_bytes(instruction.to_dict(), self.given(instruction)),
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

    def _note_layers(self, reply: Reply) -> None:
        sent = {self.layout.groups[name] for name in reply.tensors} - {HEAD}
        self.state.audit.record(
            reply.round,
            client=reply.client,
            state=reply.sharing,
            sent=sorted(map(int, sent)),
            hash=reply.personal_hash,
        )

    def _teach(
        self,
        plan: Plan,
        replies: Mapping[int, Reply],
        costs: Mapping[int, ClientCost],
        verdicts: Mapping[int, Verdict],
    ) -> None:
        if self.configurator is None:
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
            state.best_tensors, state.best_moments = dict(state.tensors), state.moments
            return scores, False
        too_high = rise is not None and best is not None and scores.loss > best * (1 + rise)
        if too_high or not math.isfinite(scores.loss):
            state.tensors, state.moments = dict(state.best_tensors), state.best_moments
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
            **{
                name: value
                for name in ("group", "trained_layers", "lora_rank")
                if (value := getattr(instruction, name))
            },
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
            "modelled_peak_bytes": self.costs.peak_bytes(
                max(_paid_layers(instruction, reply), default=0)
            ),
            "bytes_down": cost.bytes_down,
            "bytes_up": cost.bytes_up,
            "measured_cpu_seconds": reply.cpu_seconds,
        }

    # --- state ------------------------------------------------------------------------------------

    def plain_state(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        state = self.state
        return {
            "round": state.round,
            "best_loss": state.best_loss,
            "best_round": state.best_round,
            "typical_change": state.typical_change,
            "steps": dict(state.moments.steps),
            "best_steps": dict(state.best_moments.steps),
            "parts": self.parts.plain_state(),
            "audit": state.audit.to_dict(),
            "totals": state.totals,
            "measured_cpu_seconds": state.measured_cpu_seconds,
            "strategy_cpu_seconds": state.strategy_cpu_seconds,
            "configurator": self.configurator.state() if self.configurator else None,
        }

    def beside(self) -> dict[str, Tensor]:
        """Tensors of the state other than the values: moments of the optimizer, trial groups."""
        state = self.state
        return {
            **state.moments.tensors("last"),
            **state.best_moments.tensors("best"),
            **self.parts.tensors(),
        }

    def restore(
        self,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        best_tensors: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
    ) -> None:
        """Take over what :meth:`plain_state` and :meth:`beside` gave, and the values."""
        self.state = ServerState(
            tensors=dict(tensors),
            best_tensors=dict(best_tensors),
            moments=Moments.of("last", beside, plain["steps"]),
            best_moments=Moments.of("best", beside, plain["best_steps"]),
            audit=SharingAudit.from_dict(plain["audit"]),
            totals=dict(plain["totals"]),
            **{
                name: plain[name]
                for name in (
                    "round",
                    "best_loss",
                    "best_round",
                    "typical_change",
                    "measured_cpu_seconds",
                    "strategy_cpu_seconds",
                )
            },
        )
        self.parts.restore(plain["parts"], beside)
        if self.configurator is not None:
            self.configurator.restore(plain["configurator"])


def _paid_layers(instruction: Instruction, reply: Reply) -> Sequence[int]:
    """Of each batch the layers that it costs: where lower ones are frozen, those above."""
    if instruction.trained_layers is None:
        return reply.active_layers
    return [instruction.trained_layers] * len(reply.active_layers)


def _ranking(
    evaluate: Callable[[Mapping[str, Tensor]], Scores],
) -> Callable[[Mapping[str, Tensor]], tuple[float, float]]:
    """What values are compared by: accuracy, if there is one, then the loss."""

    def ranked(tensors: Mapping[str, Tensor]) -> tuple[float, float]:
        scores = evaluate(tensors)
        loss = scores.loss if math.isfinite(scores.loss) else math.inf
        return scores.accuracy or 0.0, -loss

    return ranked
