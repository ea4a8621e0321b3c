"""A race as plain data for ``race.json``, and as lines for who watches. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from samara.growth.operator_config import OperatorConfig
from samara.growth.plan import check_growth
from samara.growth.selection import Entrant, RaceRecord, RaceRule, Rung
from samara.growth.stages import GrowthStage


def race_data(
    record: RaceRecord,
    *,
    stage: GrowthStage,
    operators: Mapping[str, OperatorConfig],
    proposed: Mapping[str, str],
    loss_before: float,
    rule: RaceRule | None,
    step_tokens: int,
) -> dict[str, Any]:
    """All that is known of a race.

    Args:
        record: The race, over or not.
        stage: Which growth.
        operators: The candidates' settings, by label.
        proposed: Of those that joined later, whose neighbour they are.
        loss_before: Validation loss of the source.
        rule: What decided who left.
        step_tokens: Tokens of one step.
    """
    settled = record.settled_at()
    own = record.entrants[record.winner].last.training_flops if record.winner else 0.0
    return {
        "stage": stage.number,
        "first_step": stage.first_step,
        "steps": record.horizon,
        "loss_before": loss_before,
        "rule": rule.model_dump(mode="json") if rule is not None else None,
        "candidates": [
            _candidate(record.entrants[name], stage, operators[name], proposed.get(name))
            for name in sorted(record.entrants)
        ],
        "left_out": dict(stage.left_out),
        "rungs": [_rung(rung, step_tokens, record.horizon) for rung in record.rungs],
        "agreement": [asdict(one) for one in record.agreements()],
        "settled_at": settled,
        "settled_at_tokens": None if settled is None else settled * step_tokens,
        "k": record.step,
        "k_tokens": record.step * step_tokens,
        "k_share": record.step / record.horizon,
        "stopped_by": record.stopped_by,
        "metric": record.metric,
        "foretold": {metric: asdict(one) for metric, one in record.foretold.items()},
        "winner": record.winner or None,
        "contenders": list(record.contenders),
        "undecided": record.undecided,
        "verdict": ("resolved" if record.resolved else "unresolved") if record.winner else None,
        "cap_flops": record.cap_flops,
        "spent_flops": record.spent,
        "net_flops": record.spent - own,
    }


def _candidate(
    entrant: Entrant, stage: GrowthStage, operator: OperatorConfig, parent: str | None
) -> dict[str, Any]:
    plan = check_growth(stage.source, stage.target, operator)
    curve = entrant.curve()
    last = entrant.last if entrant.measured else None
    return {
        "label": entrant.name,
        "operator": operator.model_dump(mode="json"),
        "layer_map": str(plan.layer_map),
        "exactness": plan.exactness,
        "warnings": list(plan.warnings),
        "proposed_from": parent,
        "joined_at": entrant.joined_at,
        "left_at": entrant.left_at,
        "failure": entrant.failure,
        "losses": {str(step): loss for step, loss in sorted(curve.loss.items())},
        "indicators": {
            name: {str(step): value for step, value in sorted(values.items())}
            for name, values in curve.indicators.items()
        },
        "num_units": 0 if last is None else len(last.losses.num_targets),
        "flops": entrant.flops,
        "tokens": 0 if last is None else last.tokens,
        "seconds": 0.0 if last is None else last.seconds,
    }


def _rung(rung: Rung, step_tokens: int, horizon: int) -> dict[str, Any]:
    return {
        "step": rung.step,
        "tokens": rung.step * step_tokens,
        "share": rung.step / horizon,
        "leader": rung.leader,
        "left": list(rung.left),
        "spent_flops": rung.spent,
        "gaps": {
            name: {
                "gap": one.gap.value,
                "se": one.gap.se,
                "closing": one.closing,
                "threshold": one.threshold,
            }
            for name, one in sorted(rung.judgements.items())
        },
    }


def rung_lines(record: RaceRecord) -> Iterator[str]:
    """What the latest rung showed, best candidate first."""
    rung = record.rungs[-1]
    if rung.step == 0:
        return
    found = [
        (one.measured[rung.step].losses.mean, name)
        for name, one in record.entrants.items()
        if rung.step in one.measured
    ]
    shown = ", ".join(f"{name} {loss:.4f}" for loss, name in sorted(found))
    yield f"after {rung.step} steps: {shown}"
    for name in rung.left:
        yield f"{name} leaves after {rung.step} steps"


STOPPED_BY = {
    "k": "k is reached",
    "one_left": "one is left",
    "horizon": "the next rung lies beyond the end",
    "cap": "the next rung would exceed the cap",
}


def verdict_line(record: RaceRecord) -> str:
    """Who goes on, why the race ended, and whether it told the winner from the others."""
    why = STOPPED_BY[record.stopped_by]
    line = f"{record.winner} goes on from step {record.step} ({why}, ranked by {record.metric})"
    if record.undecided:
        line += f"; unresolved among {', '.join(record.undecided)}"
    return line
