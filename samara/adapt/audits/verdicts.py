"""From an interval and a limit to a verdict; audits as the registry's gates read them."""

from __future__ import annotations

import math
from typing import Literal

from samara.measure.compare import Interval
from samara.registry.records import Audit

Verdict = Literal["pass", "fail", "inconclusive"]


def within(change: Interval, limit: float) -> Verdict:
    """Whether a change for the worse stays within a limit, as far as its interval tells.

    ``pass``: the whole interval does; ``fail``: none of it does, or it is no number.
    """
    if math.isnan(change.value) or math.isnan(change.low) or math.isnan(change.high):
        return "fail"
    if change.high <= limit:
        return "pass"
    return "fail" if change.low > limit else "inconclusive"


def worst(verdicts: list[Verdict]) -> Verdict:
    """``fail`` if any fails, else ``inconclusive`` if any is, else ``pass``."""
    if "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"


def audit_row(
    suite: str,
    *,
    before: float | None,
    after: float,
    change: Interval | None,
    verdict: Verdict,
) -> Audit:
    """An audit; what is no finite number is left out, since JSON has none."""
    ends = None if change is None else (change.low, change.high)
    if ends is not None and not all(map(math.isfinite, ends)):
        ends = None
    return Audit(
        suite=suite,
        before=before if before is None or math.isfinite(before) else None,
        after=after if math.isfinite(after) else None,
        ci_of_change=ends,
        verdict=verdict,
    )
