"""Composed deltas: what counts where they meet, and members taken out exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samara.errors import ConfigError, DeltaError, OutOfOrder, OverlapConflict, WrongBase
from samara.registry.records import License
from samara.sparse.delta import make_delta
from samara.sparse.delta_apply import delta_stack
from samara.sparse.delta_compose import compose, overlaps
from samara.sparse.delta_records import Provenance
from samara.sparse.tensor_bits import named_tensors


def changed(base, name, places, by):
    tuned = {key: tensor.clone() for key, tensor in base.items()}
    tuned[name].view(-1)[places] += by
    return tuned


def delta_of(base, name, places, by, **records):
    known = Provenance(license=License(**records)) if records else None
    return make_delta(base, changed(base, name, places, by), records=known)


@pytest.fixture
def members(base):
    """Three deltas on one matrix; the first two share entries 4 and 5."""
    return [
        delta_of(base, "b", [0, 4, 5], 1.0),
        delta_of(base, "b", [4, 5, 9], -0.25),
        delta_of(base, "a", [3, 7], 0.5),
    ]


def applied(base, delta, net):
    model = net(base)
    delta_stack(model).apply(delta)
    return model.b.data.view(-1)


def test_deltas_that_do_not_meet_compose_under_any_policy(base, net, same, members):
    first, _, third = members
    expected = changed(changed(base, "b", [0, 4, 5], 1.0), "a", [3, 7], 0.5)
    ids = set()
    for policy in ("error", "last", "sum"):
        composed = compose([first, third], named_tensors(base), policy=policy)
        model = net(base)
        with composed.delta.applied_to(model):
            assert same(model, expected)
        ids.add(composed.delta.id)
    assert len(ids) == 1
    composition = composed.delta.record.composition
    assert [member.delta_id for member in composition.members] == [first.id, third.id]


def test_policies_where_deltas_meet(base, net, members):
    first, second, _ = members
    source, flat = named_tensors(base), base["b"].view(-1)
    with pytest.raises(OverlapConflict, match=r"b: 2 entries are changed by more than one of"):
        compose([first, second], source)
    last = applied(base, compose([first, second], source, policy="last").delta, net)
    assert torch.equal(
        last[[0, 4, 5, 9]], flat[[0, 4, 5, 9]] + torch.tensor([1, -0.25, -0.25, -0.25])
    )
    numbers = {first.id: 7, second.id: 3}
    ranked = compose([first, second], source, policy="priority", priorities=numbers)
    assert torch.equal(
        applied(base, ranked.delta, net)[[0, 4, 5, 9]],
        flat[[0, 4, 5, 9]] + torch.tensor([1, 1, 1, -0.25]),
    )
    total = applied(base, compose([second, first], source, policy="sum").delta, net)
    up, down = (flat + 1) - flat, (flat - 0.25) - flat
    small, large = (up, down) if first.id < second.id else (down, up)
    assert torch.equal(total[[4, 5]], (flat + (small + large))[[4, 5]])
    assert torch.equal(total[[0, 9]], flat[[0, 9]] + torch.tensor([1, -0.25]))


def test_a_sum_in_bfloat16_is_rounded_once(net):
    base = {"b": torch.full((4, 4), 256.0).bfloat16()}  # the next number is 258
    tuned = [{"b": base["b"] + 2}, {"b": base["b"] + 2}, {"b": base["b"].clone()}]
    tuned[1]["b"][0, 0] = 260
    tuned[2]["b"][:] = 254
    deltas = [make_delta(base, weights) for weights in tuned]
    composed = compose(deltas, named_tensors(base), policy="sum")
    flat = applied(base, composed.delta, net)
    assert flat[0] == 256 + 2 + 4 - 2
    assert (flat[1:] == 256 + 2 + 2 - 2).all()


def test_members_come_out_exactly_in_any_order_on_a_live_model(base, net, same, members):
    source = named_tensors(base)
    model = net(base)
    stack = delta_stack(model)
    composed = compose(members, source, policy="sum")
    stack.apply(composed.delta)
    without = composed.without(members[0].id)
    stack.swap(without.delta)
    direct = compose(members[1:], source, policy="sum")
    assert without.delta.id == direct.delta.id
    reference = net(base)
    delta_stack(reference).apply(direct.delta)
    assert same(model, dict(reference.state_dict()))
    alone = without.without(members[2].id)
    stack.swap(alone.delta)
    assert torch.equal(model.b.data, changed(base, "b", [4, 5, 9], -0.25)["b"])
    nothing = alone.without(members[1].id)
    stack.swap(nothing.delta)
    assert nothing.delta.nnz == 0
    assert same(model, base)
    stack.revert()
    with pytest.raises(OutOfOrder, match="is no member of"):
        composed.without("f" * 64)


def test_only_deltas_of_the_same_weights_compose(base, copies, members):
    first, second, third = members
    source = named_tensors(base)
    near = copies(base)
    near["d"] += 1
    with pytest.raises(ConfigError, match="1 delta given; give two or more"):
        compose([first], source)
    with pytest.raises(ConfigError, match="is given twice"):
        compose([first, first], source)
    with pytest.raises(WrongBase, match="only deltas of one base compose"):
        compose([first, delta_of(near, "a", [1], 1.0)], source)
    child = make_delta(changed(base, "b", [0, 4, 5], 1.0), base, parent=first)
    with pytest.raises(OutOfOrder, match="has another parent"):
        compose([third, child], source)
    additive = make_delta(base, changed(base, "c", [1], 1.0), mode="additive")
    with pytest.raises(DeltaError, match="is additive and has no exact bits"):
        compose([first, additive], source)
    with pytest.raises(WrongBase, match="b: the weights that delta"):
        compose([first, third], named_tensors({**base, "b": base["b"] + 1}))
    with pytest.raises(ConfigError, match=r"policy priority, and .* has none"):
        compose([first, second], source, policy="priority", priorities={first.id: 1})
    equal = {first.id: 1, second.id: 1}
    with pytest.raises(ConfigError, match="two priorities are equal"):
        compose([first, second], source, policy="priority", priorities=equal)


def test_the_licence_of_a_composed_delta_is_the_strictest(base):
    free = delta_of(base, "a", [1], 1.0, delta="apache-2.0", redistribution="allowed")
    inner = delta_of(base, "b", [1], 1.0, delta="mit", redistribution="internal", notice="ours")
    closed = delta_of(base, "c", [1], 1.0, redistribution="forbidden", use="forbidden")
    both = compose([free, inner], named_tensors(base)).delta.record.license
    assert (both.redistribution, both.use, both.notice) == ("internal", "allowed", "ours")
    assert both.delta == "apache-2.0 AND mit"
    every = compose([free, inner, closed], named_tensors(base)).delta.record.license
    assert (every.redistribution, every.use) == ("forbidden", "forbidden")


def test_overlaps_are_counted_and_interference_is_that_of_the_dense_products(base, members):
    found = overlaps(members, named_tensors(base))
    assert [(met.name, met.shared, met.opposed) for met in found] == [("b", 2, 2)]
    dense = [torch.zeros(128) for _ in range(2)]
    for matrix, delta in zip(dense, members, strict=False):
        tensor = delta.tensors[0]
        before = base["b"].view(-1)[tensor.indices]
        step = 1.0 if delta is members[0] else -0.25
        matrix[tensor.indices] = (before + step) - before
    product = dense[0].view(16, 8).T @ dense[1].view(16, 8)
    assert found[0].interference == pytest.approx(float(torch.linalg.matrix_norm(product)))
    assert np.isfinite(found[0].interference)
    apart = [delta_of(base, "b", [0], 1.0), delta_of(base, "b", [127], 1.0)]
    assert overlaps(apart, named_tensors(base))[0].interference == 0.0
    flat = [delta_of(base, "c", [0, 1], 1.0), delta_of(base, "c", [1], 1.0)]
    assert overlaps(flat, named_tensors(base))[0].interference is None
