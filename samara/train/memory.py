"""Memory: what is available before training, and the peak while it runs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

from samara.errors import ResourceError

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on ``device``; None where the system does not say.

    CUDA: the free memory of the card. CPU: what the kernel calls available, or what is left of the
    container's limit if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    candidates = [_meminfo_available(), _cgroup_left()]
    known = [value for value in candidates if value is not None]
    return min(known) if known else None


def check_memory(*, predicted: int, device: torch.device) -> None:
    """Refuse to start what will not fit.

    Args:
        predicted: Peak bytes of training, :func:`samara.measure.memory.training_memory`.
        device: Where it is to run.

    Raises:
        ResourceError: If ``predicted`` exceeds what is available, with both and what to change.
    """
    available = available_memory(device)
    if available is not None and predicted > available:
        raise ResourceError(
            f"training needs about {_gigabytes(predicted)}, {device.type} has "
            f"{_gigabytes(available)} available; lower training.micro_batch_size, or set "
            "training.activation_checkpointing: layer"
        )


class PeakMemory:
    """The peak of memory since this meter was made.

    CUDA: bytes of tensors at their peak (``max_memory_allocated``). CPU: the peak of the process's
    resident memory above what it held at the start. For that, memory freed before goes back to the
    system first, or a second run in one process would look nearly free; and the kernel's high-water
    mark is reset, which Linux can: elsewhere an earlier, higher peak makes the figure too large.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = 0
        self.restart()
        if device.type != "cuda":
            self._start = _status("VmRSS") or 0

    def restart(self) -> None:
        """Forget the peak so far; it is still counted from where this meter was made."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _return_freed_memory()
            _reset_high_water_mark()

    def peak(self) -> int:
        """The peak so far, in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return max(0, _high_water_mark() - self._start)


def _return_freed_memory() -> None:
    """Drop garbage, and let glibc return the pages that it keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> None:
    with contextlib.suppress(OSError):
        (PROC / "self/clear_refs").write_text("5", encoding="ascii")


def _high_water_mark() -> int:
    mark = _status("VmHWM")
    if mark is not None:
        return mark
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(key: str) -> int | None:
    """A figure of /proc/self/status in bytes."""
    return _kilobytes(PROC / "self/status", key)


def _meminfo_available() -> int | None:
    return _kilobytes(PROC / "meminfo", "MemAvailable")


def _kilobytes(path: Path, key: str) -> int | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup_left() -> int | None:
    """What is left of the container's memory limit (cgroup 2); its page cache counts as free."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (CGROUP / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cache = re.search(r"^inactive_file (\d+)", statistics, flags=re.MULTILINE)
    return int(limit) - used + (int(cache[1]) if cache else 0)


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.1f} GB"
