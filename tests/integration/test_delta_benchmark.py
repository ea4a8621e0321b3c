"""The size that delta files are made for, and the benchmark that measures it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark_delta() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("benchmark_delta", ROOT / "benchmarks/delta.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("sigma", "limit"), [(1e-4, 2.2), (3e-4, 2.2), (1e-3, 2.2), (3e-3, 2.6), (1e-2, 2.6)]
)
def test_half_a_percent_of_a_bfloat16_matrix_takes_so_many_bytes_each(
    benchmark_delta, sigma, limit
):
    """Bytes of the whole file per changed weight: 2.2 for small updates, 2.6 for large ones."""
    assert benchmark_delta.measure_size("ulp", 0.005, sigma, side=4096).bytes_per_nonzero <= limit


def test_the_smoke_run_measures_sizes_and_times(benchmark_delta, tmp_path, capsys):
    benchmark_delta.main(["--smoke", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert {row["mode"] for row in written["sizes"]} == set(benchmark_delta.MODES)
    assert set(written["times"]["seconds"]) == {"load", "apply", "swap", "revert", "identity"}
    assert written["environment"]["commit"]
    assert written["command"].startswith("python benchmarks/delta.py --smoke")
    assert "weights," in capsys.readouterr().out
