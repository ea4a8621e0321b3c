"""What a version of a model costs to own, and what its gain is worth, at your own prices.

Total cost of a version: device-hours of selection, training and evaluation, the storage of its file
for as long as it is kept, and the device time that switching to it takes over its life. The return
is (gain in points x value of a point - cost) / cost, with the gain's interval carried through. The
prices are a YAML file; every figure is an estimate, as good as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeFloat, PositiveFloat

from samara.config import Config, load_yaml, validate
from samara.measure.compare import Interval

SECONDS_PER_HOUR = 3600


class Prices(Config):
    """What things cost where you are."""

    currency: str = "USD"
    device_hour: NonNegativeFloat
    """Hire of the device for an hour."""
    watts: NonNegativeFloat
    """What it draws under load."""
    kwh: NonNegativeFloat
    """A kilowatt-hour; 0 where the hire includes it."""
    storage_gigabyte_month: NonNegativeFloat
    """Keeping 10^9 bytes for a month."""
    copies: PositiveFloat = 1.0
    """Copies of each version's file that are kept."""
    months_kept: NonNegativeFloat
    """How long a version is kept, rollback included."""
    trials_per_version: PositiveFloat = 1.0
    """Training runs until a version is good enough, its own included."""
    switches_per_version: NonNegativeFloat
    """How often a serving device changes to the version during its life."""
    value_per_point: NonNegativeFloat
    """What one percentage point of the task's main score is worth during the version's life."""


@dataclass(frozen=True, kw_only=True)
class VersionCost:
    """Money for one version, by what it is spent on."""

    training: float
    evaluation: float
    storage: float
    switching: float

    @property
    def total(self) -> float:
        return math.fsum((self.training, self.evaluation, self.storage, self.switching))


def load_prices(path: Path) -> Prices:
    """Read a price file.

    Raises:
        ConfigError: If it is missing or no price file.
    """
    return validate(Prices, load_yaml(path), path=str(path))


def version_cost(
    prices: Prices,
    *,
    training_seconds: float,
    evaluation_seconds: float,
    storage_bytes: float,
    switch_seconds: float,
) -> VersionCost:
    """The cost of one version.

    Args:
        prices: What things cost.
        training_seconds: Of one training run, selection included.
        evaluation_seconds: Of scoring and audits.
        storage_bytes: What is stored for the version beside its base.
        switch_seconds: Of one change to it on a device that serves.
    """
    hour = prices.device_hour + prices.watts / 1000 * prices.kwh
    gigabyte_months = storage_bytes / 1e9 * prices.copies * prices.months_kept
    return VersionCost(
        training=prices.trials_per_version * training_seconds / SECONDS_PER_HOUR * hour,
        evaluation=prices.trials_per_version * evaluation_seconds / SECONDS_PER_HOUR * hour,
        storage=gigabyte_months * prices.storage_gigabyte_month,
        switching=prices.switches_per_version * switch_seconds / SECONDS_PER_HOUR * hour,
    )


def return_on_investment(gain: Interval, cost: VersionCost, prices: Prices) -> Interval | None:
    """The return on a version's cost; None where it costs nothing.

    Args:
        gain: Of the main score over the base model's, as a share (0.01 is a point).
        cost: Of the version.
        prices: What a point is worth.
    """
    if cost.total == 0:
        return None
    return gain.map(lambda share: (100 * share * prices.value_per_point - cost.total) / cost.total)
