"""What the rules of ``samara grow`` would have chosen from recorded losses, and at what price.

The rules run as they are (:func:`samara.growth.selection.run_race`); only the measurements are
looked up instead of made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from growth_findings import EXACTNESS, Pool, Run, relative, rungs

from samara.growth.config import FixedRace, HalvingRace, PairedRace
from samara.growth.selection import Measurement, RaceRecord, RaceRule, run_race, rungs_of

GAMMA = 0.8
FIRST_RUNG = 25
CAPS = (0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A rule of the race on what was recorded.

    Attributes:
        rule: The rule.
        missing: Rungs that it needs and nobody measured: then nothing else is known.
        regret: Mean over seeds, in nats.
        relative_regret: As in :class:`growth_findings.Foretold`.
        spent: FLOPs of all candidates as a share of the stage's, mean over seeds; measuring is
            left out, for its FLOPs were not recorded.
        stopped_at: The last rung, of each seed.
        unresolved: Seeds in which the winner could not be told from another.
    """

    rule: RaceRule
    missing: tuple[int, ...] = ()
    regret: float = math.nan
    relative_regret: float = math.nan
    spent: float = math.nan
    stopped_at: tuple[int, ...] = ()
    unresolved: int = 0


def rules(steps: Sequence[int]) -> list[RaceRule]:
    """Those that are replayed: a fixed k at each rung, halving, the paired race by its cap."""
    fixed = [FixedRace(k=step, measurements=1) for step in steps[:-1]]
    paired = [PairedRace(cap=cap, gamma=GAMMA, first_rung=FIRST_RUNG) for cap in CAPS]
    return [*fixed, HalvingRace(cap=1.0, first_rung=FIRST_RUNG), *paired]


def replayed(pool: Pool) -> list[Replay]:
    """One finding per rule."""
    steps = rungs(pool)
    return [_replay(pool, rule, steps) for rule in rules(steps)]


def _replay(pool: Pool, rule: RaceRule, steps: Sequence[int]) -> Replay:
    horizon = steps[-1]
    needed = rungs_of(rule, horizon=horizon, first=FIRST_RUNG)
    if missing := tuple(step for step in needed if step not in steps):
        return Replay(rule=rule, missing=missing)
    records = {seed: _race(runs, rule, horizon) for seed, runs in pool.items()}
    regrets = {
        seed: pool[seed][record.winner].last - min(run.last for run in pool[seed].values())
        for seed, record in records.items()
    }
    return Replay(
        rule=rule,
        regret=statistics.fmean(regrets.values()),
        relative_regret=statistics.fmean(
            relative(regret, pool[seed]) for seed, regret in regrets.items()
        ),
        spent=statistics.fmean(
            record.spent / (horizon * _step_flops(pool[seed])) for seed, record in records.items()
        ),
        stopped_at=tuple(record.step for record in records.values()),
        unresolved=sum(not record.resolved for record in records.values()),
    )


def _race(runs: Mapping[str, Run], rule: RaceRule, horizon: int) -> RaceRecord:
    def look_up(names: Sequence[str], step: int) -> dict[str, Measurement]:
        return {
            name: Measurement(
                losses=runs[name].measured[step],
                flops_per_step=runs[name].flops_per_step,
                training_flops=step * runs[name].flops_per_step,
                measuring_flops=0.0,
                tokens=0,
                seconds=0.0,
                exactness=EXACTNESS.index(runs[name].exactness),
            )
            for name in names
        }

    return run_race(
        list(runs),
        rule=rule,
        horizon=horizon,
        first=FIRST_RUNG,
        step_flops=_step_flops(runs),
        metric="loss",
        measure=look_up,
    )


def _step_flops(runs: Mapping[str, Run]) -> float:
    return next(iter(runs.values())).flops_per_step
