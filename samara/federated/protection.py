"""The server's side of privacy: whom it draws, what it makes of vectors, and what it releases.

Client-level differential privacy (McMahan et al., ICLR 2018). Each client joins a round by itself
with probability q = per_round / clients; who was drawn is secret. Its change over *all* trained
tensors, 0 where it sent nothing, is clipped to C as one vector. To the sum goes noise of standard
deviation sigma · C, also in a round that nobody joined. The mean divides by q · clients, which is
known beforehand. So the new values are a Gaussian mechanism and nothing else: no weights by
examples, no mean over who sent a layer, no reply judged by the others.

Everything else that is written for others is worked out from those values, the recipe and the
server's own rows; what is not goes to ``unprotected/`` and stays with who runs the server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from samara.federated.accounting import Budget, Entry, make_budget, require_round
from samara.federated.aggregation import HEAD, Aggregate, Layout, Tensor, malformed
from samara.federated.aggregation import Contribution as Sent
from samara.federated.config import FederateConfig
from samara.federated.fixed_point import (
    Grid,
    IntVector,
    group_names,
    length,
    make_grid,
    split,
)
from samara.federated.messages import Reply
from samara.federated.randomness import Secrets, Stream
from samara.federated.secure_round import SecureSum
from samara.federated.sharing import SharingAudit

CLOSED = (
    "num_examples",
    "loss_before",
    "loss_after",
    "accuracy_before",
    "accuracy_after",
    "personal_layers",
    "measured_cpu_seconds",
)
"""What a client's record does not hold: its reply said nothing of the kind."""
RELEASED = (
    "step",
    "validation_loss",
    "validation_accuracy",
    "rolled_back",
    "best_arms",
    "warnings",
    "privacy",
)
"""Of a round, under client-level privacy: all follows from protected values."""


