from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samara.errors import ResourceError
from samara.train import memory
from samara.train.memory import PeakMemory, available_memory, check_memory

CPU = torch.device("cpu")
MEGABYTE = 2**20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc and /sys: 8 GB available, no container limit."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", "MemTotal: 9000000 kB\nMemAvailable:  8000000 kB\n")
    return tmp_path


def limit(machine: Path, *, limit: str, used: int, cache: int) -> None:
    write(machine / "cgroup" / "memory.max", f"{limit}\n")
    write(machine / "cgroup" / "memory.current", f"{used}\n")
    write(machine / "cgroup" / "memory.stat", f"anon 5\ninactive_file {cache}\n")


def test_available_is_what_the_kernel_says(machine: Path) -> None:
    assert available_memory(CPU) == 8_000_000 * 1024


def test_a_container_limit_counts(machine: Path) -> None:
    limit(machine, limit="3000", used=2000, cache=500)

    assert available_memory(CPU) == 1500


def test_a_container_without_limit_does_not(machine: Path) -> None:
    limit(machine, limit="max", used=2000, cache=500)

    assert available_memory(CPU) == 8_000_000 * 1024


def test_an_unknown_system_refuses_nothing(machine: Path) -> None:
    (machine / "proc" / "meminfo").unlink()

    assert available_memory(CPU) is None
    check_memory(predicted=10**15, device=CPU)


def test_too_much_is_refused_with_both_figures_and_the_remedy(machine: Path) -> None:
    check_memory(predicted=8_000_000 * 1024, device=CPU)

    with pytest.raises(ResourceError) as caught:
        check_memory(predicted=12_345_000_000, device=CPU)

    text = str(caught.value)
    assert "needs about 12.3 GB, cpu has 8.2 GB available" in text
    assert "training.micro_batch_size" in text
    assert "training.activation_checkpointing: layer" in text


def test_real_machine_has_memory() -> None:
    available = available_memory(CPU)

    assert available is None or available > 0


def test_peak_sees_a_large_tensor_that_is_gone() -> None:
    meter = PeakMemory(CPU)
    torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    peak = meter.peak()

    assert 60 * MEGABYTE < peak < 200 * MEGABYTE


def test_peak_of_a_second_run_in_one_process_is_as_large() -> None:
    def run() -> int:
        meter = PeakMemory(CPU)
        kept = [torch.ones(MEGABYTE // 4) for _ in range(64)]  # small enough for glibc to keep
        del kept
        return meter.peak()

    first, second = run(), run()

    assert second == pytest.approx(first, rel=0.25)
    assert second > 60 * MEGABYTE


def test_peak_starts_anew(machine: Path) -> None:
    write(machine / "proc/self/status", "VmHWM:\t  900 kB\nVmRSS:\t  300 kB\n")
    meter = PeakMemory(CPU)

    assert (machine / "proc/self/clear_refs").read_text() == "5"
    assert meter.peak() == 600 * 1024
