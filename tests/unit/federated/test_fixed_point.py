"""Clipped, on the grid, never longer than allowed, and never too large to be summed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from samara.federated.aggregation import Layout
from samara.federated.fixed_point import LARGEST, Grid, group_names, length, split

LAYOUT = Layout(
    shapes={"0.a": (2, 2), "1.a": (3,), "head": (2,)},
    groups={"0.a": "0", "1.a": "1", "head": "head"},
    num_layers=2,
)
BEFORE = {name: np.ones(shape, dtype=np.float32) for name, shape in LAYOUT.shapes.items()}


@settings(max_examples=40, deadline=None)
@given(
    values=arrays.arrays(np.float32, 9, elements=st.floats(-1e6, 1e6, width=32)),
    clip=st.floats(1e-3, 1e3),
    clients=st.integers(1, 5000),
)
def test_a_vector_is_within_its_norm_and_so_many_fit_32_bits(values, clip, clients):
    grid = Grid(clip=clip, clients=clients)
    tensors = {n: (BEFORE[n] + v).astype(np.float32) for n, v in split(values, LAYOUT).items()}
    change = grid.change(tensors, BEFORE, LAYOUT)
    encoded = grid.encode(change)
    assert np.linalg.norm(encoded) <= grid.units
    assert np.abs(encoded).max() * clients <= LARGEST
    np.testing.assert_allclose(grid.decode(encoded), change, atol=1.01 * grid.step, rtol=0)


def test_what_was_not_sent_is_zero_and_what_is_small_is_left_as_it_is():
    grid = Grid(clip=10.0, clients=100)
    change = grid.change({"1.a": np.array([1, 3, 0], dtype=np.float32)}, BEFORE, LAYOUT)
    np.testing.assert_allclose(change, [0, 0, 0, 0, 0, 2, -1, 0, 0], rtol=1e-8)
    assert length(LAYOUT) == 9
    assert group_names(LAYOUT) == ["0", "1", "head"]


def test_a_long_change_is_scaled_down_to_the_bound():
    grid = Grid(clip=1.0, clients=10)
    change = grid.change({"head": np.array([4, 5], dtype=np.float32)}, BEFORE, LAYOUT)
    np.testing.assert_allclose(change[-2:], [0.6, 0.8], rtol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_never_reaches_a_sum(bad):
    grid = Grid(clip=1.0, clients=10)
    change = grid.change({"head": np.array([bad, 5], dtype=np.float32)}, BEFORE, LAYOUT)
    assert not change.any()


def test_shares_from_0_to_1_come_back():
    grid = Grid(clip=0.01, clients=1000)
    encoded = grid.encode_shares([0, 0.25, 1])
    np.testing.assert_allclose(grid.decode_shares(3 * encoded), [0, 0.75, 3], atol=1e-5)
