"""Streams repeat, differ by purpose, and are what they say; keys stay secret and stay the same."""

from __future__ import annotations

import math
import stat
import sys
from dataclasses import replace

import numpy as np
import pytest

from samara.errors import CheckpointError, ConfigError
from samara.federated.accounting import Budget
from samara.federated.privacy_config import GaussianPrivacy, PrivacyConfig, SecureSumConfig
from samara.federated.randomness import Secrets, Stream, require_packages

KEY = bytes(range(32))


def test_a_stream_repeats_and_no_two_purposes_share_numbers():
    one, same = (Stream(KEY, "noise-1") for _ in range(2))
    np.testing.assert_array_equal(one.words(100), same.words(100))
    np.testing.assert_array_equal(one.normal(7), same.normal(7))
    other, another = Stream(KEY, "noise-2").words(100), Stream(bytes(32), "noise-1").words(100)
    assert (Stream(KEY, "noise-1").words(100) == other).sum() < 3
    assert (Stream(KEY, "noise-1").words(100) == another).sum() < 3


def test_normal_numbers_are_normal():
    """Kolmogorov and Smirnov: the largest distance of the distributions, at 1 in 10 million."""
    values = np.sort(Stream(KEY, "normal").normal(100_001))
    exact = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in values])
    places = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(exact - places[:-1]).max(), np.abs(exact - places[1:]).max())
    assert distance < 2.9 / math.sqrt(len(values))
    drawn = Stream(KEY, "normal").normal(100_000)
    half = len(drawn) // 2
    assert abs(np.corrcoef(drawn[:half], drawn[half:])[0, 1]) < 5 / math.sqrt(half)


def test_uniform_numbers_are_never_0():
    values = Stream(KEY, "u").uniform(10_000)
    assert 0 < values.min() <= values.max() <= 1
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * len(values))


def test_secret_keys_are_drawn_once_and_are_for_their_owner_alone(tmp_path):
    privacy = PrivacyConfig()
    one, again = (Secrets(tmp_path / "a", privacy, seed=1) for _ in range(2))
    other = Secrets(tmp_path / "b", privacy, seed=1)
    assert one.server() == again.server() != other.server()
    assert len({one.server(), one.client(0), one.client(1)}) == 3
    file = tmp_path / "a/privacy/server.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list(file.parent.glob("*.tmp"))
    file.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="holds 5 bytes, a key has 32"):
        one.server()


def test_reproducible_keys_follow_from_the_seed(tmp_path):
    privacy = PrivacyConfig(randomness="reproducible")
    one, same = (Secrets(tmp_path / name, privacy, seed=1) for name in "ab")
    assert one.server() == same.server() != Secrets(tmp_path, privacy, seed=2).server()
    assert one.client(3) == same.client(3) != one.client(4)
    assert not list(tmp_path.rglob("*.key"))


def test_a_training_is_charged_once_and_never_beyond_the_budget(tmp_path):
    secrets = Secrets(tmp_path, PrivacyConfig(), seed=1)
    budget = Budget(epsilon=3.0, delta=0.01, noise_multiplier=1.0, rate=0.5, steps=1)
    assert (budget.allows(2), budget.allows(3)) == (True, False)
    trainings = [bytes([number]) * 32 for number in range(3)]
    assert all(secrets.charge(7, key, budget) for key in trainings[:2])
    assert secrets.charge(7, trainings[0], budget)  # done again after a crash
    assert not secrets.charge(7, trainings[2], budget)
    assert (secrets.charged(7), secrets.charged(8)) == ([(1.0, 0.5, 1)] * 2, [])
    again = Secrets(tmp_path, PrivacyConfig(), seed=1)
    assert again.charged(7) == secrets.charged(7)
    # More noise from now on changes nothing about what is spent.
    louder = replace(budget, noise_multiplier=100.0)
    assert louder.spent(0, past=again.charged(7)) == budget.spent(2)


@pytest.mark.parametrize(
    ("package", "privacy"),
    [
        ("cryptography", PrivacyConfig(secure_sum=SecureSumConfig(clip=1.0))),
        ("opacus", PrivacyConfig(client=GaussianPrivacy(epsilon=1, delta=0.1, clip=1))),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, privacy):
    require_packages(privacy)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"privacy: needs the packages .* 'samara\[privacy\]'"):
        require_packages(privacy)
    require_packages(PrivacyConfig())
