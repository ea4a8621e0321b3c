"""Numbers as people read them: three significant digits, a unit, a real minus sign."""

from __future__ import annotations

import math

from samara.progress import duration

GAP = "\u202f"  # narrow space that does not break: between a number and its unit
MINUS = "\u2212"
DASH = "\u2013"
MISSING = "\u2014"

_WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_SMALL_PREFIXES = ("", "m", "\u00b5", "n")


def significant(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits and no exponent: ``0.0123``, ``1,230``."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    # Rounding may carry into one more digit (9.996 -> 10.0): ask again with the rounded value.
    rounded = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return _signed(f"{abs(rounded):,.{max(places, 0)}f}", rounded)


def prefixed(value: float, unit: str = "", *, digits: int = 3) -> str:
    """``value`` with an SI prefix: ``1.23 M``, ``45.1 kB``, ``3.20 mWh``."""
    size = abs(value)
    if size == 0:
        return f"0{GAP}{unit}" if unit else "0"
    power = math.floor(math.log10(float(f"{size:.{digits - 1}e}")) / 3)
    power = max(-len(_SMALL_PREFIXES) + 1, min(power, len(_PREFIXES) - 1))
    if power < 0 and not unit:
        return significant(value, digits)
    prefix = _PREFIXES[power] if power >= 0 else _SMALL_PREFIXES[-power]
    text = significant(value / 1000.0**power, digits)
    if power == 0 and float(value).is_integer():
        text = whole(value)
    return f"{text}{GAP}{prefix}{unit}" if prefix or unit else text


def count(value: float) -> str:
    """A large number of things: ``812``, ``1.23 k``, ``4.56 M``, ``7.89 B``."""
    return prefixed(value).replace(f"{GAP}G", f"{GAP}B")


def tick(value: float) -> str:
    """A round number on an axis: ``0``, ``200 k``, ``2.5 M``."""
    number, gap, prefix = prefixed(value).partition(GAP)
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number + gap + prefix


def whole(value: float) -> str:
    """An integer in full: ``61,204``."""
    return _signed(f"{abs(round(value)):,}", value)


def flops(value: float) -> str:
    """Floating-point operations: ``12.3 MFLOP``."""
    return prefixed(value, "FLOP")


def size(value: float) -> str:
    """Bytes, in decimal units: ``45.1 MB``."""
    return prefixed(value, "B")


def seconds(value: float) -> str:
    """A time: ``0.42 s``, ``41.3 s``, ``4 min 05 s``."""
    text = f"{significant(value)} s" if value < 59.95 else duration(value)
    return text.replace(" ", GAP)


def energy(kilowatt_hours: float) -> str:
    """Electric energy: ``3.20 Wh``."""
    return prefixed(kilowatt_hours * 1000, "Wh")


def money(value: float, currency: str) -> str:
    """Money: ``0.0012 USD``, ``3.46 USD``."""
    amount = significant(value, 2) if abs(value) < 1 else f"{value:,.2f}"
    return f"{amount}{GAP}{currency}"


def fixed(value: float, places: int = 3, *, sign: bool = False) -> str:
    """A number with fixed decimals, as losses are compared: ``4.120``, ``+0.031``."""
    text = f"{abs(value):,.{places}f}"
    # What rounds to zero has no sign: "-0.000" says nothing.
    if float(text.replace(",", "")) == 0:
        return text
    if value < 0:
        return MINUS + text
    return "+" + text if sign else text


def percent(share: float) -> str:
    """A share: ``38 %``, ``3.4 %``, ``0.31 %``."""
    return _percentage(share) + f"{GAP}%"


def change(ratio: float) -> str:
    """A ratio as a signed change: 0.62 -> ``-38 %``; 1 -> ``+-0 %``."""
    if _unchanged(ratio):
        return f"\u00b10{GAP}%"
    sign = MINUS if ratio < 1 else "+"
    return f"{sign}{percent(abs(ratio - 1))}"


def compared(ratio: float, less: str, more: str) -> str:
    """A ratio in words: ``38 % fewer``, ``2.0 % more``, or ``the same``.

    Args:
        ratio: The value over the baseline's.
        less: The word below 1, as ``fewer``.
        more: The word above 1, as ``more``.
    """
    if _unchanged(ratio):
        return "the same"
    return f"{percent(abs(ratio - 1))} {less if ratio < 1 else more}"


def number_word(value: int) -> str:
    """Small numbers as a word, for the start of a sentence: ``Three``."""
    return _WORDS[value] if value < len(_WORDS) else whole(value)


def plural(value: float, noun: str) -> str:
    """``1 document``, ``2 documents``."""
    return f"{whole(value)} {noun}" + ("" if value == 1 else "s")


def listed(items: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def shortened(text: str, length: int) -> str:
    """``text``, cut to ``length`` characters with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _percentage(share: float) -> str:
    value = abs(share) * 100
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:,.0f}"
    return significant(value, 2)


def _unchanged(ratio: float) -> bool:
    return abs(ratio - 1) < 0.0005


def _signed(text: str, value: float) -> str:
    return MINUS + text if value < 0 and text.strip("0.,") else text
