"""Scores of layers by hand, and a cost line that is what was put in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samara.federated.calibration import depths_to_try, fit_line
from samara.federated.importance import ImportanceMeter, relative_change


def layer(values, gradients):
    parameter = nn.Parameter(torch.tensor(values))
    parameter.grad = torch.tensor(gradients)
    return {"weight": parameter}


@pytest.mark.parametrize(("score", "expected"), [("grad_norm", 5), ("fisher", 25), ("taylor", 2)])
def test_a_score_is_summed_over_active_batches(score, expected):
    layers = [layer([2.0, -1.0], [3.0, 4.0]), layer([2.0, -1.0], [3.0, 4.0])]
    meter = ImportanceMeter(score, layers)
    for runs in ((True, True), (True, False), (True, False)):
        meter.add(runs)
    assert meter.sums == pytest.approx([3 * expected, expected])
    assert meter.active_batches == [3, 1]


def test_a_change_of_weights_counts_once_for_all_batches():
    layers = [layer([3.0, 4.0], [0.0, 0.0]), layer([3.0, 4.0], [0.0, 0.0])]
    meter = ImportanceMeter("weight_change", layers)
    meter.start()
    for runs in ((True, True), (True, False), (True, False), (True, False)):
        meter.add(runs)
    with torch.no_grad():
        layers[0]["weight"] += torch.tensor([0.0, 4.0])
        layers[1]["weight"] += torch.tensor([0.0, 1.0])
    meter.finish()
    # Moved a quarter as far in a quarter of the chances: as important.
    means = np.array(meter.sums) / np.array(meter.active_batches)
    assert means[0] == pytest.approx(means[1]) == pytest.approx(0.8)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_of_lora_the_product_counts_and_not_how_it_is_split(seed, scale):
    torch.manual_seed(seed)
    names = ("q.lora_A.default.weight", "q.lora_B.default.weight")
    a, b = torch.randn(2, 5).double(), torch.randn(4, 2).double()
    moved_a, moved_b = a + torch.randn(2, 5), b + torch.randn(4, 2)
    found = relative_change(
        dict(zip(names, (a, b), strict=True)), dict(zip(names, (moved_a, moved_b), strict=True))
    )
    split = relative_change(
        dict(zip(names, (a, b), strict=True)),
        dict(zip(names, (moved_a * scale, moved_b / scale), strict=True)),
    )
    assert found == pytest.approx(split, rel=1e-6)
    expected = (moved_b @ moved_a - b @ a).norm()
    assert found == pytest.approx(float(expected / (a.norm() * b.norm())), rel=1e-5)


@settings(max_examples=20)
@given(start=st.floats(0, 10), slope=st.floats(0.01, 10), depth=st.integers(2, 48))
def test_a_line_of_costs_is_found_again(start, slope, depth):
    xs = depths_to_try(depth, drops=True)
    found = fit_line(xs, [start + slope * x for x in xs])
    assert found[0] == pytest.approx(start, abs=1e-6)
    assert found[1] == pytest.approx(slope, rel=1e-6)
    assert found[2] is None or found[2] == pytest.approx(1)


def test_costs_are_never_negative():
    assert fit_line([1, 2, 4], [4.0, 3.0, 2.0])[:2] == (3.0, 0.0)
    start, slope, _ = fit_line([1, 2, 4], [1.0, 4.0, 9.0])
    assert start == 0.0
    assert slope == pytest.approx(45 / 21)
    assert fit_line([4], [2.0]) == (2.0, 0.0, None)
    assert depths_to_try(12, drops=False) == [12]
    assert depths_to_try(12, drops=True) == [3, 6, 12]
