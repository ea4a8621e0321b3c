"""Random numbers keyed by where they are used."""

from __future__ import annotations

import numpy as np

from samara.data.draws import Draws, Purpose


def numbers(**key: int) -> list[float]:
    return Draws(**{"seed": 1, "purpose": Purpose.MASKED_LM, **key}).uniform(5).tolist()


def test_the_same_place_gives_the_same_numbers_and_any_other_place_others():
    places = [
        {},
        {"seed": 2},
        {"seed": -1},
        {"purpose": Purpose.UL2_SPANS},
        {"draw": 1},
        {"row": 1},
        {"draw": 1, "row": 1},
        {"row": 2**40},
    ]
    seen = {tuple(numbers(**place)) for place in places}
    assert len(seen) == len(places)
    assert all(numbers(**place) == numbers(**place) for place in places)


def test_the_numbers_never_change():
    """Pinned: a change here changes every masked or denoised corpus of every run."""
    draws = Draws(seed=7, purpose=Purpose.UL2_SPANS, draw=2, row=5)
    assert draws.uniform(2).tolist() == [0.8891359320687333, 0.6248667289818183]
    assert draws.integers(4, below=1000).tolist() == [451, 899, 22, 846]
    assert draws.permutation(6).tolist() == [0, 2, 5, 1, 3, 4]


def test_uniform_numbers_are_uniform():
    sample = Draws(seed=0, purpose=Purpose.MASKED_LM).uniform(20_000)
    assert 0 <= sample.min() < sample.max() < 1
    counts, _ = np.histogram(sample, bins=10, range=(0, 1))
    assert np.abs(counts - 2000).max() < 200


def test_integers_stay_below():
    sample = Draws(seed=0, purpose=Purpose.MASKED_LM).integers(2000, below=3)
    assert sorted(set(sample.tolist())) == [0, 1, 2]


def test_a_subset_holds_different_numbers_in_order():
    draws = Draws(seed=0, purpose=Purpose.MASKED_LM)
    for count in range(7):
        subset = draws.subset(count, of=6).tolist()
        assert subset == sorted(set(subset))
        assert len(subset) == min(count, 6)
        assert all(0 <= number < 6 for number in subset)
