"""A round as it was planned, what came of it, and what the log says of each client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samara.federated.aggregation import Tensor
from samara.federated.config import FederatedDevice
from samara.federated.configurator import Decision, Verdict
from samara.federated.devices import ClientCost, CostModel, client_cost
from samara.federated.messages import Instruction, Reply, message_bytes


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

    @property
    def asked(self) -> dict[int, Instruction]:
        """Client -> its instruction."""
        return {own.client: own for own in self.instructions}


@dataclass(frozen=True, kw_only=True)
class Came:
    """What came of a round.

    Attributes:
        replies: Client -> its reply, ascending; of those that sent one.
        costs: Of the same clients, modelled.
        verdicts: What became of every client that was asked.
        reasons: Why, if it was not used.
    """

    replies: Mapping[int, Reply]
    costs: Mapping[int, ClientCost]
    verdicts: dict[int, Verdict]
    reasons: dict[int, str]

    @property
    def used(self) -> list[Reply]:
        """The replies that came well and in time, and were not refused since."""
        return [own for client, own in self.replies.items() if self.verdicts[client] == "ok"]


def judge(
    plan: Plan,
    replies: Sequence[Reply],
    *,
    given: Callable[[Instruction], Mapping[str, Tensor]],
    devices: Sequence[FederatedDevice],
    costs: CostModel,
    deadline: float | None,
) -> Came:
    """Work out what a round cost, and who is late, before any tensors are looked at.

    Args:
        plan: Of the round.
        replies: Of the clients that sent one, in any order.
        given: The values that were sent with an instruction.
        devices: Of each client.
        costs: Of a batch on the reference device.
        deadline: Modelled seconds after which a reply is late; None: never.
    """
    by_client = {own.client: own for own in sorted(replies, key=lambda own: own.client)}
    asked = plan.asked
    spent = {
        client: client_cost(
            devices[client],
            costs,
            active_layers=_paid_layers(asked[client], reply),
            bytes_down=message_bytes(asked[client].to_dict(), given(asked[client])),
            bytes_up=message_bytes(reply.plain(), reply.tensors),
            round=reply.round,
        )
        for client, reply in by_client.items()
    }
    verdicts: dict[int, Verdict] = {}
    reasons: dict[int, str] = {}
    for client in asked:
        if client not in by_client:
            verdicts[client], reasons[client] = "error", "sent no reply"
            continue
        verdicts[client], reasons[client] = by_client[client].verdict, by_client[client].message
        if verdicts[client] == "ok" and deadline and spent[client].seconds > deadline:
            verdicts[client] = "timeout"
            reasons[client] = f"took {spent[client].seconds:.3g} s of {deadline:g} s (modelled)"
    return Came(replies=by_client, costs=spent, verdicts=verdicts, reasons=reasons)


def client_records(
    plan: Plan, came: Came, *, devices: Sequence[FederatedDevice], costs: CostModel
) -> list[dict[str, Any]]:
    """Of each client that was asked, what the log says.

    Args:
        plan: Of the round.
        came: Of it.
        devices: Of each client.
        costs: Of a batch on the reference device.
    """
    decided = {own.client: own.reason for own in plan.decisions}
    records = []
    for instruction in plan.instructions:
        client = instruction.client
        record: dict[str, Any] = {
            "client": client,
            "device": devices[client].name,
            "rate": instruction.rate,
            "shape": instruction.shape,
            **{
                name: value
                for name in ("group", "trained_layers", "lora_rank")
                if (value := getattr(instruction, name))
            },
            "verdict": came.verdicts[client],
            "reason": came.reasons[client],
        }
        if client in decided:
            record["decision"] = decided[client]
        if client in came.replies:
            record |= _of_reply(instruction, came.replies[client], came.costs[client], costs)
        records.append(record)
    return records


def _of_reply(
    instruction: Instruction, reply: Reply, cost: ClientCost, costs: CostModel
) -> dict[str, Any]:
    paid = max(_paid_layers(instruction, reply), default=0)
    return {
        "num_examples": reply.num_examples,
        "loss_before": reply.loss_before,
        "loss_after": reply.loss_after,
        "accuracy_before": reply.accuracy_before,
        "accuracy_after": reply.accuracy_after,
        "active_layers_mean": sum(reply.active_layers) / max(1, len(reply.active_layers)),
        "active_layers_max": max(reply.active_layers, default=0),
        "personal_layers": list(reply.sharing.personal),
        "modelled_seconds": cost.seconds,
        "modelled_joules": cost.joules,
        "modelled_peak_bytes": costs.peak_bytes(paid),
        "bytes_down": cost.bytes_down,
        "bytes_up": cost.bytes_up,
        "measured_cpu_seconds": reply.cpu_seconds,
        **({} if reply.epsilon is None else {"epsilon": reply.epsilon}),
    }


def _paid_layers(instruction: Instruction, reply: Reply) -> Sequence[int]:
    """Of each batch the layers that it costs: where lower ones are frozen, those above."""
    if instruction.trained_layers is None:
        return reply.active_layers
    return [instruction.trained_layers] * len(reply.active_layers)
