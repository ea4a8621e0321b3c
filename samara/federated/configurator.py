"""The configurator: rate and shape of layer dropout per device, chosen online by trying.

DropPEFT (arXiv 2503.10217) states that the dropout ratios are chosen online per device by
exploration and exploitation. Arms, reward, pooling, policies and guard rails here are our own.

An *arm* is a mean drop rate with a shape over the depth. Its reward is what a client's local
training gained on the client's validation rows, per second or per joule of the client's clock:

- Gains shrink as training converges, so rewards are compared within a round: each is divided by the
  *trend* of its round and class, the mean of reward over what is known of its arm. A round with
  fewer than three clients of a class takes the running trend.
- A hundred devices that take part in a tenth of the rounds can never try ten arms each: the
  statistics are those of the device's class. A device keeps an offset of its own, believed the more
  the oftener it took part, which says how fast it is whatever the arm.
- A device whose slowness changes (two-sided CUSUM) loses its offset; when half of the devices of a
  class changed, the class forgets and tries all arms again.

Guard rails: an arm is offered only if its modelled peak fits the device, and if asked for only if
its time keeps the pace of the fastest kind of device, since a round waits for all. One that failed
is in quarantine for its whole class (out of memory: every arm of that peak or more); a client that
failed gets next the arm that worked for it before, or the one of the smallest peak; only a share of
a round explores. Every client that has a feasible arm gets one, always.

Numpy only; the state is plain data that JSON holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from samara.data.draws import Draws, Purpose
from samara.federated.bandits import (
    FloatArray,
    Observation,
    Statistics,
    choose_arm,
    incumbent,
    kept,
    statistics,
)
from samara.federated.config import ConfiguratorConfig
from samara.train.layer_rates import Shape

Verdict = Literal["ok", "error", "timeout", "out_of_memory", "not_finite", "refused"]
Reason = Literal["first_try", "explore", "exploit", "after_failure", "all_quarantined"]

CLIENTS_OF_A_TREND = 3
TREND_MEMORY = 0.5
"""Weight of the newest round in the running trend."""
SMALLEST_TREND = 1e-300
"""Below it nobody gained: dividing by it would overflow."""
CHANGED_SHARE = 0.5
"""Of a class's devices; so many changes make the class try all arms again."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A mean drop rate and how it is spread over the depth."""

    rate: float
    shape: Shape

    @property
    def name(self) -> str:
        """For logs: ``0.5-incremental``."""
        return f"{self.rate:g}-{self.shape}" if self.rate else "0"