class Protection:
    """What the server does for privacy.

    Attributes:
        budget: Of the clients; None: not promised.
        population: Mean importance per layer over the newest secure sum.
        epsilons: Client -> what its rows' budget has spent, where it says so.
    """

    def __init__(
        self, config: FederateConfig, *, layout: Layout, num_clients: int, secrets: Secrets
    ) -> None:
        """Start.

        Raises:
            ConfigError: If the budget does not suffice for a round.
        """
        self.config, self.privacy, self.layout = config, config.privacy, layout
        self.num_clients, self._secrets = num_clients, secrets
        self.rate = min(1.0, config.clients.per_round / num_clients)
        self.population: tuple[float, ...] = ()
        self.epsilons: dict[int, float] = {}
        self._past: list[Entry] = []
        self._since = 0
        self.budget: Budget | None = None
        if self.privacy.client is not None:
            self.budget = make_budget(
                self.privacy.client,
                rate=self.rate,
                steps=1,
                rounds=config.server.rounds,
                key="privacy.client",
            )
            require_round([self.budget], key="privacy.client")
        self._grid: Grid | None = None
        if self.privacy.sums_vectors:
            self._grid = make_grid(config, num_clients)

    def kinds(self) -> list[str]:
        """What is promised: a run does not go on with other promises than it began with."""
        names = ("client", "records", "secure_sum")
        return [name for name in names if getattr(self.privacy, name) is not None]

    def allows(self, round: int) -> bool:
        """Whether the round may be run: afterwards the budget must not be passed."""
        rounds = round + 1 - self._since
        return self.budget is None or self.budget.allows(rounds, past=self._past)

    def draw(self, available: Sequence[int], round: int) -> list[int] | None:
        """Each available client by itself, or not; None where no privacy rests on it."""
        if self.budget is None:
            return None
        stream = Stream(self._secrets.server(), f"clients-{round}")
        joins = stream.uniform(self.num_clients) <= self.rate
        return [client for client in available if joins[client]]

    # --- the sum ----------------------------------------------------------------------------------

    def aggregate(
        self,
        previous: Mapping[str, Tensor],
        replies: Sequence[Reply],
        secure: SecureSum | None,
        round: int,
    ) -> Aggregate:
        """The new values of a round whose clients' changes are summed as vectors.

        Args:
            previous: The server's values.
            replies: Those that may be used; of a secure sum they are masked.
            secure: The sum, where clients mask what they send.
            round: The present one.
        """
        assert self._grid is not None
        refused: dict[int, str] = {}
        total: IntVector | None = None
        clients: tuple[int, ...] = ()
        if self.privacy.secure_sum is not None:
            assert secure is not None, "the driver asks for it"
            total, clients = secure.total, secure.clients
            refused = {r.client: secure.problem for r in replies if r.client not in clients}
        else:
            total, clients = self._plain_sum(previous, replies, refused)
        if self.privacy.client is not None:
            tensors = self._noisy_mean(previous, total, round)
            # Everybody: who sent nothing counts as zeros, in a round that nobody joined too.
            everybody = tuple(range(self.num_clients))
            senders = dict.fromkeys(group_names(self.layout), everybody)
        elif total is None:
            tensors, senders = dict(previous), dict.fromkeys(group_names(self.layout), ())
        else:
            tensors, senders = self._weighted_mean(previous, total, clients)
        return Aggregate(tensors=tensors, senders=senders, refused=refused)

    def _plain_sum(
        self, previous: Mapping[str, Tensor], replies: Sequence[Reply], refused: dict[int, str]
    ) -> tuple[IntVector, tuple[int, ...]]:
        """Of clients that sent their values in the clear, clipped here."""
        assert self._grid is not None
        total, clients = np.zeros(length(self.layout), dtype=np.int64), []
        for reply in sorted(replies, key=lambda own: own.client):
            sent = Sent(client=reply.client, weight=1, tensors=reply.tensors)
            problem = malformed(sent, self.layout)
            if problem is not None:
                refused[reply.client] = problem
                continue
            total += self._grid.encode(self._grid.change(reply.tensors, previous, self.layout))
            clients.append(reply.client)
        return total, tuple(clients)

    def _noisy_mean(
        self, previous: Mapping[str, Tensor], total: IntVector | None, round: int
    ) -> dict[str, Tensor]:
        assert self._grid is not None
        assert self.budget is not None
        size = length(self.layout)
        exact = np.zeros(size, dtype=np.int64) if total is None else total
        content = hashlib.sha256(exact.tobytes())
        for name in self.layout.shapes:
            content.update(previous[name].tobytes())
        stream = Stream(self._secrets.server(), f"noise-{round}-{content.hexdigest()}")
        deviation = self.budget.noise_multiplier * self._grid.units
        noise = np.rint(deviation * stream.normal(size)).astype(np.int64)
        mean = self._grid.decode(exact + noise) / (self.rate * self.num_clients)
        return self._moved(previous, split(mean, self.layout))

    def _weighted_mean(
        self, previous: Mapping[str, Tensor], total: IntVector, clients: tuple[int, ...]
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        """Per group over who shared it, as far as the sum tells: their weight, not who they are."""
        assert self._grid is not None
        size, groups = length(self.layout), group_names(self.layout)
        changes = split(self._grid.decode(total[:size]), self.layout)
        shares = self._grid.decode_shares(total[size:])
        weights = dict(zip(groups, shares[: len(groups)].tolist(), strict=True))
        importance, seen = shares[len(groups) : -1], float(shares[-1])
        if seen > 0:
            self.population = tuple((importance / seen).tolist())
        means = {
            name: changes[name] / weights[group] if weights[group] > 0 else 0 * changes[name]
            for name, group in self.layout.groups.items()
        }
        senders = {group: clients if weights[group] > 0 else () for group in groups}
        return self._moved(previous, means), senders

    @staticmethod
    def _moved(previous: Mapping[str, Tensor], changes: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: (previous[name].astype(np.float64) + change).astype(np.float32)
            for name, change in changes.items()
        }

    # --- what is released -------------------------------------------------------------------------

    def summary(self, rounds: int) -> dict[str, Any]:
        """What is promised and what of it is spent, after so many rounds."""
        found: dict[str, Any] = {"randomness": self.privacy.randomness}
        if self.budget is not None:
            found["client"] = {
                "epsilon": self.budget.spent(rounds - self._since, past=self._past),
                "delta": self.budget.delta,
                "budget": self.budget.epsilon,
                "noise_multiplier": self.budget.noise_multiplier,
                "rate": self.rate,
                "clip": self.privacy.clip,
            }
        if self.privacy.records is not None:
            known = list(self.epsilons.values())
            promise = self.privacy.records
            found["records"] = {"delta": promise.delta, "budget": promise.epsilon}
            if self.budget is None and self.privacy.secure_sum is None:
                found["records"]["epsilon_largest"] = max(known, default=0.0)
        if self.privacy.secure_sum is not None:
            found["secure_sum"] = {"threshold": self.privacy.secure_sum.threshold}
        return found

    def note(
        self, replies: Sequence[Reply], result: Aggregate, audit: SharingAudit, round: int
    ) -> None:
        """Remember what clients say of their budgets, and which layers came from anybody."""
        for reply in replies:
            if reply.epsilon is not None:
                self.epsilons[reply.client] = reply.epsilon
        for group, senders in result.senders.items():
            if senders and group != HEAD:
                audit.last_shared[int(group)] = round

    def public_record(
        self, record: Mapping[str, Any], expected: Mapping[str, float]
    ) -> dict[str, Any]:
        """A round's record as it may be released.

        Args:
            record: All of it.
            expected: What such a round costs on average over who may be drawn.
        """
        if self.budget is not None:
            rounds = record["step"]
            known = {name: record[name] for name in RELEASED if name in record}
            return {**known, **{name: rounds * value for name, value in expected.items()}}
        clients = [
            {name: value for name, value in own.items() if name not in CLOSED}
            for own in record.get("clients", [])
        ]
        return {**record, "clients": clients} if "clients" in record else dict(record)

    def public_results(
        self, results: Mapping[str, Any], expected: Mapping[str, float], rounds: int
    ) -> dict[str, Any]:
        """``results.json`` as it may be released: nothing that was scored on clients' rows."""
        found = {**results, "clients": {"number": self.num_clients}}
        if self.budget is not None:
            del found["measured"]
            costs = {name: rounds * value for name, value in expected.items()}
            modelled = results["modelled"]
            kept = ("peak_bytes_full_depth", "clock", "devices")
            found["modelled"] = {
                "seconds": costs["modelled_seconds"],
                "client_seconds": costs["modelled_client_seconds"],
                "joules": costs["modelled_joules"],
                "bytes_down": costs["bytes_down"],
                "bytes_up": costs["bytes_up"],
                **{name: modelled[name] for name in kept},
            }
        return found

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "population": list(self.population),
            "epsilons": {str(client): self.epsilons[client] for client in sorted(self.epsilons)},
            "noise_multiplier": self.budget.noise_multiplier if self.budget else None,
            "rate": self.rate,
            "since": self._since,
            "past": [list(entry) for entry in self._past],
        }

    def restore(self, state: Mapping[str, Any], round: int) -> None:
        """Take over what :meth:`state` gave, also by way of JSON.

        Args:
            state: What it gave.
            round: The next one; those before it stay charged with the noise that they had.
        """
        self.population = tuple(state["population"])
        self.epsilons = {int(client): value for client, value in state["epsilons"].items()}
        if self.budget is None:
            return
        assert self.privacy.client is not None
        before, noise = state["noise_multiplier"], self.privacy.client.noise_multiplier
        if noise is None and before is not None:
            # It was settled for all rounds then wanted, and holds for what is left of the budget.
            self.budget = replace(self.budget, noise_multiplier=before)
        self._past = [(own[0], own[1], own[2]) for own in state["past"]]
        self._since = state["since"]
        if before is not None and (before, state["rate"]) != self.budget.entry(1)[:2]:
            self._past.append((before, state["rate"], round - self._since))
            self._since = round
