"""Device profiles: what a device can do, draws and costs; the basis of MFU, time, energy and money.

A profile is a YAML file (:class:`samara.measure.config.DeviceProfile`). Some are built in
(``samara/measure/profiles``); a path names a file of one's own; ``auto`` finds the device that is
there. Energy and money that follow from a profile are estimates: nothing reads a power meter.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from samara.config import load_yaml, validate
from samara.errors import ConfigError, did_you_mean
from samara.measure.config import DeviceProfile
from samara.runs import cpu_name

if TYPE_CHECKING:
    import torch

PROFILES = Path(__file__).parent / "profiles"
ASSUMED_WATTS_PER_CORE = 10.0
ASSUMED_GPU_WATTS = 300.0
PROBE_SECONDS = 0.2
PROBE_SIZE = 512
GPU_PROBE_SIZE = 8192


@dataclass(frozen=True, kw_only=True)
class EstimatedCost:
    """Energy and money of a time on a device: estimated from its profile, not metered."""

    energy_kwh: float
    money: float
    currency: str

    @property
    def joules(self) -> float:
        return self.energy_kwh * 3.6e6


def estimated_cost(
    profile: DeviceProfile, *, seconds: float, num_devices: int = 1
) -> EstimatedCost:
    """Estimate energy and money: watts under load times the time, hours and kWh at their prices."""
    hours = num_devices * seconds / 3600
    energy_kwh = hours * profile.watts / 1000
    money = hours * profile.price_per_hour + energy_kwh * profile.price_per_kwh
    return EstimatedCost(energy_kwh=energy_kwh, money=money, currency=profile.currency)


def device_profile(name: str | Path, *, device: str = "auto") -> DeviceProfile:
    """Return a device profile.

    Args:
        name: A built-in profile, the path of a YAML file, or ``auto``: the GPU that is there, else
            the processor, whose peak is measured (under a second, once per process).
        device: For ``auto``: the device that is used, ``cpu``, ``cuda`` or ``auto`` (a GPU if there
            is one).

    Raises:
        ConfigError: If there is no such profile or file, or the file is not a profile.
    """
    text = str(name)
    if text == "auto":
        return _detect(device)
    if Path(text).suffix in {".yaml", ".yml"}:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give a device profile in YAML")
        return validate(DeviceProfile, load_yaml(path), path=text)
    names = built_in_profiles()
    if text not in names:
        hint = did_you_mean(text, ["auto", *names])
        raise ConfigError(
            f"device profile '{text}' is not built in{hint}; or give the path of a .yaml file"
        )
    return _built_in(text)


def peak_flops(
    profile: DeviceProfile, precision: Literal["float32", "bfloat16"], *, trained: str
) -> float:
    """FLOP/s of a device at a precision.

    Args:
        profile: The device.
        precision: What products run in.
        trained: What is trained so, for the message.

    Raises:
        ConfigError: If the profile does not say.
    """
    known = profile.peak_flops
    if precision not in known:
        raise ConfigError(
            f"device profile '{profile.name}': has no peak_flops for {precision}, in which "
            f"{trained} is trained; add it, or train in {next(iter(known), 'none')}"
        )
    return known[precision]


def built_in_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


@functools.cache
def _built_in(name: str) -> DeviceProfile:
    return validate(DeviceProfile, load_yaml(PROFILES / f"{name}.yaml"), path=name)


@functools.cache
def _detect(device: str) -> DeviceProfile:
    import torch

    kind = torch.device(device).type if device != "auto" else None
    if kind == "cuda" or (kind is None and torch.cuda.is_available()):
        found = torch.cuda.get_device_name()
        for name in built_in_profiles():
            if found in _built_in(name).cuda_names:
                return _built_in(name)
        return _measured_gpu(found)
    return _measured_cpu()


def _measured_cpu() -> DeviceProfile:
    import torch

    threads = torch.get_num_threads()
    return DeviceProfile(
        name=f"{cpu_name()}, {threads} {'thread' if threads == 1 else 'threads'}",
        peak_flops={
            "float32": _matmul_flops(torch.float32, torch.device("cpu"), PROBE_SIZE),
            "bfloat16": _matmul_flops(torch.bfloat16, torch.device("cpu"), PROBE_SIZE),
        },
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        watts=ASSUMED_WATTS_PER_CORE * threads,
        source=(
            f"measured: best {PROBE_SIZE}x{PROBE_SIZE} matrix product of this process; "
            f"assumed: {ASSUMED_WATTS_PER_CORE:.0f} W per thread, no hire"
        ),
    )


def _measured_gpu(name: str) -> DeviceProfile:
    import torch

    gpu = torch.device("cuda")
    return DeviceProfile(
        name=name,
        cuda_names=(name,),
        peak_flops={
            "float32": _matmul_flops(torch.float32, gpu, GPU_PROBE_SIZE),
            "bfloat16": _matmul_flops(torch.bfloat16, gpu, GPU_PROBE_SIZE),
        },
        memory_bytes=torch.cuda.get_device_properties(gpu).total_memory,
        watts=ASSUMED_GPU_WATTS,
        source=(
            f"measured: best {GPU_PROBE_SIZE}x{GPU_PROBE_SIZE} matrix product of this process; "
            f"assumed: {ASSUMED_GPU_WATTS:.0f} W, no hire"
        ),
    )


def _matmul_flops(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """FLOP/s of the fastest of the square products that fit in ``PROBE_SECONDS``."""
    import torch

    matrix = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    best = float("inf")
    finish = time.perf_counter() + PROBE_SECONDS
    while best == float("inf") or time.perf_counter() < finish:
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
