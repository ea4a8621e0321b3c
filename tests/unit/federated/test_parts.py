"""Clients that work on parts: several ranks in one mean, and adapters that grow by trials."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.config import validate
from samara.errors import ConfigError
from samara.federated.aggregation import Contribution, Layout, aggregate
from samara.federated.config import FederateConfig, FederatedDevice
from samara.federated.depth_search import DepthParts
from samara.federated.messages import Instruction
from samara.federated.mixed_ranks import mean_over_ranks, ranks_of_devices, truncate, widen
from samara.federated.parts import combine_ranks

RANK = 4


def _layout(num_layers=2):
    shapes, groups = {}, {}
    for layer in range(num_layers):
        for side, shape in (("A", (RANK, 3)), ("B", (5, RANK))):
            name = f"layers.{layer}.q.lora_{side}.default.weight"
            shapes[name], groups[name] = shape, str(layer)
    return Layout(
        shapes={**shapes, "head": (2,)}, groups={**groups, "head": "head"}, num_layers=num_layers
    )


LAYOUT = _layout()
A, B = list(LAYOUT.shapes)[:2]


def draw(seed, layout=LAYOUT):
    noise = np.random.default_rng(seed)
    return {n: noise.standard_normal(s).astype(np.float32) for n, s in layout.shapes.items()}


def contribution(client, rank=RANK, weight=1.0):
    return Contribution(client=client, weight=weight, tensors=truncate(draw(client), rank))


def combined(items, ranks, missing="leave_out", previous=None):
    asked = {c: Instruction(round=0, client=c, lora_rank=rank) for c, rank in ranks.items()}
    return combine_ranks(
        draw(99) if previous is None else previous,
        items,
        asked,
        LAYOUT,
        missing=missing,
        max_change=100.0,
        typical_change=None,
    )


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(4)),
    weights=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
    missing=st.sampled_from(["zero", "leave_out"]),
)
def test_clients_of_equal_rank_are_averaged_as_ever_bit_for_bit(order, weights, missing):
    items = [contribution(c, weight=weights[c]) for c in order]
    found = combined(items, dict.fromkeys(range(4), RANK), missing)
    plain = aggregate(draw(99), items, LAYOUT, max_change=100.0)
    for name in LAYOUT.shapes:
        np.testing.assert_array_equal(found.tensors[name], plain.tensors[name])
    assert found.senders == plain.senders


def test_rows_that_a_client_has_not_are_zero_or_left_out():
    items = [contribution(1, rank=1, weight=3), contribution(2, rank=2, weight=1)]
    one, two, before = draw(1), draw(2), draw(99)
    for missing, share in (("leave_out", 1.0), ("zero", 0.25)):
        found = combined(items, {1: 1, 2: 2}, missing).tensors
        np.testing.assert_allclose(found[A][0], 0.75 * one[A][0] + 0.25 * two[A][0], rtol=1e-6)
        np.testing.assert_allclose(found[A][1], share * two[A][1], rtol=1e-6)
        np.testing.assert_array_equal(found[A][2:], before[A][2:])  # nobody has them
        np.testing.assert_allclose(found[B][:, 1], share * two[B][:, 1], rtol=1e-6)
        np.testing.assert_array_equal(found[B][:, 2:], before[B][:, 2:])
        expected = 0.75 * one["head"] + 0.25 * two["head"]
        np.testing.assert_allclose(found["head"], expected, rtol=1e-6)


def test_a_part_of_another_rank_than_was_asked_for_is_refused():
    items = [contribution(1, rank=1), contribution(2, rank=3)]
    found = combined(items, {1: 1, 2: 2})
    assert list(found.refused) == [2]
    assert "has shape [3, 3], expected [4, 3]" in found.refused[2]


def test_a_part_that_is_widened_and_cut_again_is_the_same():
    part = truncate(draw(1), 2)
    whole = widen(part, LAYOUT.shapes)
    assert {n: v.shape for n, v in whole.items()} == dict(LAYOUT.shapes)
    assert not whole[A][2:].any()
    for name, value in truncate(whole, 2).items():
        np.testing.assert_array_equal(value, part[name])
    missing = widen({}, LAYOUT.shapes)
    assert not any(value.any() for value in missing.values())


def test_nothing_but_adapters_has_ranks():
    mean = functools.partial(mean_over_ranks, ranks={1: 1}, missing="zero")
    items = [Contribution(client=1, weight=1, tensors={"head": draw(1)["head"]})]
    found = mean(draw(99), items, LAYOUT)
    np.testing.assert_array_equal(found["head"], draw(1)["head"])
    np.testing.assert_array_equal(found[A], draw(99)[A])


# --- settings -------------------------------------------------------------------------------------


def device(name, slowness):
    return FederatedDevice(
        name=name,
        slowness=slowness,
        memory_bytes=1e9,
        download_bytes_per_second=1e6,
        upload_bytes_per_second=1e6,
        compute_watts=1,
        communicate_watts=1,
        source="by hand",
    )


def recipe(**changes):
    data = {
        "init_from": "base",
        "task": {"kind": "labels", "name": "t", "data": "test.jsonl"},
        "data": {"train": "train.jsonl"},
        "clients": {"number": 3},
        "server": {"rounds": 1},
        "lora": {"rank": RANK},
    }
    return validate(FederateConfig, {**data, **changes})


def test_ranks_by_device_are_halved_by_speed_or_given():
    kinds = [device("slow", 9), device("quick", 1), device("middle", 3), device("slow", 9)]
    config = recipe(method="hetlora").mixed_ranks
    assert ranks_of_devices(config, kinds, rank=8) == {"quick": 8, "middle": 4, "slow": 2}
    given_ = recipe(method="hetlora", mixed_ranks={"ranks": {"slow": 8, "quick": 3}}).mixed_ranks
    assert ranks_of_devices(given_, kinds, rank=8) == {"quick": 3, "middle": 4, "slow": 8}
    for ranks, message in (
        ({"slwo": 2}, "no client has a slwo.*did you mean 'slow'"),
        ({"slow": 9}, "mixed_ranks.ranks.slow: 9 is more than lora.rank 8"),
    ):
        config = recipe(method="hetlora", mixed_ranks={"ranks": ranks}).mixed_ranks
        with pytest.raises(ConfigError, match=message):
            ranks_of_devices(config, kinds, rank=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fedlora", "payload": "full"}, "payload: full is exchanged under droppeft"),
        ({"method": "hetlora", "payload": "sparse"}, "and method is hetlora; use one of those"),
        (
            {"method": "fedadapter", "server": {"rounds": 1, "optimizer": {"kind": "fedyogi"}}},
            "server.optimizer: fedyogi steps whole layers",
        ),
        ({"server": {"rounds": 1, "optimizer": {"kind": "fedsgd"}}}, "server.optimizer"),
        ({"local": {"proximal": -1.0}}, "local.proximal"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


# --- trials ---------------------------------------------------------------------------------------

DEEP = _layout(4)


def parts(**search):
    config = recipe(method="fedadapter", depth_search={"depth": 1, "trial_rounds": 2, **search})
    return DepthParts(config, layout=DEEP, devices=[])


def always(client, layers):
    return True


def play(own, values, seconds, score, round=0):
    """A round of six clients; each group adds its number to the head."""
    fields = own.instruct(round, range(6), always)
    asked = {c: Instruction(round=round, client=c, **f) for c, f in fields.items()}
    items = []
    for client, instruction in asked.items():
        sent = dict(own.given(instruction, values))
        sent["head"] = sent["head"] + np.float32(instruction.trained_layers)
        items.append(Contribution(client=client, weight=1.0, tensors=sent))
    result = own.combine(values, items, asked, typical_change=None)
    assert not result.refused
    spent = {c: seconds[i.group] for c, i in asked.items()}
    return asked, *own.settle(result.tensors, spent, asked, score)


def test_the_groups_of_a_trial_and_what_they_are_given():
    own, values = parts(), draw(1, DEEP)
    asked, _, _ = play(own, values, {"stay": 1, "deeper": 1, "wider": 1}, None)
    kinds = {(i.group, i.trained_layers, i.lora_rank) for i in asked.values()}
    assert kinds == {("stay", 1, 1), ("deeper", 3, 1), ("wider", 1, 2)}
    sent = own.given(asked[0], values)
    assert {DEEP.groups[n] for n in sent} == {"3", "head"}
    assert {v.shape for n, v in sent.items() if "lora_A" in n} == {(1, 3)}


def test_a_group_that_is_ahead_of_the_clock_waits():
    own, values = parts(trial_rounds=4), draw(1, DEEP)
    present = []
    for round in range(3):
        asked, values, _ = play(own, values, {"stay": 2, "deeper": 5, "wider": 2}, None, round)
        present.append({i.group for i in asked.values()})
    assert present == [{"stay", "deeper", "wider"}, {"stay", "wider"}, {"stay", "wider"}]


def test_the_best_group_goes_on_until_nothing_can_grow():
    own, values = parts(), draw(1, DEEP)

    def deep_is_best(tensors):
        return float(tensors["head"].sum()), 0.0

    equal = {"stay": 1, "deeper": 1, "wider": 1}
    for round in range(2):
        before = values
        _, values, noted = play(own, values, equal, deep_is_best, round)
    assert noted["best"] == "deeper"
    np.testing.assert_allclose(values["head"], draw(1, DEEP)["head"] + 6, rtol=1e-5)
    assert not np.allclose(values["head"], before["head"] + 1)
    assert [(g.name, g.depth, g.rank) for g in own.groups] == [
        ("stay", 3, 1), ("deeper", 4, 1), ("wider", 3, 2),
    ]  # fmt: skip
    for _ in range(2):
        _, values, noted = play(own, values, equal, lambda _: (0.0, 0.0))
    assert noted["best"] == "stay"  # of equals the smallest
    whole = parts(depth=4, rank=RANK)
    assert [g.name for g in whole.groups] == ["stay"]
    for _ in range(3):
        _, _, noted = play(whole, values, equal, None)
        assert "best" not in noted


def test_whom_a_group_is_too_deep_for_stays():
    own = parts()
    fields = own.instruct(0, range(6), lambda client, layers: layers <= 1)
    assert {f["group"] for f in fields.values()} == {"stay", "wider"}
    assert own.least_layers(4) == 1


def test_a_trial_goes_on_from_its_state():
    own, values = parts(trial_rounds=3), draw(1, DEEP)
    equal = {"stay": 1, "deeper": 1, "wider": 1}
    _, values, _ = play(own, values, equal, None)
    other = parts(trial_rounds=3)
    other.restore(json.loads(json.dumps(own.plain_state())), own.tensors())
    assert other.groups == own.groups
    for round in (1, 2):
        results = [play(p, values, equal, lambda t: (float(t["head"].sum()), 0.0), round)
                   for p in (own, other)]  # fmt: skip
        assert results[0][2] == results[1][2]
        for name, value in results[0][1].items():
            np.testing.assert_array_equal(value, results[1][1][name])
        values = results[0][1]


def test_a_search_that_begins_too_large_is_refused():
    with pytest.raises(ConfigError, match=r"depth_search.depth: 5 wanted, the model has 4 layers"):
        parts(depth=5)
    with pytest.raises(ConfigError, match=r"depth_search.rank: 9 is more than lora.rank 4"):
        parts(rank=9)
