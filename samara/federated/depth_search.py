"""Adapters whose depth and width grow by trials, after FedAdapter (arXiv 2205.10162).

Training begins with small adapters in the few uppermost layers; everything below runs forward only
and keeps nothing for backward. The clients of a round are dealt to three trial groups: one goes on
with the present configuration (*stay*), one has adapters in more layers (*deeper*), one has wider
adapters (*wider*). After some rounds of the first the best of the three, by the server's validation
accuracy, is the present configuration, and the next trial begins.

The groups have equal time on the virtual clock rather than equal rounds: a group that is ahead of
the first one's clock waits, so that larger adapters, whose rounds last longer, do fewer.

Ours: adapters are LoRA of one largest rank, of which a width uses the first rows (see
:mod:`samara.federated.mixed_ranks`), steps are added layers and a factor of the width, and the
comparison falls back on the validation loss where accuracy is equal or there is none. Not here: the
cache of what the frozen layers compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from samara.errors import ConfigError
from samara.federated.aggregation import HEAD, Aggregate, Contribution, Layout, Tensor, changes_of
from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.messages import Instruction
from samara.federated.mixed_ranks import truncate
from samara.federated.parts import Fits, Losses, Parts, combine_ranks, whole_parts
from samara.federated.server_optimizers import strip

STAY, DEEPER, WIDER = "stay", "deeper", "wider"


@dataclass(frozen=True, kw_only=True)
class Group:
    """A trial group.

    Attributes:
        name: ``stay``, ``deeper`` or ``wider``.
        depth: Upper layers that have adapters.
        rank: Their width.
        seconds: What its rounds lasted in this trial, modelled.
        rounds: Of this trial.
    """

    name: str
    depth: int
    rank: int
    seconds: float = 0.0
    rounds: int = 0


class DepthParts(Parts):
    """Every client works on adapters of the depth and width of its trial group.

    Attributes:
        groups: Of the present trial; the first is ``stay``, whose values are the server's.
    """

    def __init__(
        self, config: FederateConfig, *, layout: Layout, devices: Sequence[FederatedDevice]
    ) -> None:
        """Begin with the smallest adapters.

        Raises:
            ConfigError: If they are deeper than the model or wider than all of them.
        """
        super().__init__(config, layout=layout, devices=devices)
        search, most = config.depth_search, config.lora.rank
        rank = search.rank or max(1, most // 4)
        if search.depth > layout.num_layers:
            raise ConfigError(
                f"depth_search.depth: {search.depth} wanted, the model has {layout.num_layers} "
                "layers; lower it"
            )
        if rank > most:
            raise ConfigError(
                f"depth_search.rank: {rank} is more than lora.rank {most}, the largest width; "
                "lower it, or raise lora.rank"
            )
        self.groups = self._trial(search.depth, rank)
        self._values: dict[str, dict[str, Tensor]] = {}

    def _trial(self, depth: int, rank: int) -> tuple[Group, ...]:
        """The groups of a trial that begins; what cannot grow has no group."""
        search, layers = self.config.depth_search, self.layout.num_layers
        deeper = min(layers, depth + search.depth_step)
        wider = min(self.config.lora.rank, rank * search.rank_factor)
        wanted = [(STAY, depth, rank), (DEEPER, deeper, rank), (WIDER, depth, wider)]
        return tuple(
            Group(name=name, depth=own, rank=width)
            for name, own, width in wanted
            if name == STAY or (own, width) != (depth, rank)
        )

    def least_layers(self, usual: int) -> int:
        """See :class:`~samara.federated.parts.Parts`."""
        del usual
        return self.groups[0].depth

    def instruct(self, round: int, clients: Sequence[int], fits: Fits) -> dict[int, dict[str, Any]]:
        """See :class:`~samara.federated.parts.Parts`; whom a group is too deep for, stays."""
        stay = self.groups[0]
        taking_part = [own for own in self.groups if own.seconds <= stay.seconds]
        found = {}
        for place, client in enumerate(clients):
            group = taking_part[(place + round) % len(taking_part)]
            if not fits(client, group.depth):
                group = stay
            found[client] = {
                "group": group.name,
                "trained_layers": group.depth,
                "lora_rank": group.rank,
            }
        return found

    def given(
        self, instruction: Instruction, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """See :class:`~samara.federated.parts.Parts`."""
        assert instruction.lora_rank is not None
        assert instruction.trained_layers is not None
        known = self._values.get(instruction.group, tensors)
        lowest = self.layout.num_layers - instruction.trained_layers
        groups = self.layout.groups
        upper = {n: known[n] for n in groups if groups[n] == HEAD or int(groups[n]) >= lowest}
        return truncate(upper, instruction.lora_rank)

    def combine(
        self,
        tensors: Mapping[str, Tensor],
        contributions: Sequence[Contribution],
        asked: Mapping[int, Instruction],
        *,
        typical_change: float | None,
    ) -> Aggregate:
        """See :class:`~samara.federated.parts.Parts`: each group's clients by themselves.

        Whether one moved too much is judged by the median of all groups: one alone has few.
        """
        known = {group.name: self._values.get(group.name, tensors) for group in self.groups}
        own = {
            name: [item for item in contributions if asked[item.client].group == name]
            for name in known
        }
        moved = {
            name: changes_of(values, whole_parts(values, own[name], asked), self.layout)
            for name, values in known.items()
        }
        results = {
            name: combine_ranks(
                values,
                own[name],
                asked,
                self.layout,
                missing="leave_out",
                max_change=self.config.server.max_change,
                typical_change=typical_change,
                others=[c for other in moved if other != name for c in moved[other]],
            )
            for name, values in known.items()
        }
        for group in self.groups[1:]:
            self._values[group.name] = results[group.name].tensors
        every = [result.senders for result in results.values()]
        refused = {c: why for result in results.values() for c, why in result.refused.items()}
        return replace(
            results[STAY],
            senders={g: tuple(sorted(c for sent in every for c in sent[g])) for g in every[0]},
            refused=dict(sorted(refused.items())),
        )

    def settle(
        self,
        tensors: dict[str, Tensor],
        seconds: Mapping[int, float],
        asked: Mapping[int, Instruction],
        score: Losses,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See :class:`~samara.federated.parts.Parts`: count, and compare when it is time."""
        counted = []
        for group in self.groups:
            own = [s for client, s in sorted(seconds.items()) if asked[client].group == group.name]
            has_run = any(entry.group == group.name for entry in asked.values())
            counted.append(
                replace(
                    group,
                    seconds=group.seconds + max(own, default=0.0),
                    rounds=group.rounds + has_run,
                )
            )
        self.groups = tuple(counted)
        noted: dict[str, Any] = {"groups": [asdict(group) for group in self.groups]}
        if self.groups[0].rounds < self.config.depth_search.trial_rounds or len(self.groups) == 1:
            return tensors, noted
        values = {group.name: self._values.get(group.name, tensors) for group in self.groups}
        scores = {name: score(own) for name, own in values.items()}
        best = max(self.groups, key=lambda group: scores[group.name])  # of equals the smallest
        noted["best"] = best.name
        self.groups, self._values = self._trial(best.depth, best.rank), {}
        return values[best.name], noted

    # --- state ------------------------------------------------------------------------------------

    def plain_state(self) -> dict[str, Any]:
        """See :class:`~samara.federated.parts.Parts`."""
        return {"groups": [asdict(group) for group in self.groups]}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`~samara.federated.parts.Parts`."""
        return {
            f"group.{group}/{name}": value
            for group, own in self._values.items()
            for name, value in own.items()
        }

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :class:`~samara.federated.parts.Parts`."""
        self.groups = tuple(Group(**group) for group in plain["groups"])
        named = {group.name: strip(f"group.{group.name}/", tensors) for group in self.groups}
        self._values = {name: own for name, own in named.items() if own}
