"""What holds for the intervals of any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.measure.compare import paired_difference, ratio_interval

DOCUMENTS = st.lists(
    st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 1e4), st.integers(1, 1000)),
    min_size=2,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 2**32))
def test_an_interval_holds_its_value(documents, seed):
    nll, _, tokens = (np.array(column) for column in zip(*documents, strict=True))
    result = ratio_interval(nll, tokens, samples=100, seed=seed)
    assert result.low <= result.value <= result.high
    assert result.value == pytest.approx(nll.sum() / tokens.sum())


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 2**32))
def test_a_paired_difference_turns_round_with_its_models(documents, seed):
    first, second, tokens = (np.array(column) for column in zip(*documents, strict=True))
    options = {"samples": 100, "seed": seed}
    forth = paired_difference((first, tokens), (second, tokens), **options)
    back = paired_difference((second, tokens), (first, tokens), **options)
    scale = max(1.0, abs(forth.low), abs(forth.high))
    assert back.value == pytest.approx(-forth.value, abs=1e-9 * scale)
    assert back.low == pytest.approx(-forth.high, abs=1e-9 * scale)
    assert back.high == pytest.approx(-forth.low, abs=1e-9 * scale)


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 2**32))
def test_more_confidence_is_a_wider_interval(documents, seed):
    nll, _, tokens = (np.array(column) for column in zip(*documents, strict=True))
    narrow = ratio_interval(nll, tokens, confidence=0.8, samples=100, seed=seed)
    wide = ratio_interval(nll, tokens, confidence=0.99, samples=100, seed=seed)
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, factor=st.floats(0.1, 10.0))
def test_the_interval_scales_with_the_loss(documents, factor):
    nll, _, tokens = (np.array(column) for column in zip(*documents, strict=True))
    plain = ratio_interval(nll, tokens, samples=50)
    scaled = ratio_interval(nll * factor, tokens, samples=50)
    assert scaled.low == pytest.approx(plain.low * factor, rel=1e-9, abs=1e-9)
    assert scaled.high == pytest.approx(plain.high * factor, rel=1e-9, abs=1e-9)
