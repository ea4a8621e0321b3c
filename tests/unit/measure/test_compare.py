"""Bootstrap intervals and paired differences against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from samara.measure import compare
from samara.measure.compare import Interval, paired_difference, ratio_interval, verdict


def documents(generator, number, mean=3.0):
    """Tokens per document and summed loss; the documents differ in difficulty."""
    tokens = generator.integers(20, 200, size=number)
    difficulty = generator.normal(mean, 0.5, size=number)
    return difficulty * tokens, tokens


def test_the_value_is_the_ratio_of_the_sums_and_not_the_mean_of_ratios():
    result = ratio_interval([10.0, 90.0], [1, 99])
    assert result.value == 1.0
    assert result.low <= 1.0 <= result.high


def test_identical_documents_leave_no_doubt():
    result = ratio_interval([6.0] * 20, [3] * 20)
    assert (result.value, result.low, result.high) == (2.0, 2.0, 2.0)


def test_the_interval_of_a_mean_is_the_textbook_one():
    generator = np.random.default_rng(0)
    values = generator.normal(5.0, 2.0, size=400)
    result = ratio_interval(values, np.ones(400), samples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert result.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert result.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_coverage_is_what_it_says():
    """Of 300 corpora, about 95 % of the intervals hold the true loss."""
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        result = ratio_interval(*documents(generator, 80), samples=400, seed=trial)
        hits += result.low <= 3.0 <= result.high
    assert 0.91 <= hits / 300 <= 0.98


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    data = documents(np.random.default_rng(2), 50)
    assert ratio_interval(*data, seed=3) == ratio_interval(*data, seed=3)
    assert ratio_interval(*data, seed=3) != ratio_interval(*data, seed=4)


def test_the_size_of_a_chunk_does_not_matter(monkeypatch):
    data = documents(np.random.default_rng(2), 50)
    whole = ratio_interval(*data)
    monkeypatch.setattr(compare, "CHUNK", 60)
    assert ratio_interval(*data) == whole


def test_documents_without_tokens_do_not_count():
    data = documents(np.random.default_rng(5), 30)
    padded = [np.concatenate([column, np.zeros(10)]) for column in data]
    assert ratio_interval(*padded) == ratio_interval(*data)


def test_a_single_document_says_nothing():
    result = ratio_interval([12.0], [4])
    assert (result.value, result.low, result.high) == (3.0, -math.inf, math.inf)


def test_no_document_has_no_value():
    assert math.isnan(ratio_interval([], []).value)


def test_a_small_difference_is_resolved_by_pairing_only():
    """1 % better on every document: far below the spread between documents."""
    nll, tokens = documents(np.random.default_rng(6), 200)
    alone = [ratio_interval(nll * factor, tokens) for factor in (1.0, 0.99)]
    assert alone[1].high > alone[0].low
    difference = paired_difference((nll * 0.99, tokens), (nll, tokens))
    assert difference.value == pytest.approx(-0.01 * nll.sum() / tokens.sum())
    assert verdict(difference) == "better"


def test_the_same_model_twice_is_unresolved():
    data = documents(np.random.default_rng(7), 40)
    difference = paired_difference(data, data)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert verdict(difference) == "unresolved"


def test_verdicts():
    bounds = {"better": (-2.0, -1.0), "worse": (1.0, 2.0), "unresolved": (-1.0, 1.0)}
    for expected, (low, high) in bounds.items():
        middle = (low + high) / 2
        assert verdict(Interval(value=middle, low=low, high=high, confidence=0.95)) == expected


def test_false_alarms_are_as_rare_as_the_confidence_says():
    """Two equally good models, 200 corpora: about 5 % of the verdicts are wrong."""
    generator, alarms = np.random.default_rng(8), 0
    for trial in range(200):
        nll, tokens = documents(generator, 80)
        noise = generator.normal(0.0, 0.1, size=80) * tokens
        difference = paired_difference(
            (nll + noise, tokens), (nll, tokens), samples=400, seed=trial
        )
        alarms += verdict(difference) != "unresolved"
    assert alarms / 200 <= 0.10


def test_perplexity_is_the_loss_on_another_scale():
    loss = ratio_interval(*documents(np.random.default_rng(9), 50))
    perplexity = loss.map(math.exp)
    assert perplexity.value == math.exp(loss.value)
    assert (perplexity.low, perplexity.high) == (math.exp(loss.low), math.exp(loss.high))
