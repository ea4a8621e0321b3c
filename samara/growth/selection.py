"""One race from its candidates to its winner: who is measured when, who leaves, what it costs.

Nothing here trains: :func:`run_race` asks for measurements and applies the rules of
:mod:`samara.growth.race`. Measurements that exist are found again by whoever makes them, so an
interrupted race is simply run again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from samara.errors import RaceError
from samara.growth.config import FixedRace, HalvingRace, PairedRace, ProposalsConfig
from samara.growth.metrics import (
    Agreement,
    Curve,
    Foretelling,
    Metric,
    agreement,
    best_metric,
    foretelling,
    score,
    settled_at,
)
from samara.growth.race import (
    Judgement,
    Losses,
    Standing,
    choose,
    doubling_rungs,
    fixed_rungs,
    judge,
    survivors_of_halving,
)

RaceRule = FixedRace | HalvingRace | PairedRace


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found of a candidate after so many steps.

    Attributes:
        losses: Over the units of the validation set.
        flops_per_step: Training FLOPs of one step.
        training_flops: Spent on training since growth.
        measuring_flops: Spent on this measurement.
        tokens: Read since growth.
        seconds: Training time since growth.
        exactness: How well growth kept the function: 0 is best.
        indicators: Values beside the loss, by name.
    """

    losses: Losses
    flops_per_step: float
    training_flops: float
    measuring_flops: float
    tokens: int
    seconds: float
    exactness: int
    indicators: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a candidate is out of the race through no rule of it."""

    reason: str


Outcome = Measurement | Failure
Measure = Callable[[Sequence[str], int], Mapping[str, Outcome]]
"""From candidates and a number of steps since growth to what was found of each."""


@dataclass(kw_only=True)
class Entrant:
    """A candidate in the race.

    Attributes:
        name: What identifies it, whatever its place in the recipe.
        measured: By steps since growth.
        joined_at: The rung after which it was proposed; None: from the start.
        left_at: The rung at which it was ruled out.
        failure: Why it is out otherwise.
    """

    name: str
    measured: dict[int, Measurement] = field(default_factory=dict)
    joined_at: int | None = None
    left_at: int | None = None
    failure: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether it may still win."""
        return self.left_at is None and self.failure is None

    @property
    def last(self) -> Measurement:
        """The latest measurement."""
        return self.measured[max(self.measured)]

    @property
    def flops(self) -> float:
        """Spent so far, measuring included."""
        if not self.measured:
            return 0.0
        measuring = sum(one.measuring_flops for one in self.measured.values())
        return self.last.training_flops + measuring

    def price(self, step: int) -> float:
        """FLOPs to go from the latest rung to ``step`` and measure there."""
        steps = step - max(self.measured)
        return steps * self.last.flops_per_step + self.last.measuring_flops

    def curve(self) -> Curve:
        """Its losses and indicators by step."""
        names = {name for one in self.measured.values() for name in one.indicators}
        return Curve(
            loss={step: one.losses.mean for step, one in self.measured.items()},
            indicators={
                name: {s: m.indicators[name] for s, m in self.measured.items()}
                for name in sorted(names)
            },
        )


@dataclass(frozen=True, kw_only=True)
class Rung:
    """What was decided after so many steps.

    Attributes:
        step: Steps since growth.
        leader: The lowest loss.
        judgements: Of the others that were live, by name; only the paired race makes them.
        left: Who left.
        spent: FLOPs of all candidates so far.
    """

    step: int
    leader: str
    judgements: Mapping[str, Judgement]
    left: tuple[str, ...]
    spent: float


