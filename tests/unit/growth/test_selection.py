"""A race from its candidates to its winner, on curves that are written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.errors import RaceError
from samara.growth.config import FixedRace, HalvingRace, PairedRace, ProposalsConfig
from samara.growth.race import Losses
from samara.growth.selection import (
    Failure,
    Measure,
    Measurement,
    Outcome,
    RaceRecord,
    RaceRule,
    run_race,
)

UNITS = 64
STEP_FLOPS = 100.0
MEASURING = 7.0
HORIZON = 1600

Curves = Mapping[str, Callable[[int], float]]


def power(floor: float, size: float, bump: float = 0.0) -> Callable[[int], float]:
    """Training from ``size`` above a floor, after a bump that recovers."""
    return lambda step: floor + size * (step + 20) ** -0.4 + bump * 2.0 ** (-step / 40)


def measuring(
    curves: Curves,
    *,
    fails: Mapping[str, int] = {},
    exactness: Mapping[str, int] = {},
    prices: Mapping[str, float] = {},
    indicators: Mapping[str, float] = {},
    asked: list[tuple[str, int]] | None = None,
) -> Measure:
    """Measurements off curves, with the same easy and hard units for all and a little of one's own.

    ``fails`` maps a candidate to the step at which it does.
    """

    def measure(names: Sequence[str], step: int) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        for name in names:
            if asked is not None:
                asked.append((name, step))
            if fails.get(name) == step:
                found[name] = Failure(reason="its loss is nan")
                continue
            hard = np.sin(np.arange(UNITS)) * 0.5
            seed = sum(map(ord, name)) % 1000
            own = np.random.default_rng(seed).normal(0.0, 0.01, UNITS)
            own -= own.mean()
            price = prices.get(name, STEP_FLOPS)
            found[name] = Measurement(
                losses=Losses(
                    nll_sum=(curves[name](step) + hard + own) * 8, num_targets=np.full(UNITS, 8.0)
                ),
                flops_per_step=price,
                training_flops=step * price,
                measuring_flops=MEASURING,
                tokens=step * 10,
                seconds=1.0,
                exactness=exactness.get(name, 2),
                indicators={"sharpness": indicators[name]} if name in indicators else {},
            )
        return found

    return measure


def race(curves: Curves, rule: RaceRule | None, **changes: Any) -> RaceRecord:
    names = changes.pop("names", list(curves))
    settings = {
        "horizon": HORIZON,
        "first": 50,
        "step_flops": STEP_FLOPS,
        "metric": "loss",
        "measure": measuring(curves),
    }
    return run_race(names, rule=rule, **{**settings, **changes})


PAIRED = PairedRace(cap=5.0)
CURVES: Curves = {
    # Function-preserving: best at first, and worst in the end.
    "exact": power(2.6, 2.0),
    "stack": power(2.0, 3.0, bump=2.0),
    "random": power(2.9, 3.0, bump=1.0),
}


def test_the_paired_race_waits_out_the_recovery_and_finds_the_best():
    record = race(CURVES, PAIRED)
    assert record.rungs[0].leader == "exact"
    assert record.winner == "stack"
    assert record.resolved
    assert record.stopped_by == "one_left"
    assert record.rungs[1].left == ()  # nobody leaves at the first rung
    assert all(one.left_at is not None for n, one in record.entrants.items() if n != "stack")


def test_the_settle_point_is_found_where_the_race_goes_on_after_it():
    record = race(CURVES, FixedRace(k=400, measurements=4))
    assert [rung.leader for rung in record.rungs] == ["exact", "exact", "stack", "stack", "stack"]
    assert record.settled_at() == 100
    assert [one.same_leader for one in record.agreements()] == [True, False, True, True]


def test_k_0_is_the_loss_at_the_start():
    record = race(CURVES, FixedRace(k=0))
    assert record.winner == "exact"
    assert [rung.step for rung in record.rungs] == [0]
    assert record.spent == 3 * MEASURING


def test_fixed_k_measures_on_the_way_and_decides_at_k():
    record = race(CURVES, FixedRace(k=200))
    assert [rung.step for rung in record.rungs] == [0, 50, 100, 200]
    assert (record.winner, record.stopped_by, record.step) == ("stack", "k", 200)
    assert record.spent == 3 * (200 * STEP_FLOPS + 4 * MEASURING)


def test_halving_leaves_one():
    curves = {f"c{n}": power(2.0 + 0.2 * n, 3.0) for n in range(5)}
    record = race(curves, HalvingRace(cap=9.0, first_rung=8))
    assert [len(rung.left) for rung in record.rungs] == [0, 2, 1, 1]
    assert (record.winner, record.stopped_by) == ("c0", "one_left")


@settings(max_examples=20, deadline=None)
@given(st.permutations(sorted(CURVES)), st.sampled_from([PAIRED, FixedRace(k=100)]))
def test_the_order_of_the_candidates_changes_nothing(names, rule):
    one, other = race(CURVES, rule), race(CURVES, rule, names=names)
    assert one.winner == other.winner
    assert one.rungs == other.rungs
    assert one.spent == other.spent


def test_identical_candidates_tie_and_the_exact_one_goes_on():
    curves = {"a": power(2.0, 3.0), "b": power(2.0, 3.0), "c": power(2.5, 3.0)}
    flat = measuring(curves, exactness={"b": 0})

    def same_noise(names, step):
        found = flat(names, step)
        return {
            n: m
            if n == "c"
            else Measurement(**{**vars(m), "losses": flat(["a"], step)["a"].losses})
            for n, m in found.items()
        }

    record = race(curves, PAIRED, measure=same_noise)
    assert not record.resolved
    assert record.contenders == ("a", "b")
    assert record.winner == "b"
    assert record.stopped_by == "horizon"


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 2.0), st.floats(0.0, 3.0), st.sampled_from([PAIRED, FixedRace(k=200)]))
def test_a_dominated_candidate_never_changes_the_winner(margin, bump, rule):
    alone = race(CURVES, rule)
    best = CURVES[alone.winner]
    worse = {**CURVES, "dominated": lambda step: best(step) + margin + bump * 2.0 ** (-step / 90)}
    assert race(worse, rule).winner == alone.winner


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 4.0), st.sampled_from([PairedRace, HalvingRace]), st.integers(0, 3))
def test_what_is_spent_never_exceeds_the_cap(cap, kind, count):
    proposals = ProposalsConfig(count=count) if count else None
    curves = {**CURVES, **{f"new{n}": power(1.9, 3.0) for n in range(count)}}
    record = race(
        curves,
        kind(cap=cap),
        names=list(CURVES),
        proposals=proposals,
        propose=lambda _record, most: [f"new{n}" for n in range(most)],
        measure=measuring(curves),
    )
    least = 3 * MEASURING  # the losses after growth are measured in any case
    assert record.spent <= max(record.cap_flops, least)
    assert record.winner


def test_a_cap_that_binds_leaves_it_unresolved():
    record = race(CURVES, PairedRace(cap=0.1))
    assert record.stopped_by == "cap"
    assert not record.resolved
    assert set(record.undecided) >= {record.winner}
    assert len(record.undecided) > 1


def test_who_fails_is_out_and_the_race_goes_on():
    asked: list[tuple[str, int]] = []
    record = race(
        CURVES, PAIRED, measure=measuring(CURVES, fails={"stack": 50, "random": 0}, asked=asked)
    )
    assert record.winner == "exact"
    assert record.entrants["stack"].failure == "its loss is nan"
    assert record.stopped_by == "one_left"
    assert ("stack", 100) not in asked
    assert record.failed_flops == 50 * STEP_FLOPS + MEASURING


def test_if_all_fail_the_reasons_are_said():
    with pytest.raises(RaceError, match=r"all 3 failed \(exact: its loss is nan; .*untouched"):
        race(CURVES, PAIRED, measure=measuring(CURVES, fails=dict.fromkeys(CURVES, 50)))


def test_one_candidate_needs_no_race():
    record = race({"only": power(2, 3)}, None)
    assert (record.winner, record.resolved, record.stopped_by) == ("only", True, "one_left")
    assert record.step == 0
    assert race({"only": power(2, 3)}, PAIRED).step == 0


def test_a_proposal_trains_up_to_the_others_and_may_win():
    curves = {**CURVES, "new": power(1.5, 3.0)}
    asked: list[tuple[str, int]] = []
    record = race(
        curves,
        PAIRED,
        names=list(CURVES),
        proposals=ProposalsConfig(count=1, at_rung=2),
        propose=lambda record, count: ["new"][:count],
        measure=measuring(curves, asked=asked),
    )
    assert record.winner == "new"
    assert record.entrants["new"].joined_at == 100
    assert [step for name, step in asked if name == "new"][:3] == [0, 50, 100]


def test_the_cheaper_one_goes_on_where_losses_cannot_be_told_apart():
    curves = {"a": power(2.0, 3.0), "b": lambda step: power(2.0, 3.0)(step) + 0.001}
    record = race(curves, FixedRace(k=50), measure=measuring(curves, prices={"b": 50.0}))
    assert record.contenders == ("a", "b")
    assert record.winner == "b"


def test_auto_ranks_by_what_foretold_later_losses():
    sharpness = {"exact": 3.0, "stack": 1.0, "random": 4.0}
    record = race(
        CURVES,
        FixedRace(k=200, measurements=5),
        metric=None,
        measure=measuring(CURVES, indicators=sharpness),
    )
    assert record.metric == "sharpness"
    assert record.foretold["sharpness"].tau_b > record.foretold["loss"].tau_b
    assert record.winner == "stack"


def test_a_metric_that_cannot_be_told_yet_gives_way_to_the_loss():
    record = race(CURVES, FixedRace(k=0), metric="extrapolation")
    assert (record.metric, record.winner) == ("loss", "exact")


def test_extrapolation_sees_a_crossing_coming():
    curves = {"quick": power(2.5, 2.0), "slow": power(2.0, 8.0)}
    rule = FixedRace(k=200, measurements=3)
    assert race(curves, rule).winner == "quick"
    assert race(curves, rule, metric="extrapolation", horizon=100_000).winner == "slow"
