"""The ownership sheet against sums done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from samara.config import validate
from samara.errors import ConfigError
from samara.measure.compare import Interval
from samara.measure.ownership import Prices, load_prices, return_on_investment, version_cost

PRICES = {
    "device_hour": 2.0,
    "watts": 500,
    "kwh": 0.4,
    "storage_gigabyte_month": 0.5,
    "copies": 2,
    "months_kept": 10,
    "trials_per_version": 3,
    "switches_per_version": 100,
    "value_per_point": 50,
}


def test_every_part_is_what_a_hand_calculation_gives():
    prices = validate(Prices, PRICES)
    cost = version_cost(
        prices,
        training_seconds=1800,
        evaluation_seconds=360,
        storage_bytes=2e9,
        switch_seconds=3.6,
    )
    # an hour is 2.0 + 0.5 kW x 0.4 = 2.2
    assert cost.training == pytest.approx(3 * 0.5 * 2.2)
    assert cost.evaluation == pytest.approx(3 * 0.1 * 2.2)
    assert cost.storage == pytest.approx(2 * 2 * 10 * 0.5)
    assert cost.switching == pytest.approx(100 * 0.001 * 2.2)
    assert cost.total == pytest.approx(3.3 + 0.66 + 20 + 0.22)
    gain = Interval(value=0.02, low=0.0, high=0.04, confidence=0.95)
    found = return_on_investment(gain, cost, prices)
    assert found.value == pytest.approx((100 - 24.18) / 24.18)
    assert found.low == pytest.approx(-1)
    assert found.high == pytest.approx((200 - 24.18) / 24.18)


def test_what_costs_nothing_has_no_return():
    free = validate(
        Prices,
        {name: 1 if name == "copies" else 0 for name in PRICES if name != "trials_per_version"},
    )
    cost = version_cost(
        free, training_seconds=1, evaluation_seconds=1, storage_bytes=1, switch_seconds=1
    )
    gain = Interval(value=0.1, low=0.1, high=0.1, confidence=0.95)
    assert return_on_investment(gain, cost, free) is None


def test_the_price_file_is_checked(tmp_path):
    assert load_prices(Path(__file__).parents[3] / "benchmarks" / "prices.yaml").currency == "USD"
    (tmp_path / "prices.yaml").write_text("device_hours: 3\n")
    with pytest.raises(ConfigError, match=r"did you mean 'device_hour'"):
        load_prices(tmp_path / "prices.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_prices(tmp_path / "none.yaml")
