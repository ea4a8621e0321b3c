"""A mean per tensor over those who sent it; what is unsound is refused, and the rest goes on."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.federated.aggregation import Contribution, Layout, aggregate

LAYOUT = Layout(
    shapes={"l0.a": (3, 2), "l0.b": (2,), "l1.a": (3, 2), "l1.b": (2,), "head": (4,)},
    groups={"l0.a": "0", "l0.b": "0", "l1.a": "1", "l1.b": "1", "head": "head"},
    num_layers=2,
)


def draw(seed, names=tuple(LAYOUT.shapes), scale=1.0):
    noise = np.random.default_rng(seed)
    return {
        name: (scale * noise.standard_normal(LAYOUT.shapes[name])).astype(np.float32)
        for name in names
    }


def reply(client, names=tuple(LAYOUT.shapes), weight=1.0, **changes):
    return Contribution(client=client, weight=weight, tensors={**draw(client, names), **changes})


def run(contributions, previous=None, **fields):
    previous = draw(99) if previous is None else previous
    return aggregate(previous, contributions, LAYOUT, **{"max_change": 100.0, **fields})


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype == np.float32
        np.testing.assert_array_equal(one[name], other[name])


def test_the_mean_is_weighted_and_taken_by_hand_the_same():
    one, two = reply(1, weight=3), reply(2, weight=1)
    found = run([one, two])
    for name in LAYOUT.shapes:
        expected = 0.75 * one.tensors[name] + 0.25 * two.tensors[name]
        np.testing.assert_allclose(found.tensors[name], expected, rtol=1e-6)


@settings(max_examples=30)
@given(order=st.permutations(range(7)), weights=st.lists(st.integers(1, 10**6), min_size=7))
def test_the_order_of_arrival_changes_no_bit(order, weights):
    names = tuple(LAYOUT.shapes)
    sent = [names, names[2:], names[:2], ("head",), names, names[2:], names]
    replies = [reply(c, sent[c], weight=weights[c]) for c in range(7)]
    straight, shuffled = run(replies), run([replies[c] for c in order])
    same(straight.tensors, shuffled.tensors)
    assert straight.senders == shuffled.senders


@given(weight=st.floats(1e-3, 1e9))
@settings(max_examples=20)
def test_one_client_gets_its_own_values_back_bit_for_bit(weight):
    alone = reply(4, weight=weight)
    same(run([alone]).tensors, dict(alone.tensors))


def test_a_layer_with_one_sender_of_two_is_not_halved_and_one_without_keeps_its_value():
    previous = draw(99)
    one, two = reply(1, ("l0.a", "l0.b", "head")), reply(2, ("head",))
    found = run([one, two], previous)
    np.testing.assert_array_equal(found.tensors["l0.a"], one.tensors["l0.a"])
    np.testing.assert_array_equal(found.tensors["l1.a"], previous["l1.a"])
    assert found.senders == {"0": (1,), "1": (), "head": (1, 2)}


def test_no_reply_at_all_keeps_everything():
    previous = draw(99)
    same(run([], previous).tensors, previous)


BAD = {
    "not finite": (
        {"l0.a": np.full((3, 2), np.nan, np.float32)},
        "l0.a holds values that are not finite",
    ),
    "infinite": (
        {"l0.b": np.full(2, np.inf, np.float32)},
        "l0.b holds values that are not finite",
    ),
    "wrong shape": (
        {"l0.a": np.zeros((2, 3), np.float32)},
        r"l0.a has shape \[2, 3\], expected \[3, 2\]",
    ),
    "wrong key": ({"l9.a": np.zeros(2, np.float32)}, "sent unknown tensor l9.a"),
    "wrong type": ({"head": np.zeros(4)}, "head is float64, expected float32"),
    "huge norm": (
        {"head": np.full(4, 1e6, np.float32)},
        "moved .* per element, more than 100 times the median",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("others", [1, 3])
def test_an_unsound_reply_is_refused_with_its_reason_and_the_others_are_averaged(kind, others):
    changes, message = BAD[kind]
    sound = [reply(client) for client in range(others)]
    found = run([*sound, reply(7, **changes)])
    assert found.refused.keys() == {7}
    assert re.fullmatch(message + ".*", found.refused[7])
    same(found.tensors, run(sound).tensors)


def test_a_part_of_a_layer_or_a_weight_that_is_none_is_refused():
    found = run([reply(1, ("l0.a",)), reply(2, weight=0.0), reply(3, weight=float("nan"))])
    assert found.refused == {
        1: "sent a part of group 0 only: l0.b is missing",
        2: "weight 0.0 is not a positive number",
        3: "weight nan is not a positive number",
    }


def test_a_huge_reply_that_is_alone_is_judged_by_an_earlier_round():
    before = run([reply(1), reply(2)])
    huge = {name: 1e6 * value for name, value in draw(3).items()}
    found = run(
        [Contribution(client=3, weight=1, tensors=huge)], typical_change=before.typical_change
    )
    assert list(found.refused) == [3]
    assert found.typical_change == before.typical_change


def test_clients_that_changed_nothing_do_not_make_the_others_look_huge():
    previous = draw(99)
    still = [Contribution(client=c, weight=1, tensors=previous) for c in range(3)]
    assert run([*still, reply(7)], previous).refused == {}
