"""The rule of weights and gradients in numbers small enough to check by eye."""

from __future__ import annotations

import pytest
import torch

from samara.growth.axes import (
    AxisMap,
    Noise,
    TensorRule,
    extended,
    grow_moment,
    grow_weight,
    query_heads,
    tiled,
    unchanged,
)

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)  # (out, in)


def test_copies_of_an_input_share_its_weight_and_copies_of_an_output_its_gradient():
    rule = TensorRule(outputs=tiled(2, 3), inputs=tiled(2, 4))
    weight = grow_weight(WEIGHT, rule)
    assert weight.tolist() == [[0.5, 1, 0.5, 1], [1.5, 2, 1.5, 2], [0.5, 1, 0.5, 1]]
    first = grow_moment(WEIGHT, rule, power=1)
    assert first.tolist() == [[0.5, 1, 0.5, 1], [3, 4, 3, 4], [0.5, 1, 0.5, 1]]
    second = grow_moment(WEIGHT, rule, power=2)
    assert second.tolist() == [[0.25, 0.5, 0.25, 0.5], [3, 4, 3, 4], [0.25, 0.5, 0.25, 0.5]]


def test_factors_stored_in_out_follow_the_same_rule_transposed():
    linear = TensorRule(outputs=tiled(2, 3), inputs=tiled(2, 5))
    factor = TensorRule(outputs=tiled(2, 3), inputs=tiled(2, 5), output_dim=1)
    assert torch.equal(grow_weight(WEIGHT.T, factor), grow_weight(WEIGHT, linear).T)
    moments = (grow_moment(WEIGHT.T, factor, power=2), grow_moment(WEIGHT, linear, power=2).T)
    assert torch.equal(*moments)


def test_a_gain_is_copied_and_scaled_and_its_gradient_divided():
    gain = torch.tensor([1.0, 2.0])
    rule = TensorRule(outputs=tiled(2, 4), scale=0.5)
    assert grow_weight(gain, rule).tolist() == [0.5, 1, 0.5, 1]
    assert grow_moment(gain, rule, power=1).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [
        ("nowhere", "where_read", [[1, 2, 0], [3, 4, 0], [9, 9, 0]]),
        ("where_written", "nowhere", [[1, 2, 9], [3, 4, 9], [0, 0, 0]]),
        ("nowhere", "nowhere", [[1, 2, 9], [3, 4, 9], [9, 9, 9]]),
    ],
)
def test_units_without_a_source_are_fresh_or_silent(outputs, inputs, expected):
    rule = TensorRule(
        outputs=extended(2, 3, silence=outputs), inputs=extended(2, 3, silence=inputs)
    )
    assert grow_weight(WEIGHT, rule, fresh=torch.full((3, 3), 9.0)).tolist() == expected
    assert grow_moment(WEIGHT, rule, power=1).tolist() == [[1, 2, 0], [3, 4, 0], [0, 0, 0]]


def test_heads_expand_to_their_components():
    assert tiled(2, 3).in_heads(2).index.tolist() == [0, 1, 2, 3, 0, 1]
    assert extended(1, 2).in_heads(3).index.tolist() == [0, 1, 2, -1, -1, -1]


def test_query_heads_repeat_within_their_group_and_are_not_tiled():
    two_keys = unchanged(2)
    wider = query_heads(two_keys, old_group=2, new_group=4, repeat=True)
    assert wider.index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    more_groups = query_heads(tiled(2, 3), old_group=2, new_group=2, repeat=True)
    assert more_groups.index.tolist() == [0, 1, 2, 3, 0, 1]
    new_heads = query_heads(extended(1, 2), old_group=2, new_group=3, repeat=False)
    assert new_heads.index.tolist() == [0, 1, -1, -1, -1, -1]


def test_multi_query_attention_grows_its_one_group():
    grown = query_heads(unchanged(1), old_group=3, new_group=4, repeat=True)
    assert grown.index.tolist() == [0, 0, 1, 2]
    assert grown.multiplicity.tolist() == [2, 2, 1, 1]


def test_a_repeated_unit_is_one_whose_source_came_before():
    axis = AxisMap(index=torch.tensor([1, -1, 0, 1, 0, -1]), old_size=2)
    assert axis.is_new.tolist() == [False, True, False, False, False, True]
    assert axis.is_repeated.tolist() == [False, True, False, True, True, True]
    assert axis.multiplicity.tolist() == [2, 1, 2, 2, 2, 1]


def test_noise_is_as_strong_as_asked_and_sums_to_zero_over_copies():
    torch.manual_seed(0)
    weight = 3 * torch.randn(200, 50, dtype=torch.float64)
    rule = TensorRule(outputs=unchanged(200), inputs=tiled(50, 125))
    noise = Noise(0.1, generator=torch.Generator().manual_seed(1))
    plain, noisy = grow_weight(weight, rule), grow_weight(weight, rule, noise=noise)
    difference = noisy - plain
    sums = torch.zeros(200, 50, dtype=torch.float64).index_add(1, rule.inputs.index, difference)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)
    # Of three copies the mean takes a third of the noise's variance; the weight is a third too.
    strength = (difference[:, :25] * 3).std().item() / (0.1 * 3 * (2 / 3) ** 0.5)
    assert strength == pytest.approx(1, rel=0.05)


def test_noise_leaves_what_has_no_copies():
    rule = TensorRule(outputs=tiled(2, 4), inputs=unchanged(2))
    noise = Noise(1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(grow_weight(WEIGHT, rule, noise=noise), grow_weight(WEIGHT, rule))
