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
from dataclasses import replace
from typing import Any

from samara.data.draws import Draws, Purpose
from samara.federated.aggregation import HEAD, Aggregate, Contribution, Layout, Tensor
from samara.federated.class_arms import ClassArms
from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.configurator import (
    Configurator,
    Decision,
    Outcome,
)
from samara.federated.depth_search import DepthParts
from samara.federated.devices import CostModel, is_available
from samara.federated.messages import Instruction, Reply, message_bytes
from samara.federated.parts import Parts, RankParts
from samara.federated.protection import Protection
from samara.federated.round_records import Came, Plan, client_records, judge
from samara.federated.secure_round import SecureSum
from samara.federated.server_optimizers import update
from samara.federated.server_state import Scores, ServerState
from samara.federated.sharing import SharingAudit
from samara.train.layer_rates import Shape


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
        self.arm_layers = list(arm_layers)
        kinds: dict[str, type[Parts]] = {"hetlora": RankParts, "fedadapter": DepthParts}
        self.parts = kinds.get(config.method, Parts)(config, layout=layout, devices=devices)
        self.classes = ClassArms(config, devices=devices, costs=costs, arm_layers=arm_layers)
        self.configurator: Configurator | None = None
        if config.method == "droppeft":
            self.configurator = Configurator(config.configurator, seed=config.seed)
            assert len(self.configurator.arms) == len(self.classes.peaks)
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
        state, config = self.state, self.config
        drawn = self._draw_clients()
        arms: dict[int, int] = {}
        decisions: list[Decision] = []
        if self.configurator is not None:
            of_classes = config.configurator.rewards == "server"
            candidates = [self.classes.candidate(client) for client in drawn]
            decisions = self.configurator.choose(
                state.round, self.classes.candidates() if of_classes else candidates
            )
            arms = {own.client: own.arm for own in decisions if own.arm is not None}
            if of_classes:
                arms = self.classes.arms(decisions, drawn)
            clients = [client for client in drawn if client in arms]
        else:
            least = self.parts.least_layers(self.arm_layers[0])
            clients = [client for client in drawn if self._fits(client, least)]
        parts = self.parts.instruct(state.round, clients, self._fits)
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
        if self.protection is not None:
            drawn = self.protection.draw(available, round)
            if drawn is not None:
                return drawn
        number = min(config.clients.per_round, len(available))
        draws = Draws(seed=config.seed, purpose=Purpose.CLIENT_SAMPLE, draw=round)
        return [available[place] for place in draws.subset(number, of=len(available))]

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
        came = self._judge(plan, replies)
        result = self._aggregate(plan, came, secure)
        for client, reason in result.refused.items():
            came.verdicts[client], came.reasons[client] = "refused", reason
        self._step(result)
        self._note(came.used, result)
        seconds = self._count(came)
        state.tensors, noted = self.parts.settle(
            state.tensors,
            {client: cost.seconds for client, cost in came.costs.items()},
            plan.asked,
            _ranking(evaluate),
        )
        before = state.last_loss
        scores, rolled_back = self._evaluate(evaluate)
        state.last_loss = state.best_loss if rolled_back else scores.loss
        gain = math.nan if before is None else before - scores.loss
        self._teach(plan, came, gain)
        record = {
            "step": state.round + 1,
            **state.totals,
            "round_modelled_seconds": seconds,
            "validation_loss": scores.loss,
            "validation_accuracy": scores.accuracy,
            "rolled_back": rolled_back,
            "senders": {group: len(own) for group, own in result.senders.items()},
            "best_arms": self.configurator.best_arms(state.round + 1) if self.configurator else {},
            "clients": client_records(plan, came, devices=self.devices, costs=self.costs),
            "sat_out": list(plan.sat_out),
            **noted,
            "warnings": list(self.configurator.warnings) if self.configurator else [],
        }
        if self.protection is not None:
            record["privacy"] = self.protection.summary(state.round + 1)
        state.round += 1
        return record

    def _aggregate(self, plan: Plan, came: Came, secure: SecureSum | None) -> Aggregate:
        """The new values: a mean of checked replies, or what can be made of a sum of vectors."""
        state = self.state
        if self.protection is not None and self.config.privacy.sums_vectors:
            return self.protection.aggregate(state.tensors, came.used, secure, state.round)
        return self.parts.combine(
            state.tensors,
            [
                Contribution(client=own.client, weight=own.num_examples, tensors=own.tensors)
                for own in came.used
            ],
            plan.asked,
            typical_change=state.typical_change,
        )

    def _step(self, result: Aggregate) -> None:
        """What the server's optimizer makes of a mean, or of a noisy sum: it costs no privacy."""
        state = self.state
        state.typical_change = result.typical_change
        state.tensors, state.moments = update(
            self.config.server.optimizer,
            state.moments,
            previous=state.tensors,
            averaged=result.tensors,
            sent=[group for group, own in result.senders.items() if own],
            layout=self.layout,
        )

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
        return [reply.client for reply in self._judge(plan, replies).used]

    def _judge(self, plan: Plan, replies: Sequence[Reply]) -> Came:
        """What came back, at what cost, and in time or not."""
        return judge(
            plan,
            replies,
            given=self.given,
            devices=self.devices,
            costs=self.costs,
            deadline=self.config.server.deadline_seconds,
        )

    def expected_costs(self) -> dict[str, float]:
        """See :meth:`~samara.federated.class_arms.ClassArms.expected`."""
        message = message_bytes({}, self.state.tensors)
        return self.classes.expected(round=self.state.round, message=message)

    def _teach(self, plan: Plan, came: Came, gain: float) -> None:
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
                peaks=self.classes.peaks,
                verdict=came.verdicts[client],
            )
            if came.verdicts[client] == "ok":
                reply, cost = came.replies[client], came.costs[client]
                outcome = replace(
                    outcome,
                    gain=reply.gain,
                    cost=max(cost.joules if per_joule else cost.seconds, 1e-12),
                    accuracy_change=reply.accuracy_change,
                    slowness=cost.slowness,
                )
            outcomes.append(outcome)
        self.configurator.observe(self.state.round, outcomes)

    def _count(self, came: Came) -> float:
        """Add up the round; returns how long it lasted on the virtual clock."""
        totals, deadline = self.state.totals, self.config.server.deadline_seconds
        longest = 0.0
        for client, reply in came.replies.items():
            cost = came.costs[client]
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

    # --- state ------------------------------------------------------------------------------------

    def plain_state(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data."""
        return {
            **self.state.plain(),
            "parts": self.parts.plain_state(),
            "configurator": self.configurator.state() if self.configurator else None,
            "privacy": self.protection.state() if self.protection else None,
        }

    def beside(self) -> dict[str, Tensor]:
        """Tensors of the state other than the values: moments of the optimizer, trial groups."""
        return {**self.state.beside(), **self.parts.tensors()}

    def restore(
        self,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        best_tensors: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
    ) -> None:
        """Take over what :meth:`plain_state` and :meth:`beside` gave, and the values."""
        self.state = ServerState.of(plain, tensors, best_tensors, beside)
        self.parts.restore(plain["parts"], beside)
        if self.configurator is not None:
            self.configurator.restore(plain["configurator"])
        if self.protection is not None:
            self.protection.restore(plain["privacy"], self.state.round)


def _ranking(
    evaluate: Callable[[Mapping[str, Tensor]], Scores],
) -> Callable[[Mapping[str, Tensor]], tuple[float, float]]:
    """What values are compared by: accuracy, if there is one, then the loss."""

    def ranked(tensors: Mapping[str, Tensor]) -> tuple[float, float]:
        scores = evaluate(tensors)
        loss = scores.loss if math.isfinite(scores.loss) else math.inf
        return scores.accuracy or 0.0, -loss

    return ranked
