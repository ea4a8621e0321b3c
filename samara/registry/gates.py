"""Whether a version may have an alias: promote, hold or refuse, with the reason of each gate.

A gate passes when the evidence shows the good side, fails when it shows the bad side, and is
undecided in between: undecided means hold, and so do too few samples. What is missing counts as
failed, since nobody looked. Intervals of a difference are joined by squaring and adding the two
sides (Newcombe 1998, method 10), which holds for independent samples and is cautious for paired
ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from samara.registry.config import Gates, KpiGate
from samara.registry.records import Evaluation, Evidence

Outcome = Literal["promote", "hold", "refuse"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one gate says."""

    gate: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all gates say together: the worst of them."""

    findings: Sequence[Finding]

    @property
    def outcome(self) -> Outcome:
        """``refuse`` if any gate does, else ``hold`` if any gate does, else ``promote``."""
        outcomes = {finding.outcome for finding in self.findings}
        if "refuse" in outcomes:
            return "refuse"
        return "hold" if "hold" in outcomes else "promote"

    def text(self) -> str:
        """The gates that did not pass, or all of them, on one line."""
        shown = [f for f in self.findings if f.outcome != "promote"] or self.findings
        return "; ".join(f"{finding.gate}: {finding.reason}" for finding in shown)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A value with its interval, larger meaning better."""

    value: float
    low: float
    high: float


def decide(gates: Gates, candidate: Evidence, holder: Evidence | None) -> Decision:
    """Hold a version's evidence against the gates.

    Args:
        gates: What must hold.
        candidate: Evidence of the version that is to have the alias.
        holder: Evidence of the version that has it; None: nobody has.
    """
    findings = [_kpi(gate, gates, candidate, holder) for gate in gates.kpis]
    findings += [_audit(suite, candidate) for suite in gates.audits]
    return Decision(findings=findings)


def _kpi(gate: KpiGate, gates: Gates, candidate: Evidence, holder: Evidence | None) -> Finding:
    name = f"{gate.task} {gate.metric}"

    def finding(outcome: Outcome, reason: str) -> Finding:
        return Finding(gate=name, outcome=outcome, reason=reason)

    row = candidate.evaluation(gate.task, gate.metric)
    if row is None:
        return finding("refuse", "not measured")
    score = score_of(row, gate, gates.confidence)
    if score is None:
        return finding("refuse", "measured without an interval or number of items")
    if row.n is None:
        return finding("refuse", "measured without a number of items")
    if row.n < gate.min_samples:
        return finding("hold", f"{row.n} items, {gate.min_samples} are needed")
    reasons = []
    if gate.bound is not None:
        bound = _oriented(gate.bound, gate)
        text = f"{_interval(score, gate)} against the bound {gate.bound:g}"
        if score.high < bound:
            return finding("refuse", text)
        if score.low < bound:
            return finding("hold", text)
        reasons.append(text)
    if gate.max_loss is not None and holder is not None:
        relative = _relative(gate, gates, score, holder)
        if relative.outcome != "promote":
            return finding(relative.outcome, relative.reason)
        reasons.append(relative.reason)
    return finding("promote", ", ".join(reasons) or "nothing holds the alias to compare with")


def _relative(gate: KpiGate, gates: Gates, score: Score, holder: Evidence) -> Finding:
    assert gate.max_loss is not None
    row = holder.evaluation(gate.task, gate.metric)
    other = score_of(row, gate, gates.confidence) if row else None
    outcome: Outcome
    if other is None:
        outcome, reason = "refuse", "not measured for the version that holds the alias"
    else:
        change = score.value - other.value
        low = change - math.hypot(score.value - score.low, other.high - other.value)
        high = change + math.hypot(score.high - score.value, other.value - other.low)
        reason = f"gain {change:+.4g} [{low:+.4g}, {high:+.4g}], loss of {gate.max_loss:g} allowed"
        if high < -gate.max_loss:
            outcome = "refuse"
        else:
            outcome = "hold" if low < -gate.max_loss else "promote"
    return Finding(gate="", outcome=outcome, reason=reason)


def _audit(suite: str, candidate: Evidence) -> Finding:
    row = candidate.audit(suite)
    outcome: Outcome = "refuse"
    if row is not None and row.verdict != "fail":
        outcome = "promote" if row.verdict == "pass" else "hold"
    reason = f"verdict {row.verdict}" if row else "not audited"
    return Finding(gate=f"audit {suite}", outcome=outcome, reason=reason)


def score_of(row: Evaluation, gate: KpiGate, confidence: float) -> Score | None:
    """A score with its interval, turned so that larger is better; None where none can be had."""
    if row.ci is not None:
        low, high = row.ci
    elif gate.is_rate and row.n and 0 <= row.value <= 1:
        low, high = wilson(row.value, row.n, confidence)
    else:
        return None
    if not low <= row.value <= high or not math.isfinite(row.value):
        return None
    if gate.direction == "lower":
        return Score(value=-row.value, low=-high, high=-low)
    return Score(value=row.value, low=low, high=high)


def wilson(rate: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share of ``n`` items (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale


def _oriented(bound: float, gate: KpiGate) -> float:
    return -bound if gate.direction == "lower" else bound


def _interval(score: Score, gate: KpiGate) -> str:
    ends = sorted(_oriented(end, gate) for end in (score.low, score.high))
    return f"{_oriented(score.value, gate):.4g} [{ends[0]:.4g}, {ends[1]:.4g}]"