def make_arms(config: ConfiguratorConfig) -> tuple[Arm, ...]:
    """Every rate in every shape, and first the arm that drops nothing, once."""
    rates = sorted(rate for rate in config.rates if rate)
    dropping = [Arm(rate=rate, shape=shape) for rate in rates for shape in config.shapes]
    return (Arm(rate=0.0, shape="uniform"), *dropping)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A client that takes part in the coming round.

    Attributes:
        client: Its stable number.
        device_class: Whose statistics it shares.
        peaks: Modelled peak bytes of each arm on it.
        memory: Bytes that it may use.
        seconds: Modelled seconds of a batch by arm; empty: not asked for.
        most_seconds: That a batch should take, by ``ConfiguratorConfig.pace``.
    """

    client: int
    device_class: str
    peaks: Sequence[float]
    memory: float
    seconds: Sequence[float] = ()
    most_seconds: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The arm of one client in one round; None: no arm fits its memory, it sits out."""

    client: int
    arm: int | None
    reason: Reason | Literal["no_arm_fits"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a decision.

    Attributes:
        client, device_class, arm, peaks: As decided.
        verdict: ``refused``: the reply was not used, for what it held.
        gain: Fall of the validation loss by the local training; 0 on failure.
        cost: Seconds or joules of the round on the client, positive; unused on failure.
        accuracy_change: Of the client's validation rows.
        slowness: Seconds of compute over those that the cost model expected of an undisturbed
            device with that arm. Transfers left out, it does not depend on the arm.
    """

    client: int
    device_class: str
    arm: int
    peaks: Sequence[float]
    verdict: Verdict
    gain: float = 0.0
    cost: float = 1.0
    accuracy_change: float = 0.0
    slowness: float = 1.0


@dataclass(kw_only=True)
class _ClassState:
    """What a device class knows."""

    observations: list[Observation] = field(default_factory=list)
    trend: float = 0.0
    quarantine: dict[int, int] = field(default_factory=dict)
    """Arm -> the first round in which it may be offered again."""
    drops: dict[int, int] = field(default_factory=dict)
    """Arm -> falls of accuracy in a row."""
    devices: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    """Devices that changed since all arms were tried last."""
    since: int = 0
    """The round from which on it learns: exploration that dies down starts there again."""


@dataclass(kw_only=True)
class _DeviceState:
    """What is known of one device."""

    pulls: int = 0
    ratio_sum: float = 0.0
    worked: int | None = None
    """The newest arm that came back well."""
    failed: bool = False
    level: float | None = None
    """Log slowness that it is expected to have."""
    above: float = 0.0
    below: float = 0.0


class Configurator:
    """Chooses an arm for each client of a round, and learns from what came back.

    Attributes:
        arms: Of which it chooses; a decision is a position here.
        warnings: Of the newest choice, one line for each client whose class had no arm left.
    """

    def __init__(self, config: ConfiguratorConfig, *, seed: int) -> None:
        self.config, self.seed = config, seed
        self.arms = make_arms(config)
        self.warnings: list[str] = []
        self._classes: dict[str, _ClassState] = {}
        self._devices: dict[int, _DeviceState] = {}

    # --- choosing ---------------------------------------------------------------------------------

    def choose(self, round: int, candidates: Sequence[Candidate]) -> list[Decision]:
        """Choose for all clients of a round at once; the result is in the order of the clients.

        It depends on the state, the seed, the round and the set of clients alone.
        """
        self.warnings = []
        decisions: list[Decision] = []
        by_class: dict[str, list[Candidate]] = {}
        for candidate in sorted(candidates, key=lambda item: item.client):
            by_class.setdefault(candidate.device_class, []).append(candidate)
        for name in sorted(by_class):
            decisions += self._choose_in_class(round, name, by_class[name])
        return sorted(decisions, key=lambda item: item.client)

    def _choose_in_class(
        self, round: int, name: str, candidates: Sequence[Candidate]
    ) -> list[Decision]:
        state = self._class(name)
        known = self._statistics(state, round)
        pending = np.zeros(len(self.arms))
        allowed = max(1, math.floor(self.config.explore_share * len(candidates)))
        decisions = []
        for candidate in candidates:
            decision = self._choose_one(
                round, candidate, known, pending, state, may_explore=allowed > 0
            )
            if decision.reason in ("first_try", "explore"):
                allowed -= 1
            if decision.arm is not None:
                pending[decision.arm] += 1
            decisions.append(decision)
        return decisions

    def _choose_one(
        self,
        round: int,
        candidate: Candidate,
        known: Statistics,
        pending: FloatArray,
        state: _ClassState,
        *,
        may_explore: bool,
    ) -> Decision:
        client, device = candidate.client, self._device(candidate.client)
        feasible = self._feasible(candidate)
        if not feasible:
            return Decision(client=client, arm=None, reason="no_arm_fits")
        offered = [arm for arm in feasible if state.quarantine.get(arm, 0) <= round]
        if not offered:
            self.warnings.append(
                f"round {round}: every arm of device class '{candidate.device_class}' is in "
                f"quarantine; client {client} gets the safest one"
            )
            arm = self._safest(device, feasible, candidate.peaks)
            return Decision(client=client, arm=arm, reason="all_quarantined")
        if device.failed:
            arm = self._safest(device, offered, candidate.peaks)
            return Decision(client=client, arm=arm, reason="after_failure")
        best = incumbent(known, offered)
        if not may_explore:
            arm = self._safest(device, offered, candidate.peaks) if best is None else best
            return Decision(client=client, arm=arm, reason="exploit")
        draws = Draws(seed=self.seed, purpose=Purpose.ARM_CHOICE, draw=round, row=client)
        arm = choose_arm(
            self.config.policy,
            known,
            offered,
            pending=pending,
            age=round - state.since,
            draws=np.clip(draws.uniform(len(self.arms) + 1), 2.0**-53, 1 - 2.0**-53),
        )
        if known.count[arm] == 0:
            return Decision(client=client, arm=arm, reason="first_try")
        return Decision(client=client, arm=arm, reason="exploit" if arm == best else "explore")

    def _feasible(self, candidate: Candidate) -> list[int]:
        """Arms whose modelled peak fits, with a margin; of these the ones that keep the pace."""
        margin = 1 + self.config.memory_margin
        fit = [a for a, peak in enumerate(candidate.peaks) if peak * margin <= candidate.memory]
        if not fit or not candidate.seconds:
            return fit
        least = min(candidate.seconds[arm] for arm in fit)
        most = max(least, candidate.most_seconds)
        return [arm for arm in fit if candidate.seconds[arm] <= most]

    @staticmethod
    def _safest(device: _DeviceState, offered: Sequence[int], peaks: Sequence[float]) -> int:
        """What worked for the device last; else the smallest peak, the least dropping of equals."""
        if device.worked in offered:
            assert device.worked is not None
            return device.worked
        return min(offered, key=lambda arm: (peaks[arm], arm))

    def _statistics(self, state: _ClassState, round: int) -> Statistics:
        return statistics(
            state.observations,
            num_arms=len(self.arms),
            round=round,
            discount=self.config.discount,
        )

    # --- learning ---------------------------------------------------------------------------------

    def observe(self, round: int, outcomes: Sequence[Outcome]) -> None:
        """Learn from a round; the order of the outcomes does not matter."""
        by_class: dict[str, list[Outcome]] = {}
        for outcome in sorted(outcomes, key=lambda item: item.client):
            by_class.setdefault(outcome.device_class, []).append(outcome)
        for name in sorted(by_class):
            state = self._class(name)
            self._reward(round, state, by_class[name])
            for outcome in by_class[name]:
                self._guard(round, state, outcome)
                self._watch_speed(state, outcome)
            changed = len(set(state.changed))
            if changed and changed >= CHANGED_SHARE * len(state.devices):
                state.observations, state.changed, state.since = [], [], round + 1

    def _reward(self, round: int, state: _ClassState, outcomes: Sequence[Outcome]) -> None:
        """Turn gain per cost into rewards relative to the trend of the round."""
        relative = self._relative_means(state, round)
        came_back = [item for item in outcomes if item.verdict == "ok"]
        raw = np.array([max(0.0, item.gain) / item.cost for item in came_back], dtype=np.float64)
        expected = np.array([relative[item.arm] for item in came_back], dtype=np.float64)
        found = float(raw.sum() / expected.sum()) if came_back else 0.0
        if found > SMALLEST_TREND:
            running = TREND_MEMORY * found + (1 - TREND_MEMORY) * (state.trend or found)
            trend = found if len(came_back) >= CLIENTS_OF_A_TREND else running
            state.trend = running
        else:  # nobody gained: the round says nothing about any arm
            trend, raw = 1.0, expected
        for item, value, usual in zip(came_back, raw, expected, strict=True):
            device = self._device(item.client)
            reward = float(value) / trend
            state.observations.append(
                Observation(round=round, arm=item.arm, reward=reward / self._offset(device))
            )
            device.pulls += 1
            device.ratio_sum += reward / float(usual)
        state.observations += [
            Observation(round=round, arm=item.arm, reward=0.0)
            for item in outcomes
            if item.verdict != "ok"
        ]
        state.observations = kept(state.observations, self.config.policy)

    def _relative_means(self, state: _ClassState, round: int) -> FloatArray:
        """Discounted mean reward per arm on the scale of rewards; 1 where nothing is known."""
        totals, weights = np.zeros(len(self.arms)), np.zeros(len(self.arms))
        for item in state.observations:
            weight = self.config.discount ** (round - item.round)
            totals[item.arm] += weight * item.reward
            weights[item.arm] += weight
        # A trend is divided by these: an arm that has only failed must not make it infinite.
        return np.maximum(np.where(weights > 0, totals / np.where(weights > 0, weights, 1), 1), 0.1)

    def _offset(self, device: _DeviceState) -> float:
        """How this device's rewards compare with its class's, shrunk towards 1."""
        if device.pulls == 0:
            return 1.0
        belief = device.pulls / (device.pulls + self.config.offset_strength)
        return max(0.1, belief * device.ratio_sum / device.pulls + (1 - belief))

    def _guard(self, round: int, state: _ClassState, outcome: Outcome) -> None:
        """Put an arm that failed, or twice made a client worse, in quarantine."""
        device, until = self._device(outcome.client), round + 1 + self.config.quarantine_rounds
        device.failed = outcome.verdict != "ok"
        if outcome.verdict == "ok":
            device.worked = outcome.arm
            fell = outcome.accuracy_change < -self.config.accuracy_drop
            state.drops[outcome.arm] = state.drops.get(outcome.arm, 0) + 1 if fell else 0
            if state.drops[outcome.arm] >= 2:
                state.quarantine[outcome.arm] = until
                state.drops[outcome.arm] = 0
            return
        if device.worked == outcome.arm:
            device.worked = None
        state.quarantine[outcome.arm] = until
        if outcome.verdict == "out_of_memory":
            for arm, peak in enumerate(outcome.peaks):
                if peak >= outcome.peaks[outcome.arm]:
                    state.quarantine[arm] = until

    def _watch_speed(self, state: _ClassState, outcome: Outcome) -> None:
        """Two-sided CUSUM of the log slowness of a device."""
        device = self._device(outcome.client)
        if outcome.client not in state.devices:
            state.devices.append(outcome.client)
        if outcome.verdict != "ok":
            return
        value = math.log(outcome.slowness)
        if device.level is None:
            device.level = value
            return
        drift = self.config.change_drift
        device.above = max(0.0, device.above + value - device.level - drift)
        device.below = max(0.0, device.below + device.level - value - drift)
        if max(device.above, device.below) > self.config.change_threshold:
            device.level, device.above, device.below = value, 0.0, 0.0
            device.pulls, device.ratio_sum = 0, 0.0
            state.changed.append(outcome.client)

    # --- state ------------------------------------------------------------------------------------

    def _class(self, name: str) -> _ClassState:
        return self._classes.setdefault(name, _ClassState())

    def _device(self, client: int) -> _DeviceState:
        return self._devices.setdefault(client, _DeviceState())

    def best_arms(self, round: int) -> dict[str, str | None]:
        """Per device class the name of the arm of the best mean."""
        found: dict[str, str | None] = {}
        for name in sorted(self._classes):
            known = self._statistics(self._classes[name], round)
            best = incumbent(known, range(len(self.arms)))
            found[name] = None if best is None else self.arms[best].name
        return found

    def state(self) -> dict[str, Any]:
        """All that was learnt, as plain data."""
        return {
            "arms": [asdict(arm) for arm in self.arms],
            "classes": {name: asdict(self._classes[name]) for name in sorted(self._classes)},
            "devices": {
                str(client): asdict(self._devices[client]) for client in sorted(self._devices)
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave, also by way of JSON."""
        assert state["arms"] == [asdict(arm) for arm in self.arms], "the same arms"
        self._classes = {}
        for name, data in state["classes"].items():
            observations = [Observation(**item) for item in data["observations"]]
            numbered = {
                key: {int(arm): int(value) for arm, value in data[key].items()}
                for key in ("quarantine", "drops")
            }
            self._classes[name] = _ClassState(**{**data, "observations": observations, **numbered})
        self._devices = {
            int(client): _DeviceState(**data) for client, data in state["devices"].items()
        }
