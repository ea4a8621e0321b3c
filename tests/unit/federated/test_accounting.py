"""What is spent: against the formula, against dp-accounting's figures, and against Opacus."""

from __future__ import annotations

import math

import pytest
from opacus.accountants import RDPAccountant

from samara.errors import ConfigError
from samara.federated.accounting import ORDERS, epsilon_of, make_budget, require_round
from samara.federated.privacy_config import GaussianPrivacy


def _by_hand(noise, rate, steps, delta):
    """Poisson-sampled Gaussian at whole orders (Mironov, Talwar and Zhang 2019), turned into
    epsilon by the formula of Canonne, Kamath and Steinke (2020)."""
    found = math.inf
    for order in range(2, 64):
        terms = [
            math.comb(order, k)
            * (1 - rate) ** (order - k)
            * rate**k
            * math.exp((k * k - k) / (2 * noise**2))
            for k in range(order + 1)
        ]
        divergence = steps * math.log(math.fsum(terms)) / (order - 1)
        epsilon = divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        found = min(found, epsilon)
    return found


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(4.0, 0.1, 50), (3.0, 0.01, 1000), (2.0, 0.05, 20)]
)
def test_epsilon_is_that_of_the_formula(noise, rate, steps):
    """Orders between the whole ones may only make it smaller, and little."""
    by_hand, found = _by_hand(noise, rate, steps, 1e-5), epsilon_of([(noise, rate, steps)], 1e-5)
    assert 0.97 * by_hand < found <= by_hand * (1 + 1e-9)


@pytest.mark.parametrize(("rate", "figure"), [(0.1, 4.02), (1.0, 49.4)])
def test_epsilon_is_that_of_dp_accounting(rate, figure):
    """dp-accounting 0.6.0, by Flower's RdpAccountant: noise 1, 50 rounds, delta 1e-3."""
    assert epsilon_of([(1.0, rate, 50)], 1e-3) == pytest.approx(figure, abs=0.05)


def test_epsilon_is_what_opacus_counts_step_by_step():
    accountant = RDPAccountant()
    for _ in range(30):
        accountant.step(noise_multiplier=1.3, sample_rate=0.2)
    expected = accountant.get_epsilon(1e-4, alphas=list(ORDERS))
    assert epsilon_of([(1.3, 0.2, 30)], 1e-4) == pytest.approx(expected, rel=1e-12)
    for _ in range(10):
        accountant.step(noise_multiplier=2.0, sample_rate=0.1)
    expected = accountant.get_epsilon(1e-4, alphas=list(ORDERS))
    mixed = [(1.3, 0.2, 30), (2.0, 0.1, 10)]
    assert epsilon_of(mixed, 1e-4) == pytest.approx(expected, rel=1e-12)


def _promise(**changes):
    return GaussianPrivacy(**{"epsilon": 4.0, "delta": 1e-3, "clip": 1.0, **changes})


def test_a_budget_allows_rounds_until_the_next_would_pass_it():
    budget = make_budget(
        _promise(noise_multiplier=1.0), rate=0.1, steps=1, rounds=1000, key="privacy.client"
    )
    last = max(rounds for rounds in range(100) if budget.allows(rounds))
    assert budget.spent(last) <= 4.0 < budget.spent(last + 1)
    assert last == 49  # 50 rounds spend 4.02
    assert budget.spent(0) == 0


def test_the_noise_that_is_left_out_is_the_smallest_for_all_rounds():
    budget = make_budget(_promise(), rate=0.1, steps=5, rounds=20, key="privacy.records")
    assert budget.allows(20)
    assert budget.spent(20) > 3.9
    assert not budget.allows(22)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"noise_multiplier": 0.3},
            r"privacy.client.noise_multiplier: with 0.3 the first round spends epsilon .* of 4; "
            "raise it",
        ),
        (
            {"epsilon": 1e-3, "delta": 1e-12},
            "privacy.client.epsilon: 0.001 is too little for 20 rounds with any noise; raise it",
        ),
    ],
)
def test_a_budget_that_no_round_fits_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        require_round(
            [make_budget(_promise(**changes), rate=r, steps=1, rounds=20, key="privacy.client")
             for r in (0.5, 0.6)], key="privacy.client",
        )  # fmt: skip
