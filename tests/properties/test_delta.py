"""Properties of delta files, for any shape, type, bits (NaN payloads and -0.0 too) and support."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.errors import CorruptDelta
from samara.sparse.delta import make_delta
from samara.sparse.delta_apply import DeltaStack
from samara.sparse.delta_codec import CodedIndices, decode_indices, encode_indices
from samara.sparse.delta_compose import compose
from samara.sparse.delta_file import delta_bytes, parse_delta
from samara.sparse.tensor_bits import named_tensors

WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SHAPES = st.lists(st.integers(1, 24), min_size=1, max_size=3).map(tuple)


def random_bits(shape, dtype, seed):
    """Any bit patterns at all."""
    draw = torch.Generator().manual_seed(seed)
    word = WORDS[dtype]
    low = torch.iinfo(word).min
    bits = torch.randint(low, -low, shape, generator=draw, dtype=torch.int64).to(word)
    return bits.view(dtype)


@st.composite
def pairs(draw):
    """A base and a tuned set of weights."""
    base, tuned = {}, {}
    for number in range(draw(st.integers(1, 3))):
        name, dtype = f"t{number}", draw(st.sampled_from(list(WORDS)))
        shape, seed = draw(SHAPES), draw(st.integers(0, 1000))
        base[name] = random_bits(shape, dtype, seed)
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(
            st.floats(0, 1)
        )
        other = random_bits(shape, dtype, seed + 1)
        tuned[name] = torch.where(
            keep, base[name].view(WORDS[dtype]), other.view(WORDS[dtype])
        ).view(dtype)
    return base, tuned


def bits(weights):
    return {
        name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in weights.items()
    }


@settings(max_examples=40, deadline=None)
@given(pairs(), st.sampled_from(["ulp", "xor", "overwrite"]))
def test_write_read_apply_revert_is_exact(pair, mode):
    base, tuned = pair
    before = bits(base)
    delta = parse_delta(delta_bytes(make_delta(base, tuned, mode=mode)))
    stack = DeltaStack(lambda: named_tensors(base))
    with stack.applied(delta):
        assert bits(base) == bits(tuned)
    assert bits(base) == before


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_support_comes_back(data):
    shape = data.draw(SHAPES)
    size = math.prod(shape)
    found = data.draw(st.sets(st.integers(0, size - 1), max_size=size))
    indices = np.array(sorted(found), np.int64)
    coded = encode_indices(indices, shape)
    assert np.array_equal(decode_indices(coded, nnz=len(indices), shape=shape), indices)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["gap_u16z", "rice", "block", "cols", "rows", "range"]),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(["b", "size", "nnz", "ids", "start", "count"]), st.integers(-2, 70)
    ),
    st.integers(0, 30),
)
def test_any_other_bytes_are_refused_or_are_positions(codec, content, params, nnz):
    try:
        found = decode_indices(
            CodedIndices(codec=codec, params=params, data=content), nnz=nnz, shape=(6, 5)
        )
    except CorruptDelta:
        return
    assert len(found) == nnz
    assert (np.diff(found) > 0).all()
    assert nnz == 0 or (found[0] >= 0 and found[-1] < 30)


@settings(max_examples=25, deadline=None)
@given(pairs(), st.data())
def test_a_changed_file_is_refused(pair, data):
    content = delta_bytes(make_delta(*pair))
    place = data.draw(st.integers(0, len(content) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = bytearray(content)
    changed[place] ^= flip
    with pytest.raises(CorruptDelta):
        parse_delta(bytes(changed))
    with pytest.raises(CorruptDelta):
        parse_delta(content[:place])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_members_compose_and_come_out_in_any_order(data):
    """Whatever is popped, in whatever order: what is left equals composing it directly."""
    base = {"w": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()}
    source = named_tensors(base)
    members = []
    for number in range(4):
        tuned = base["w"].clone().view(-1)
        places = data.draw(st.sets(st.integers(0, 29), min_size=1, max_size=12))
        tuned[sorted(places)] += 0.5 * (number + 1)
        members.append(make_delta(base, {"w": tuned.view(6, 5)}))
    policy = data.draw(st.sampled_from(["last", "priority", "sum"]))
    numbers = {member.id: n for n, member in enumerate(members)}
    live = {"w": base["w"].clone()}
    stack = DeltaStack(lambda: named_tensors(live))
    if len(numbers) < 4:
        return  # two members came out equal
    composed = compose(members, source, policy=policy, priorities=numbers)
    stack.apply(composed.delta)
    for member in data.draw(st.permutations(members)):
        composed = composed.without(member.id)
        stack.swap(composed.delta)
        left = list(composed.members)
        if len(left) > 1:
            kept = {m.id: numbers[m.id] for m in left}
            direct = compose(left, source, policy=policy, priorities=kept)
            assert direct.delta.id == composed.delta.id
        elif left:
            assert torch.equal(live["w"], expected(base, left[0]))
    assert bits(live) == bits(base)


def expected(base, delta):
    weights = {"w": base["w"].clone()}
    DeltaStack(lambda: named_tensors(weights)).apply(delta)
    return weights["w"]
