"""Gates: pass, fail, and undecided; missing is failed, too few is undecided."""

from __future__ import annotations

import pytest

from samara.config import validate
from samara.errors import ConfigError
from samara.registry.config import Gates
from samara.registry.gates import decide, wilson
from samara.registry.records import Audit, Evaluation, Evidence

AUDITS = [Audit(suite="bias", verdict="pass"), Audit(suite="stability", verdict="pass")]


def gates(**kpi):
    return Gates.model_validate({"kpis": [{"task": "qa", "metric": "em", **kpi}]})


def evidence(value, ci=None, n=1000, audits=AUDITS):
    row = Evaluation(task="qa", metric="em", value=value, ci=ci, n=n)
    return Evidence(evaluations=[row], audits=audits)


@pytest.mark.parametrize(
    ("ci", "outcome"),
    [((0.61, 0.69), "promote"), ((0.55, 0.69), "hold"), ((0.5, 0.59), "refuse")],
)
def test_the_interval_decides_against_a_bound(ci, outcome):
    value = sum(ci) / 2
    assert decide(gates(bound=0.6), evidence(value, ci), None).outcome == outcome
    low, high = -ci[1], -ci[0]
    lower = gates(bound=-0.6, direction="lower")
    assert decide(lower, evidence(-value, (low, high)), None).outcome == outcome


@pytest.mark.parametrize(
    ("value", "outcome"), [(0.70, "promote"), (0.685, "promote"), (0.67, "hold"), (0.62, "refuse")]
)
def test_the_interval_of_the_difference_decides_against_the_holder(value, outcome):
    holder = evidence(0.70, (0.69, 0.71))
    candidate = evidence(value, (value - 0.01, value + 0.01))
    found = decide(gates(max_loss=0.03), candidate, holder)
    assert found.outcome == outcome
    # One percent on each side of both: 1.41 percent on each side of the difference.
    change = value - 0.70
    assert (
        f"[{change - 0.01 * 2**0.5:+.4g}, {change + 0.01 * 2**0.5:+.4g}]"
        in found.findings[0].reason
    )


def test_lower_is_better_against_the_holder():
    rule = gates(max_loss=0.1, direction="lower")
    holder = evidence(2.0, (1.95, 2.05))
    assert decide(rule, evidence(1.9, (1.85, 1.95)), holder).outcome == "promote"
    assert decide(rule, evidence(2.3, (2.25, 2.35)), holder).outcome == "refuse"


def test_without_a_holder_only_the_bound_counts():
    assert decide(gates(max_loss=0.0), evidence(0.1, (0.0, 0.2)), None).outcome == "promote"
    assert (
        decide(gates(max_loss=0.0, bound=0.6), evidence(0.1, (0.0, 0.2)), None).outcome == "refuse"
    )


@pytest.mark.parametrize(
    ("found", "outcome", "reason"),
    [
        (Evidence(audits=AUDITS), "refuse", "qa em: not measured"),
        (evidence(0.9), "refuse", "without an interval"),
        (evidence(0.9, (0.95, 0.99)), "refuse", "without an interval"),
        (evidence(float("nan"), (0.1, 0.2)), "refuse", "without an interval"),
        (evidence(0.9, (0.8, 0.95), n=None), "refuse", "without a number of items"),
        (evidence(0.9, (0.8, 0.95), n=99), "hold", "99 items, 100 are needed"),
        (evidence(0.9, (0.8, 0.95), audits=[]), "refuse", "audit bias: not audited"),
        (
            evidence(0.9, (0.8, 0.95), audits=[*AUDITS, Audit(suite="bias", verdict="fail")]),
            "refuse",
            "audit bias: verdict fail",
        ),
        (
            evidence(
                0.9, (0.8, 0.95), audits=[*AUDITS, Audit(suite="bias", verdict="inconclusive")]
            ),
            "hold",
            "audit bias: verdict inconclusive",
        ),
    ],
)
def test_what_is_missing_or_unclear_does_not_pass(found, outcome, reason):
    decision = decide(gates(bound=0.6), found, None)
    assert decision.outcome == outcome
    assert reason in decision.text()


def test_a_holder_that_was_not_measured_lets_nobody_pass():
    decision = decide(gates(max_loss=0.1), evidence(0.9, (0.8, 0.95)), Evidence())
    assert decision.outcome == "refuse"
    assert "not measured for the version that holds the alias" in decision.text()


def test_rates_get_wilsons_interval():
    low, high = wilson(0.9, 100, 0.95)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert wilson(1.0, 20, 0.95)[1] == pytest.approx(1.0)
    assert decide(gates(bound=0.82, is_rate=True), evidence(0.9, n=100), None).outcome == "promote"
    assert decide(gates(bound=0.85, is_rate=True), evidence(0.9, n=100), None).outcome == "hold"


def test_the_last_score_counts():
    both = evidence(0.9, (0.8, 0.95)) + evidence(0.3, (0.2, 0.4))
    assert decide(gates(bound=0.6), both, None).outcome == "refuse"


def test_gates_without_a_bound_or_with_a_misspelt_key_are_refused():
    with pytest.raises(ConfigError, match="give bound, max_loss, or both"):
        validate(Gates, {"kpis": [{"task": "qa", "metric": "em"}]})
    with pytest.raises(ConfigError, match="did you mean 'max_loss'"):
        validate(Gates, {"kpis": [{"task": "qa", "metric": "em", "max_los": 1}]})
    with pytest.raises(ConfigError, match="kpis"):
        validate(Gates, {"kpis": []})
