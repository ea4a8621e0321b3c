"""Devices of the clients: profiles, what a local training costs on them, and when they fail.

Nothing here reads a clock. A *cost model* says what a batch costs by the number of active layers,
fixed + layers · per layer; it is measured on this machine (:mod:`samara.federated.calibration`) or
given. The *virtual clock* turns the layers that were in fact drawn and the bytes that were in fact
sent into seconds and joules of a device; a synchronous round lasts as long as its slowest client.
Whatever comes from a profile is labelled modelled.

Whether a client can be reached, or fails, is a function of seed, client and round: it does not
depend on what happened before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from samara.config import load_yaml, validate
from samara.data.draws import Draws, Purpose
from samara.errors import ConfigError, did_you_mean
from samara.federated.config import DeviceShare, FederatedDevice

PROFILES = Path(__file__).parent / "profiles"

FORWARD_SHARE = 0.5
"""Of a layer's time in training."""

Basis = Literal["measured", "modelled"]


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a training batch costs with k active layers, on the reference device.

    Attributes:
        seconds_fixed, seconds_per_layer: Of compute.
        bytes_fixed, bytes_per_layer: Of memory at the peak.
        r_squared: Of the fit of the seconds; None: not fitted.
        basis: ``measured`` on this machine, or ``modelled`` from given figures.
        source: How, or from where.
    """

    seconds_fixed: float
    seconds_per_layer: float
    bytes_fixed: float
    bytes_per_layer: float
    r_squared: float | None
    basis: Basis
    source: str

    def batch_seconds(self, active_layers: float) -> float:
        """Seconds of a batch."""
        return self.seconds_fixed + active_layers * self.seconds_per_layer

    def peak_bytes(self, active_layers: float) -> float:
        """Bytes at the peak of a batch."""
        return self.bytes_fixed + active_layers * self.bytes_per_layer

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """Read what :meth:`to_dict` gave."""
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class ClientCost:
    """What one client's part in a round costs; modelled.

    Attributes:
        compute_seconds, communicate_seconds: Their sum is the client's time.
        joules: Of both.
        slowness: The compute time over that of the same device undisturbed.
        bytes_down, bytes_up: Of the messages; these are counted, not modelled.
    """

    compute_seconds: float
    communicate_seconds: float
    joules: float
    slowness: float
    bytes_down: int
    bytes_up: int

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.communicate_seconds


def by_trained_layers(costs: CostModel, num_layers: int) -> CostModel:
    """The cost of a batch that runs all layers, by the number of those that are trained.

    A frozen layer runs forward, which is taken for half of its time (with LoRA 0.48 was measured,
    on a CPU), and keeps nothing for backward.
    """
    half = costs.seconds_per_layer * FORWARD_SHARE
    return replace(
        costs,
        seconds_fixed=costs.seconds_fixed + num_layers * half,
        seconds_per_layer=costs.seconds_per_layer - half,
        source=f"{costs.source}; a frozen layer counted as {FORWARD_SHARE:g} of a trained one",
    )


def client_cost(
    device: FederatedDevice,
    costs: CostModel,
    *,
    active_layers: Sequence[int],
    bytes_down: int,
    bytes_up: int,
    round: int,
) -> ClientCost:
    """Seconds and joules of a local training on a device.

    Args:
        device: The client's.
        costs: Of a batch on the reference device.
        active_layers: Of each batch, as drawn.
        bytes_down: Of the message to the client.
        bytes_up: Of its reply.
        round: For changes of the device's speed.
    """
    undisturbed = device.slowness * sum(costs.batch_seconds(count) for count in active_layers)
    compute = undisturbed * speed_factor(device, round)
    communicate = (
        bytes_down / device.download_bytes_per_second + bytes_up / device.upload_bytes_per_second
    )
    return ClientCost(
        compute_seconds=compute,
        communicate_seconds=communicate,
        joules=compute * device.compute_watts + communicate * device.communicate_watts,
        slowness=compute / undisturbed if undisturbed > 0 else 1.0,
        bytes_down=bytes_down,
        bytes_up=bytes_up,
    )


def speed_factor(device: FederatedDevice, round: int) -> float:
    """The product of the changes up to a round."""
    factors = [change.factor for change in device.slowness_changes if change.round <= round]
    return float(np.prod(factors)) if factors else 1.0


def is_available(device: FederatedDevice, *, seed: int, client: int, round: int) -> bool:
    """Whether a client can be asked in a round."""
    if device.availability == 1:  # nothing to draw, of thousands of clients in each round
        return True
    return bool(_trace(seed, client, round)[0] < device.availability)


def fails(device: FederatedDevice, *, seed: int, client: int, round: int) -> bool:
    """Whether a client that was asked sends no reply."""
    return bool(_trace(seed, client, round)[1] < device.failure_probability)


def _trace(seed: int, client: int, round: int) -> tuple[float, float]:
    draws = Draws(seed=seed, purpose=Purpose.CLIENT_TRACE, draw=round, row=client).uniform(2)
    return float(draws[0]), float(draws[1])


def assign_devices(
    shares: Sequence[DeviceShare], *, num_clients: int, seed: int
) -> list[FederatedDevice]:
    """The device of each client: as many of each as the shares say, dealt out at random.

    Raises:
        ConfigError: If a profile does not exist or is not one, or two have one name.
    """
    devices = [federated_device(entry.profile) for entry in shares]
    names = [device.name for device in devices]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"devices: '{name}' is named twice; give it one entry with its share")
    total = sum(entry.share for entry in shares)
    ends = np.cumsum([entry.share / total for entry in shares]) * num_clients
    counts = np.diff(np.floor(ends + 0.5).astype(int), prepend=0)
    dealt = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    order = Draws(seed=seed, purpose=Purpose.CLIENT_TRACE, draw=2**63).permutation(num_clients)
    return [dealt[place] for place in order]


def federated_device(name: str) -> FederatedDevice:
    """A device by the name of a built-in profile, or by the path of a YAML file.

    Raises:
        ConfigError: If there is no such profile or file, or the file is not a profile.
    """
    if Path(name).suffix in {".yaml", ".yml"}:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such file; give a device of clients in YAML")
        return validate(FederatedDevice, load_yaml(Path(name)), path=name)
    names = built_in_devices()
    if name not in names:
        raise ConfigError(
            f"devices: '{name}' is not built in{did_you_mean(name, names)}; or give the path of a "
            ".yaml file"
        )
    return _built_in(name)


def built_in_devices() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


@functools.cache
def _built_in(name: str) -> FederatedDevice:
    return validate(FederatedDevice, load_yaml(PROFILES / f"{name}.yaml"), path=name)
