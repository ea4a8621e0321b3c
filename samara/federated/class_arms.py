"""Arms for whole device classes, judged by the server's own rows; and what a round costs at most.

For a configurator that must not learn from what clients say: every class tries one arm a round,
whoever of it takes part, and all share the gain of the round, the fall of the loss on the server's
validation rows. What a round costs a device is worked out beforehand from its profile. So nothing
in it depends on a client's data beyond the released values, or on who was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.configurator import Candidate, Decision, Outcome
from samara.federated.devices import ClientCost, CostModel, client_cost


class ClassArms:
    """The classes of a run, and what they cost.

    Args:
        config: The recipe.
        devices: Of each client.
        costs: Of a batch on the reference device.
        arm_layers: Most layers that a batch runs, of each arm.

    Attributes:
        peaks: Modelled peak bytes of each arm.
    """

    def __init__(
        self,
        config: FederateConfig,
        *,
        devices: Sequence[FederatedDevice],
        costs: CostModel,
        arm_layers: Sequence[int],
    ) -> None:
        self._config, self._devices, self._costs = config, devices, costs
        self._arm_layers = tuple(arm_layers)
        self.peaks = [costs.peak_bytes(layers) for layers in arm_layers]

    def candidates(self) -> list[Candidate]:
        """One candidate a class, standing in for all: the first client of it."""
        firsts: dict[str, int] = {}
        for client, device in enumerate(self._devices):
            firsts.setdefault(device.name, client)
        return [self.candidate(client) for client in firsts.values()]

    def candidate(self, client: int) -> Candidate:
        """What the configurator has to know of a client to choose for it."""
        device, pace = self._devices[client], self._config.configurator.pace
        batch = [self._costs.batch_seconds(layers) for layers in self._arm_layers]
        fastest = min(own.slowness for own in self._devices)
        return Candidate(
            client=client,
            device_class=device.name,
            peaks=self.peaks,
            memory=device.memory_bytes,
            seconds=[device.slowness * seconds for seconds in batch],
            most_seconds=math.inf if pace is None else pace * fastest * max(batch),
        )

    def arms(self, decisions: Sequence[Decision], clients: Sequence[int]) -> dict[int, int]:
        """The arm of each client that was drawn: that of its class; none where none fits."""
        by_class = {self._devices[own.client].name: own.arm for own in decisions}
        chosen = {client: by_class[self._devices[client].name] for client in clients}
        return {client: arm for client, arm in chosen.items() if arm is not None}

    def outcomes(
        self, decisions: Sequence[Decision], *, gain: float, round: int, message: int
    ) -> list[Outcome]:
        """What became of each class's arm.

        Args:
            decisions: Of the round, one a class.
            gain: Fall of the server's validation loss.
            round: The present one.
            message: Bytes of all values.
        """
        per_joule = self._config.configurator.per == "joule"
        outcomes = []
        for own in decisions:
            if own.arm is None:
                continue
            cost = self._cost(own.client, own.arm, round=round, message=message)
            outcomes.append(
                Outcome(
                    client=own.client,
                    device_class=self._devices[own.client].name,
                    arm=own.arm,
                    peaks=self.peaks,
                    verdict="ok",
                    gain=gain if math.isfinite(gain) else 0.0,
                    cost=max(cost.joules if per_joule else cost.seconds, 1e-12),
                    slowness=cost.slowness,
                )
            )
        return outcomes

    def expected(self, *, round: int, message: int) -> dict[str, float]:
        """What a round costs on average over who may be drawn, and how long it lasts at most.

        At the depth of the first arm, full depth. It tells nothing about who was drawn.
        """
        costs = [
            self._cost(client, 0, round=round, message=message)
            for client in range(len(self._devices))
        ]
        rate = min(1.0, self._config.clients.per_round / len(costs))
        return {
            "modelled_seconds": max(cost.seconds for cost in costs),
            "modelled_client_seconds": rate * sum(cost.seconds for cost in costs),
            "modelled_joules": rate * sum(cost.joules for cost in costs),
            "bytes_down": rate * sum(cost.bytes_down for cost in costs),
            "bytes_up": rate * sum(cost.bytes_up for cost in costs),
        }

    def _cost(self, client: int, arm: int, *, round: int, message: int) -> ClientCost:
        return client_cost(
            self._devices[client],
            self._costs,
            active_layers=[self._arm_layers[arm]] * self._config.local.steps,
            bytes_down=message,
            bytes_up=message,
            round=round,
        )