@dataclass(kw_only=True)
class RaceRecord:
    """A race: its candidates, what happened, and who won.

    Attributes:
        horizon: Steps that the winner trains in all.
        cap_flops: What the candidates may spend together; None: what the fixed rule costs.
        entrants: By name.
        rungs: The decisions, the one after 0 steps first.
        stopped_by: ``k``, ``one_left``, ``horizon`` or ``cap``.
        metric: What decided among those left.
        foretold: Per metric, how well it foretold later rungs.
        winner: Who goes on.
        contenders: Who could not be told from the best.
        resolved: Whether the race tells the winner from all others.
        failed_flops: Charged for rungs that candidates failed in.
    """

    horizon: int
    cap_flops: float | None
    entrants: dict[str, Entrant] = field(default_factory=dict)
    rungs: list[Rung] = field(default_factory=list)
    stopped_by: str = ""
    metric: Metric = "loss"
    foretold: Mapping[Metric, Foretelling] = field(default_factory=dict)
    winner: str = ""
    contenders: tuple[str, ...] = ()
    resolved: bool = False
    failed_flops: float = 0.0

    @property
    def live(self) -> list[Entrant]:
        """Those that may still win, by name."""
        return [
            self.entrants[name] for name in sorted(self.entrants) if self.entrants[name].is_live
        ]

    @property
    def spent(self) -> float:
        """FLOPs of all candidates so far; who failed is charged the whole rung he failed in."""
        return sum(one.flops for one in self.entrants.values()) + self.failed_flops

    @property
    def step(self) -> int:
        """Steps since growth at the last rung."""
        return self.rungs[-1].step if self.rungs else 0

    def curves(self) -> dict[str, Curve]:
        """Losses and indicators of all that were measured, by name."""
        return {name: one.curve() for name, one in self.entrants.items() if one.measured}

    def agreements(self) -> list[Agreement]:
        """Between each rung and the next."""
        curves, steps = self.curves(), [rung.step for rung in self.rungs]
        return [agreement(curves, a, b) for a, b in itertools.pairwise(steps)]

    def settled_at(self) -> int | None:
        """From which rung on the ranking was what it is at the end."""
        return settled_at(self.curves())

    # --- the steps of a race ------------------------------------------------------------------

    def measure(self, names: Sequence[str], step: int, by: Measure) -> None:
        """Take candidates to ``step``; what fails is out."""
        for name, outcome in by(names, step).items():
            entrant = self.entrants[name]
            if isinstance(outcome, Failure):
                self.failed_flops += entrant.price(step) if entrant.measured else 0.0
                entrant.failure = outcome.reason
            else:
                entrant.measured[step] = outcome
        if not self.live:
            reasons = "; ".join(f"{n}: {self.entrants[n].failure}" for n in sorted(self.entrants))
            raise RaceError(
                f"candidates: all {len(self.entrants)} failed ({reasons}); the source is untouched"
            )

    @property
    def undecided(self) -> list[str]:
        """Where the race is unresolved: between whom."""
        if self.resolved or not self.winner:
            return []
        return list(self.contenders) if len(self.contenders) > 1 else [o.name for o in self.live]

    def affords(self, price: float) -> bool:
        """Whether the cap leaves room for it."""
        return self.cap_flops is None or self.spent + price <= self.cap_flops

    def decide(self, step: int, rule: RaceRule) -> None:
        """Let those leave that the rule sends away after ``step``."""
        leader = min(self.live, key=lambda one: (one.measured[step].losses.mean, one.name))
        judgements: dict[str, Judgement] = {}
        if isinstance(rule, PairedRace) and step > 0:
            judgements = self._judgements(step, leader, rule)
            leaving = {name for name, judgement in judgements.items() if judgement.leaves}
        elif isinstance(rule, HalvingRace) and step > 0:
            means = {one.name: one.measured[step].losses.mean for one in self.live}
            leaving = means.keys() - survivors_of_halving(means)
        else:
            leaving = set()
        for name in leaving:
            self.entrants[name].left_at = step
        self.rungs.append(
            Rung(
                step=step,
                leader=leader.name,
                judgements=judgements,
                left=tuple(sorted(leaving)),
                spent=self.spent,
            )
        )

    def _judgements(self, step: int, leader: Entrant, rule: PairedRace) -> dict[str, Judgement]:
        before = self.rungs[-1].step if self.rungs and self.rungs[-1].step > 0 else None
        now = leader.measured[step].losses
        return {
            one.name: judge(
                one.measured[step].losses,
                now,
                before=None
                if before is None
                else (one.measured[before].losses, leader.measured[before].losses),
                gamma=rule.gamma,
                doublings=math.log2(self.horizon / step),
            )
            for one in self.live
            if one is not leader
        }

    def choose(self, wanted: Metric | None, rule: RaceRule | None) -> None:
        """Pick the winner among those left; ``wanted`` None: by what foretold best."""
        step, curves = self.step, self.curves()
        self.foretold = foretelling(curves, horizon=self.horizon)
        self.metric = wanted if wanted is not None else best_metric(self.foretold)
        scores = {
            one.name: score(self.metric, curves[one.name], step=step, horizon=self.horizon)
            for one in self.live
        }
        if any(value is None for value in scores.values()):  # too early for this metric
            self.metric = "loss"
            scores = {one.name: one.measured[step].losses.mean for one in self.live}
        choice = choose(
            [
                Standing(
                    name=one.name,
                    score=float(scores[one.name] or 0.0),
                    losses=one.measured[step].losses,
                    flops_per_step=one.last.flops_per_step,
                    exactness=one.last.exactness,
                )
                for one in self.live
            ],
            by_loss=self.metric == "loss",
        )
        self.winner, self.contenders = choice.winner, choice.contenders
        several = isinstance(rule, PairedRace) and len(self.live) > 1
        self.resolved = len(choice.contenders) == 1 and not several


