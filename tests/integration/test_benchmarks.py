"""The inference benchmark runs at toy size, and its switch changes the kernel, not the model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inference() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("inference", ROOT / "benchmarks/inference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_smoke_run_measures_every_design(inference, tmp_path, capsys):
    inference.main(["--smoke", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    table = capsys.readouterr().out.splitlines()
    # three designs with two norms and llama, two caches, two batch sizes
    assert len(written["rows"]) == len(table) - 1 == 7 * 2 * 2
    assert {row["design"] for row in written["rows"]} == set(inference.DESIGNS)
    assert written["command"].startswith("python benchmarks/inference.py --smoke")
    assert written["environment"]["commit"]
    for row in written["rows"]:
        assert row["decode_tokens_per_second"] > 0
        assert row["prefill_tokens_per_second"] > 0
        assert row["cache_bytes"] > 0


def test_the_uniform_design_has_the_parameters_of_the_layer_wise_one(inference):
    sizes = {}
    for design in ("layer-wise", "uniform", "llama"):
        model = inference.make_model(
            inference.SIZES["small"], design, device=torch.device("meta"), dtype=torch.float32
        )
        sizes[design] = model.num_parameters()
    assert max(sizes.values()) / min(sizes.values()) < 1.01


def test_the_naive_norm_gives_the_same_numbers_and_is_taken_back(inference):
    model = inference.make_model(
        inference.SIZES["toy"], "layer-wise", device=torch.device("cpu"), dtype=torch.float32
    )
    ids, own = torch.arange(12)[None], inference.RMSNorm.forward
    with torch.no_grad():
        expected = model(ids).logits
        with inference.norm_kernel("naive"):
            assert inference.RMSNorm.forward is inference.naive_norm
            torch.testing.assert_close(model(ids).logits, expected)
    assert inference.RMSNorm.forward is own


def test_operators_are_counted_inside_composed_ones_and_views_are_not(inference):
    linear = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad(), inference.CountOperators() as counter:
        torch.nn.functional.silu(linear(torch.ones(1, 4)).view(2, 2)) + 1
    assert counter.count == 4  # ones, product, silu, sum
