"""Which part of the payload each client of a round gets, trains and sends.

Most methods: all of it. ``hetlora``: adapters of a rank that fits the device
(:mod:`samara.federated.mixed_ranks`). ``fedadapter``: adapters of the depth and width that its
trial group has (:mod:`samara.federated.depth_search`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from samara.federated.aggregation import Aggregate, Contribution, Layout, Tensor, aggregate
from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.messages import Instruction
from samara.federated.mixed_ranks import mean_over_ranks, ranks_of_devices, restored, truncate

Fits = Callable[[int, int], bool]
"""Whether a client's device has the memory to train so many layers."""

Losses = Callable[[Mapping[str, Tensor]], tuple[float, float]]
"""From values to what a comparison goes by, the larger the better."""


class Parts:
    """All clients work on everything."""

    def __init__(
        self, config: FederateConfig, *, layout: Layout, devices: Sequence[FederatedDevice]
    ) -> None:
        self.config, self.layout, self.devices = config, layout, devices

    def least_layers(self, usual: int) -> int:
        """Layers whose training a device must have the memory for, to be asked at all."""
        return usual

    def instruct(self, round: int, clients: Sequence[int], fits: Fits) -> dict[int, dict[str, Any]]:
        """What the instruction of each client says about its part."""
        del round, fits
        return {client: {} for client in clients}

    def given(
        self, instruction: Instruction, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The values that a client is sent."""
        del instruction
        return tensors

    def combine(
        self,
        tensors: Mapping[str, Tensor],
        contributions: Sequence[Contribution],
        asked: Mapping[int, Instruction],
        *,
        typical_change: float | None,
    ) -> Aggregate:
        """The values after a round."""
        del asked
        return aggregate(
            tensors,
            contributions,
            self.layout,
            max_change=self.config.server.max_change,
            typical_change=typical_change,
        )

    def settle(
        self,
        tensors: dict[str, Tensor],
        seconds: Mapping[int, float],
        asked: Mapping[int, Instruction],
        score: Losses,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The values to go on with after a round, and what to note of it in the log.

        Args:
            tensors: After the round.
            seconds: Of each client that replied, modelled.
            asked: Of every client.
            score: Scores values on the server's validation rows.
        """
        del seconds, asked, score
        return tensors, {}

    # --- state ------------------------------------------------------------------------------------

    def plain_state(self) -> dict[str, Any]:
        """What is remembered, without tensors."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are remembered."""
        return {}

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over what the two above gave."""
        assert not plain, "nothing is remembered here"
        del tensors


class RankParts(Parts):
    """Every client works on adapters of the rank of its device."""

    def __init__(
        self, config: FederateConfig, *, layout: Layout, devices: Sequence[FederatedDevice]
    ) -> None:
        super().__init__(config, layout=layout, devices=devices)
        self.ranks = ranks_of_devices(config.mixed_ranks, devices, rank=config.lora.rank)

    def instruct(self, round: int, clients: Sequence[int], fits: Fits) -> dict[int, dict[str, Any]]:
        """See :class:`Parts`."""
        del round, fits
        return {c: {"lora_rank": self.ranks[self.devices[c].name]} for c in clients}

    def given(
        self, instruction: Instruction, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """See :class:`Parts`."""
        assert instruction.lora_rank is not None
        return truncate(tensors, instruction.lora_rank)

    def combine(
        self,
        tensors: Mapping[str, Tensor],
        contributions: Sequence[Contribution],
        asked: Mapping[int, Instruction],
        *,
        typical_change: float | None,
    ) -> Aggregate:
        """See :class:`Parts`."""
        return combine_ranks(
            tensors,
            contributions,
            asked,
            self.layout,
            missing=self.config.mixed_ranks.missing,
            max_change=self.config.server.max_change,
            typical_change=typical_change,
        )


def combine_ranks(
    tensors: Mapping[str, Tensor],
    contributions: Sequence[Contribution],
    asked: Mapping[int, Instruction],
    layout: Layout,
    *,
    missing: str,
    max_change: float | None,
    typical_change: float | None,
    others: Sequence[float] = (),
) -> Aggregate:
    """:func:`~samara.federated.aggregation.aggregate` of clients of several ranks.

    Args:
        tensors: The server's values.
        contributions: As they came.
        asked: Says the rank of each client.
        layout: What there is.
        missing: See :mod:`samara.federated.mixed_ranks`.
        max_change: A reply that moved more than so many times the median reply is refused.
        typical_change: Of an earlier round.
        others: Changes of replies of this round that are averaged elsewhere.
    """
    ranks = {c: rank for c, own in asked.items() if (rank := own.lora_rank) is not None}
    return aggregate(
        tensors,
        whole_parts(tensors, contributions, asked),
        layout,
        max_change=max_change,
        typical_change=typical_change,
        average=functools.partial(mean_over_ranks, ranks=ranks, missing=missing),
        others=others,
    )


def whole_parts(
    tensors: Mapping[str, Tensor],
    contributions: Sequence[Contribution],
    asked: Mapping[int, Instruction],
) -> list[Contribution]:
    """The clients' parts, filled up with the server's values."""
    found = []
    for item in contributions:
        rank = asked[item.client].lora_rank
        assert rank is not None
        found.append(restored(item, rank=rank, previous=tensors))
    return found