def rungs_of(rule: RaceRule, *, horizon: int, first: int) -> tuple[int, ...]:
    """The steps at which a rule measures, 0 left out."""
    if isinstance(rule, FixedRace):
        return fixed_rungs(rule.k, measurements=rule.measurements)
    return doubling_rungs(rule.first_rung or first, horizon=horizon)


def run_race(
    names: Sequence[str],
    *,
    rule: RaceRule | None,
    horizon: int,
    first: int,
    step_flops: float,
    metric: Metric | None,
    measure: Measure,
    proposals: ProposalsConfig | None = None,
    propose: Callable[[RaceRecord, int], Sequence[str]] = lambda _record, _count: (),
    on_rung: Callable[[RaceRecord], None] = lambda _: None,
) -> RaceRecord:
    """Race to the winner.

    Args:
        names: The candidates, in any order.
        rule: When who leaves; None: there is nothing to choose.
        horizon: Steps that the winner trains in all.
        first: The first rung where the rule names none.
        step_flops: What the cap is a share of, per step of the horizon.
        metric: Ranks those left at the end; None: the one that foretold best.
        measure: Makes the measurements.
        proposals: When new candidates come, and how many.
        propose: From the race so far and a number to the names of so many new candidates, at most.
        on_rung: Called after each decision.

    Raises:
        RaceError: If every candidate fails.
    """
    cap = None if rule is None or isinstance(rule, FixedRace) else rule.cap
    record = RaceRecord(
        horizon=horizon,
        cap_flops=None if cap is None else cap * horizon * step_flops,
        entrants={name: Entrant(name=name) for name in sorted(names)},
    )
    record.measure(sorted(names), 0, measure)
    rungs = () if rule is None else rungs_of(rule, horizon=horizon, first=first)
    if rule is not None:
        record.decide(0, rule)
        on_rung(record)
    for number, rung in enumerate(rungs, start=1):
        assert rule is not None
        coming = proposals is not None and number <= proposals.at_rung
        if len(record.live) < 2 and not coming:
            record.stopped_by = "one_left"
            break
        if not record.affords(sum(one.price(rung) for one in record.live)):
            record.stopped_by = "cap"
            break
        record.measure([one.name for one in record.live], rung, measure)
        if proposals is not None and number == proposals.at_rung:
            _join(record, proposals.count, rungs[:number], propose, measure)
        record.decide(rung, rule)
        on_rung(record)
    if not record.stopped_by:
        record.stopped_by = "k" if isinstance(rule, FixedRace) else "horizon"
        if rule is None or len(record.live) == 1:
            record.stopped_by = "one_left"
    record.choose(metric, rule)
    return record


def _join(
    record: RaceRecord,
    count: int,
    rungs: Sequence[int],
    propose: Callable[[RaceRecord, int], Sequence[str]],
    measure: Measure,
) -> None:
    """Let proposed candidates train up to the rung that the others have reached."""
    live = record.live[0]
    price = rungs[-1] * live.last.flops_per_step + (len(rungs) + 1) * live.last.measuring_flops
    while count and not record.affords(count * price):
        count -= 1
    names = list(propose(record, count)) if count else []
    for name in names:
        record.entrants[name] = Entrant(name=name, joined_at=rungs[-1])
    for step in (0, *rungs):
        going = [name for name in names if record.entrants[name].is_live]
        if going:
            record.measure(going, step, measure)
