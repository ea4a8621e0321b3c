"""The size that delta files are made for, and the benchmark that measures it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from samara.runs import write_json

from .test_finetune import METHODS, build, rows, run_one, settings

__all__ = ["rows"]  # the fixture


@pytest.fixture(scope="module")
def benchmark_delta(benchmark) -> Any:
    return benchmark("delta")


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


def test_real_changes_are_weighed_beside_pefts_own_file(
    benchmark, benchmark_delta, rows, tmp_path, capsys
):
    base = build("llama_bf16", tmp_path / "base")
    for method in ("sparse", "shira", "full"):
        config = settings(base, rows, "question", METHODS[method], training={"max_steps": 2})
        run_one(config, tmp_path / method)
    for name, value in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {"model_type": "any"})
        weights = {"w": torch.zeros(16, 8)}
        weights["w"].view(-1)[::4] = value
        save_file(weights, tmp_path / name / "model.safetensors")
    runs = [f"--run={tmp_path / method}" for method in ("sparse", "shira")]
    pair = ["--checkpoints", str(tmp_path / "a"), str(tmp_path / "b")]
    out = tmp_path / "delta-real.json"
    benchmark_delta.main([*runs, *pair, "--json", str(out), "--note", "Two steps each."])
    written = json.loads(out.read_text())
    sparse, shira, between = written["real"]
    assert sparse["file_bytes"] == (tmp_path / "sparse" / "delta.safetensors").stat().st_size
    assert sparse["adapter_bytes"] is None
    adapter = tmp_path / "shira" / "adapter" / "adapter_model.safetensors"
    assert shira["adapter_bytes"] == adapter.stat().st_size
    assert 0 < shira["nnz"] <= shira["trained"]
    assert (between["nnz"], between["sigma"], between["dtype"]) == (32, 1.0, "F32")
    for row in written["real"]:
        parts = row["record_bytes"] + row["index_bytes"] + row["value_bytes"]
        assert parts == row["file_bytes"]
    assert "as peft wrote it" in capsys.readouterr().out
    page = benchmark("delta_page").section([written])
    assert f"{shira['adapter_bytes']:,}" in page
    assert "Two steps each." in page
    assert "Of made changes" not in page
    with pytest.raises(SystemExit, match=r"holds no results\.json"):
        benchmark_delta.main([f"--run={tmp_path}"])
