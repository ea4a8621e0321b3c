"""The rules of the race, on numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.growth.race import (
    Gap,
    Losses,
    Standing,
    choose,
    doubling_rungs,
    first_rung,
    fixed_rungs,
    judge,
    paired_gap,
    reach,
    stage_steps,
    survivors_of_halving,
)


def losses(values: list[float], targets: list[float] | None = None) -> Losses:
    """Losses of units with these means."""
    counted = np.array(targets or [1.0] * len(values))
    return Losses(nll_sum=np.array(values) * counted, num_targets=counted)


def with_gap(gap: float, se: float, units: int = 64) -> tuple[Losses, Losses]:
    """A candidate and a leader whose paired gap and standard error are these."""
    swing = se * math.sqrt(units - 1)
    differences = [gap + swing * (-1) ** unit for unit in range(units)]
    base = [3.0 + 0.1 * unit for unit in range(units)]
    return losses([b + d for b, d in zip(base, differences, strict=True)]), losses(base)


def test_the_gap_is_the_mean_paired_difference_and_its_standard_error():
    differences = [0.1, 0.3, 0.2, 0.4, 0.5]
    gap = paired_gap(losses([2 + d for d in differences]), losses([2.0] * 5))
    assert gap.value == pytest.approx(np.mean(differences))
    assert gap.se == pytest.approx(np.std(differences, ddof=1) / math.sqrt(5))


def test_units_count_by_their_targets():
    candidate = losses([2.5, 3.0], [300, 100])
    gap = paired_gap(candidate, losses([2.0, 3.0], [300, 100]))
    assert gap.value == pytest.approx(0.375)
    assert gap.value == pytest.approx(candidate.mean - losses([2.0, 3.0], [300, 100]).mean)


def test_one_unit_says_nothing_about_chance():
    gap = paired_gap(losses([9.0]), losses([1.0]))
    assert gap.se == math.inf
    assert gap.may_be_chance


def test_the_published_vector_of_the_guard():
    # Gap .30 -> .20, se .01, T/k = 16: .1 · .8 · (1 - .8^4) / .2, and twice the standard error.
    assert reach(closing=0.1, gamma=0.8, doublings=4) == pytest.approx(0.23616)
    assert reach(closing=0.1, gamma=0.5, doublings=4) == pytest.approx(0.09375)
    now, before = with_gap(0.20, 0.01), with_gap(0.30, 0.01)
    kept = judge(*now, before=before, gamma=0.8, doublings=4)
    assert kept.closing == pytest.approx(0.1)
    assert kept.threshold == pytest.approx(0.25616)
    assert not kept.leaves
    dropped = judge(*now, before=before, gamma=0.5, doublings=4)
    assert dropped.threshold == pytest.approx(0.11375)
    assert dropped.leaves


def test_a_gap_that_grows_has_no_reach_and_nobody_leaves_at_the_first_rung():
    now, before = with_gap(0.30, 0.01), with_gap(0.20, 0.01)
    judgement = judge(*now, before=before, gamma=0.8, doublings=4)
    assert judgement.threshold == pytest.approx(0.02)
    assert judgement.leaves
    assert not judge(*now, before=None, gamma=0.8, doublings=4).leaves


def test_no_guard_is_gamma_zero():
    assert reach(closing=0.5, gamma=0.0, doublings=3) == 0.0


def test_rungs():
    assert doubling_rungs(50, horizon=399) == (50, 100, 200)
    assert doubling_rungs(50, horizon=400) == (50, 100, 200, 400)
    assert doubling_rungs(50, horizon=49) == ()
    assert fixed_rungs(100, measurements=3) == (25, 50, 100)
    assert fixed_rungs(3, measurements=5) == (1, 3)
    assert fixed_rungs(0, measurements=3) == ()
    assert first_rung(warmup_steps=10, beta2=0.95) == 50
    assert first_rung(warmup_steps=10, beta2=0.999) == 1000
    assert first_rung(warmup_steps=300, beta2=0.99) == 300
    assert first_rung(warmup_steps=0, beta2=1.0) == 50


def test_halving_keeps_the_better_half_rounded_up():
    assert survivors_of_halving({"a": 3.0, "b": 1.0, "c": 2.0}) == {"b", "c"}
    assert survivors_of_halving({"b": 1.0, "a": 1.0}) == {"a"}


@pytest.mark.parametrize(
    ("total", "stages", "alpha", "expected"),
    [
        (100, 1, 1.0, (100,)),
        (600, 3, 1.0, (100, 200, 300)),
        (100, 3, 0.0, (33, 33, 34)),
        (1000, 3, 2.0, (71, 285, 644)),
    ],
)
def test_prop_alpha_stage_lengths(total, stages, alpha, expected):
    assert stage_steps(total, stages=stages, alpha=alpha) == expected
    assert sum(expected) == total


def standing(name: str, values: list[float], *, price: float = 1.0, exactness: int = 2) -> Standing:
    found = losses(values)
    return Standing(
        name=name, score=found.mean, losses=found, flops_per_step=price, exactness=exactness
    )


def test_ties_go_to_the_cheaper_then_the_exacter_then_the_first_name():
    same = [3.0, 2.0, 4.0]
    assert choose([standing("b", same), standing("a", same)], by_loss=True).winner == "a"
    exact = standing("z", same, exactness=0)
    assert choose([standing("a", same), exact], by_loss=True).winner == "z"
    cheap = standing("y", same, price=0.5)
    choice = choose([exact, standing("a", same), cheap], by_loss=True)
    assert choice.winner == "y"
    assert choice.contenders == ("a", "y", "z")


def test_a_clear_winner_has_no_contenders():
    best, worse = standing("b", [1.0, 2.0, 3.0]), standing("a", [1.5, 2.51, 3.49], price=0.1)
    choice = choose([worse, best], by_loss=True)
    assert (choice.winner, choice.contenders) == ("b", ("b",))


def test_other_scores_tie_only_where_they_are_equal():
    rough = [standing("a", [1.0, 9.0], price=0.1), standing("b", [5.0, 4.9])]
    assert choose(rough, by_loss=True).winner == "a"  # within chance, and cheaper
    assert choose(rough, by_loss=False).winner == "b"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(1, 5), min_size=4, max_size=4),
            st.sampled_from([1.0, 2.0]),
            st.sampled_from([0, 1, 2]),
        ),
        min_size=2,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_candidates_does_not_change_the_choice(drawn, random):
    standings = [
        standing(f"c{number}", values, price=price, exactness=exactness)
        for number, (values, price, exactness) in enumerate(drawn)
    ]
    shuffled = list(standings)
    random.shuffle(shuffled)
    assert choose(shuffled, by_loss=True) == choose(standings, by_loss=True)


def test_chance_is_two_standard_errors():
    assert Gap(value=0.02, se=0.01).may_be_chance
    assert not Gap(value=0.021, se=0.01).may_be_chance
