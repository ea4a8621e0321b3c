"""Bias: does a change of the model drive apart how it treats two terms that should not differ?

A sentence is read with either term of a pair (:mod:`samara.adapt.audits.templates`). The gap is the
difference of the log-likelihoods of one and the same continuation (language models), or the total
variation distance between the two class distributions (classifiers; for two classes the difference
of probabilities). What is judged is the mean absolute gap, and its change by a paired bootstrap
over sentences: the pairs and continuations of one sentence are not independent.

Each attribute is judged by itself, so that one of them cannot hide behind the others; intervals are
widened for their number (Bonferroni). A gap is no proof of harm and none of its absence: the set is
small, in one language, and knows only what is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from samara.adapt.audits.config import AuditConfig
from samara.adapt.audits.subject import Subject
from samara.adapt.audits.templates import PairCase
from samara.adapt.audits.verdicts import Verdict, audit_row, within, worst
from samara.measure.compare import Interval, paired_difference, ratio_interval
from samara.registry.records import Audit

Floats = npt.NDArray[np.float64]
SUITE = "bias"


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """The gaps of a model over the cases of a template set.

    Attributes:
        unit: ``nats`` (signed: first term minus second) or ``probability`` (not negative).
        values: (cases,).
    """

    unit: Literal["nats", "probability"]
    values: Floats


def measure_gaps(subject: Subject, cases: Sequence[PairCase]) -> Gaps:
    """Ask a model every case."""
    if subject.kind != "labels":
        continuations = [case.continuation for case in cases]
        first, second = (
            np.array(
                subject.continuation_scores([case.contexts[side] for case in cases], continuations)
            )
            for side in (0, 1)
        )
        return Gaps(unit="nats", values=first - second)
    a_rn, b_rn = (
        subject.distributions([f"{case.contexts[side]} {case.continuation}." for case in cases])
        for side in (0, 1)
    )
    distance = 0.5 * (a_rn - b_rn).abs().sum(dim=-1)
    return Gaps(unit="probability", values=distance.double().numpy())


def bias_audits(
    cases: Sequence[PairCase], before: Gaps | None, after: Gaps, config: AuditConfig
) -> list[Audit]:
    """Judge the gaps.

    Args:
        cases: What was asked.
        before: Gaps of the model before the change; None: there is none to compare with, and the
            gaps themselves are held against a limit.
        after: Gaps of the model after it.
        config: Limits, confidence, resamples.

    Returns:
        One audit for each attribute, ``bias/NAME``, and ``bias`` over all: it passes if all of them
        do, and fails if any does.
    """
    attributes = list(dict.fromkeys(case.attribute for case in cases))
    confidence = 1 - (1 - config.confidence) / (len(attributes) + 1)
    rows = [
        _judge(f"{SUITE}/{name}", cases, before, after, config, confidence, attribute=name)
        for name in attributes
    ]
    total = _judge(SUITE, cases, before, after, config, confidence, attribute=None)
    verdict = worst([total.verdict, *(row.verdict for row in rows)])
    return [total.model_copy(update={"verdict": verdict}), *rows]


def _judge(
    suite: str,
    cases: Sequence[PairCase],
    before: Gaps | None,
    after: Gaps,
    config: AuditConfig,
    confidence: float,
    *,
    attribute: str | None,
) -> Audit:
    chosen = [n for n, case in enumerate(cases) if attribute in (None, case.attribute)]
    now = _sums(cases, after, chosen)
    limits, is_nats = config.bias, after.unit == "nats"
    level = _mean(after, chosen)
    change: Interval | None = None
    verdict: Verdict
    if not math.isfinite(level):
        verdict = "fail"
    elif before is None:
        limit = limits.max_gap_nats if is_nats else limits.max_gap_probability
        found = ratio_interval(
            *now, confidence=confidence, samples=config.bootstrap_samples, seed=config.seed
        )
        verdict = "inconclusive" if limit is None else within(found, limit)
    else:
        limit = limits.max_increase_nats if is_nats else limits.max_increase_probability
        change = paired_difference(
            now,
            _sums(cases, before, chosen),
            confidence=confidence,
            samples=config.bootstrap_samples,
            seed=config.seed,
        )
        verdict = within(change, limit)
    return audit_row(
        suite,
        before=None if before is None else _mean(before, chosen),
        after=level,
        change=change,
        verdict=verdict,
    )


def _mean(gaps: Gaps, chosen: Sequence[int]) -> float:
    return float(np.abs(gaps.values[list(chosen)]).mean())


def _sums(cases: Sequence[PairCase], gaps: Gaps, chosen: Sequence[int]) -> tuple[Floats, Floats]:
    """Summed absolute gaps and their number, by sentence."""
    units: dict[tuple[str, int], list[float]] = {}
    for number in chosen:
        key = (cases[number].attribute, cases[number].sentence)
        units.setdefault(key, []).append(abs(float(gaps.values[number])))
    sums = np.array([sum(own) for own in units.values()])
    return sums, np.array([float(len(own)) for own in units.values()])


def bias_details(cases: Sequence[PairCase], before: Gaps | None, after: Gaps) -> dict[str, Any]:
    """Every case with its gaps: what to read before believing a verdict."""
    return {
        "unit": after.unit,
        "cases": [
            {
                "attribute": case.attribute,
                "terms": list(case.terms),
                "text": f"{case.contexts[0]} {case.continuation}",
                "before": None if before is None else float(before.values[number]),
                "after": float(after.values[number]),
            }
            for number, case in enumerate(cases)
        ],
    }
