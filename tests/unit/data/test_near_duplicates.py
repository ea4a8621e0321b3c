"""MinHash: estimates near the true similarity, banding that misses little, order that counts."""

from __future__ import annotations

import numpy as np
import pytest

from samara.data.near_duplicates import BAND_RECALL, NUM_PERMUTATIONS, NearDuplicates, _band_rows


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(left: str, right: str) -> float:
    a, b = ngrams(left), ngrams(right)
    return len(a & b) / len(a | b)


def variant(words: list[str], changes: int, rng: np.random.Generator) -> str:
    changed = list(words)
    for position in rng.choice(len(words), changes, replace=False):
        changed[position] = f"changed{position}"
    return " ".join(changed)


def test_signatures_estimate_jaccard() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.integers(0, 500, 400)]
    texts = [variant(words, changes, rng) for changes in (0, 2, 5, 10, 20, 40, 80)]
    signatures = NearDuplicates(0.8)._sign(texts)
    for text, signature in zip(texts, signatures, strict=True):
        estimate = float((signature == signatures[0]).mean())
        true = jaccard(texts[0], text)
        # Five standard deviations of a mean of NUM_PERMUTATIONS coin flips.
        assert abs(estimate - true) <= 5 * (max(true * (1 - true), 0.01) / NUM_PERMUTATIONS) ** 0.5


def test_finds_what_a_comparison_of_all_pairs_finds() -> None:
    rng = np.random.default_rng(1)
    texts = []
    for _ in range(40):
        words = [f"w{i}" for i in rng.integers(0, 3000, 150)]
        texts += [variant(words, changes, rng) for changes in (0, 1, 40)]
    kept = NearDuplicates(0.8).keep(texts)
    expected = [
        all(jaccard(texts[j], text) < 0.8 for j in range(i)) for i, text in enumerate(texts)
    ]
    assert kept == expected
    assert kept.count(False) == 40


def test_batches_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    words = [f"w{i}" for i in range(100)]
    texts = [variant(words, int(changes), rng) for changes in rng.integers(0, 12, 60)]
    together = NearDuplicates(0.7).keep(texts)
    one_by_one = NearDuplicates(0.7)
    assert [one_by_one.keep([text])[0] for text in texts] == together
    assert 0 < together.count(True) < 60


def test_neighbours_in_a_batch_do_not_mix() -> None:
    finder = NearDuplicates(0.8)
    alone = [finder._sign([text])[0] for text in ("one", "a b c d e f", "", "x y z u v")]
    together = finder._sign(["one", "a b c d e f", "", "x y z u v"])
    np.testing.assert_array_equal(np.stack(alone), together)


def test_case_and_punctuation_do_not_matter() -> None:
    text = "The seed of the elm falls where it will"
    assert NearDuplicates(0.9).keep([text, text.upper() + "!", text.replace(" ", ", ")]) == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_banding_keeps_its_recall(threshold: float) -> None:
    rows = _band_rows(threshold)
    bands = NUM_PERMUTATIONS // rows
    assert 1 - (1 - threshold**rows) ** bands >= BAND_RECALL
    assert (
        rows == NUM_PERMUTATIONS
        or 1 - (1 - threshold ** (rows + 1)) ** (NUM_PERMUTATIONS // (rows + 1)) < BAND_RECALL
    )


def test_the_same_everywhere() -> None:
    """Which documents are kept, and so a corpus' hash, rests on these numbers."""
    signature = NearDuplicates(0.8)._sign(["the seed of the elm falls where it will"])[0]
    assert signature[:4].tolist() == [164568050, 1646335, 959498700, 305779084]
