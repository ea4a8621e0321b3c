"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samara.report import humanize


def plain(text: str) -> str:
    return text.replace(humanize.GAP, " ").replace(humanize.MINUS, "-")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,230"),
        (45.12, "45.1"),
        (9.996, "10.0"),
        (0.012345, "0.0123"),
        (-0.5, "-0.500"),
    ],
)
def test_significant(value, text):
    assert plain(humanize.significant(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999_424, "999 k"),
        (999_999, "1.00 M"),
        (1_234_567, "1.23 M"),
        (7.89e9, "7.89 B"),
        (2e28, "20,000 Y"),
    ],
)
def test_count(value, text):
    assert plain(humanize.count(value)) == text


def test_units():
    assert plain(humanize.flops(45.6e6)) == "45.6 MFLOP"
    assert plain(humanize.size(804_000_000)) == "804 MB"
    assert plain(humanize.size(0)) == "0 B"
    assert plain(humanize.energy(0.0032)) == "3.20 Wh"
    assert plain(humanize.energy(0.00000045)) == "450 µWh"
    assert plain(humanize.money(0.00013, "USD")) == "0.00013 USD"
    assert plain(humanize.money(3.456, "EUR")) == "3.46 EUR"
    assert plain(humanize.money(0, "EUR")) == "0 EUR"
    assert plain(humanize.prefixed(0.31)) == "0.310"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4213, "0.421 s"), (41.33, "41.3 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s")],
)
def test_seconds(value, text):
    assert plain(humanize.seconds(value)) == text


def test_fixed_has_no_negative_zero():
    assert plain(humanize.fixed(-0.0001, 3, sign=True)) == "0.000"
    assert plain(humanize.fixed(-0.0312, 3)) == "-0.031"
    assert plain(humanize.fixed(0.0312, 3, sign=True)) == "+0.031"


@pytest.mark.parametrize(
    ("ratio", "short", "words"),
    [
        (0.62, "-38 %", "38 % fewer"),
        (1.034, "+3.4 %", "3.4 % more"),
        (1.0, "±0 %", "the same"),
        (1.0002, "±0 %", "the same"),
        (3.5, "+250 %", "250 % more"),
    ],
)
def test_changes(ratio, short, words):
    assert plain(humanize.change(ratio)) == short
    assert plain(humanize.compared(ratio, "fewer", "more")) == words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (200_000, "200 k"), (2_500_000, "2.5 M"), (40, "40"), (0.5, "0.5")],
)
def test_ticks_have_no_idle_zeros(value, text):
    assert plain(humanize.tick(value)) == text


def test_words():
    assert humanize.number_word(3) == "Three"
    assert humanize.number_word(40) == "40"
    assert humanize.plural(1, "document") == "1 document"
    assert humanize.plural(1481, "document") == "1,481 documents"
    assert humanize.listed([]) == ""
    assert humanize.listed(["a"]) == "a"
    assert humanize.listed(["a", "b", "c"]) == "a, b and c"
    assert humanize.shortened("layer-wise", 10) == "layer-wise"
    assert humanize.shortened("CoLA + layer-wise", 8) == "CoLA +…"


@given(st.floats(min_value=1e-9, max_value=1e20))
def test_prefixed_is_true_to_three_digits(value):
    number, _, prefix = plain(humanize.prefixed(value, "B")).partition(" ")
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    factor |= {"m": 1e-3, "µ": 1e-6, "n": 1e-9}
    back = float(number.replace(",", "")) * factor[prefix.removesuffix("B")]
    assert back == pytest.approx(value, rel=0.0051)
    assert len(number.replace(".", "").replace(",", "").lstrip("0")) <= 4
