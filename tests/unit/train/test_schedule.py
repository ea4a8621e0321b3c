from __future__ import annotations

import math

import pytest

from samara.train.config import Cosine, WarmupStableDecay
from samara.train.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (1, 1e-6 + (5.3e-3 - 1e-6) / 5000),
        (4999, 1e-6 + 4999 * (5.3e-3 - 1e-6) / 5000),
        (5000, 5.3e-3),
        (177_500, 5.3e-4 + 0.5 * 4.77e-3 * (1 + math.cos(math.pi * 172_500 / 345_001))),
        (350_000, 5.3e-4 + 0.5 * 4.77e-3 * (1 + math.cos(math.pi * 345_000 / 345_001))),
    ],
)
def test_cosine_equals_openelm_270m(step: int, expected: float) -> None:
    schedule = Cosine(warmup_steps=5000, initial_lr=1e-6, final_fraction=0.1)

    found = learning_rate(schedule, step=step, num_steps=350_000, peak=5.3e-3)

    assert found == pytest.approx(expected, rel=1e-14)


def test_cosine_ends_at_the_floor() -> None:
    schedule = Cosine(warmup_steps=5000, initial_lr=1e-6, final_fraction=0.1)

    found = learning_rate(schedule, step=350_000, num_steps=350_000, peak=5.3e-3)

    assert found == pytest.approx(5.3e-4, rel=1e-9)


def test_stable_decay_table() -> None:
    schedule = WarmupStableDecay(warmup_steps=4, decay_fraction=0.4, final_fraction=0.25)

    found = [learning_rate(schedule, step=step, num_steps=10, peak=8.0) for step in range(11)]

    assert found == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 6.5, 5.0, 3.5, 2.0]


def test_stable_decay_with_sqrt() -> None:
    schedule = WarmupStableDecay(warmup_steps=0, decay_fraction=0.4, shape="sqrt")

    found = [learning_rate(schedule, step=step, num_steps=10, peak=1.0) for step in range(6, 11)]

    assert found == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0])


def test_stable_decay_never_overlaps_warmup() -> None:
    schedule = WarmupStableDecay(warmup_steps=8, decay_fraction=0.5, initial_lr=0.1)

    found = [learning_rate(schedule, step=step, num_steps=10, peak=1.0) for step in (0, 8, 9)]

    assert found == pytest.approx([0.1, 1.0, 0.5])


@pytest.mark.parametrize(("num_steps", "expected"), [(10, 0), (50, 1), (1000, 20)])
def test_warmup_is_two_percent_where_none_is_named(num_steps: int, expected: int) -> None:
    assert warmup_steps(Cosine(), num_steps=num_steps) == expected
    assert warmup_steps(WarmupStableDecay(), num_steps=num_steps) == expected


def test_no_warmup_starts_at_the_peak() -> None:
    found = learning_rate(Cosine(warmup_steps=0), step=0, num_steps=10, peak=3e-4)

    assert found == pytest.approx(3e-4, rel=1e-14)
