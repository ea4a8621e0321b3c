"""The configurator finds the best arm, follows a change, and loses no client."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.config import validate
from samara.errors import ConfigError
from samara.federated.config import ConfiguratorConfig
from samara.federated.configurator import Candidate, Configurator, Outcome, make_arms

POLICIES = ("epsilon_greedy", "ucb_tuned", "sliding_window", "thompson")
CLASSES = {"fast": 1.0, "medium": 2.0, "slow": 20.0}
CLIENTS = 60
PER_ROUND = 12


def make_config(**changes):
    return ConfiguratorConfig.model_validate(
        {"rates": [0.0, 0.25, 0.5, 0.75], "shapes": ["incremental"], **changes}
    )


def class_of(client):
    return list(CLASSES)[client % 3]


class Device:
    """A cost model with a known best arm: gain falls with the rate, time has a fixed part.

    A fast device is bound by its transfers, so dropping gains it nothing; a slow one computes.
    """

    def __init__(self, seed=0):
        self.fixed = {"fast": 4.0, "medium": 1.0, "slow": 0.05}
        self.noise = np.random.default_rng(seed)
        self.slow_down = dict(CLASSES)

    def truth(self, name, rate):
        gain = 1 - 0.9 * rate**2
        return gain / (self.fixed[name] * CLASSES[name] + self.slow_down[name] * (1 - rate))

    def best(self, name, arms):
        return max(range(len(arms)), key=lambda arm: self.truth(name, arms[arm].rate))

    def outcome(self, client, arm, arms, *, shrink):
        name = class_of(client)
        rate = arms[arm].rate
        gain = (1 - 0.9 * rate**2) * shrink * max(0.1, 1 + 0.3 * self.noise.standard_normal())
        seconds = self.fixed[name] * CLASSES[name] + self.slow_down[name] * (1 - rate)
        return Outcome(
            client=client,
            device_class=name,
            arm=arm,
            peaks=[1.0] * len(arms),
            verdict="ok",
            gain=gain,
            cost=seconds,
            slowness=self.slow_down[name] / CLASSES[name],
        )


def play(configurator, device, rounds, *, start=0):
    """Rewards that shrink to a hundredth as a training does; returns the arms chosen per class."""
    chosen = []
    for number in range(start, start + rounds):
        clients = np.random.default_rng([7, number]).choice(CLIENTS, PER_ROUND, replace=False)
        decisions = configurator.choose(
            number,
            [
                Candidate(client=int(c), device_class=class_of(c), peaks=[1.0] * 4, memory=2.0)
                for c in clients
            ],
        )
        shrink = 0.97**number
        outcomes = [
            device.outcome(d.client, d.arm, configurator.arms, shrink=shrink) for d in decisions
        ]
        configurator.observe(number, outcomes)
        chosen += [(number, class_of(d.client), d.arm) for d in decisions]
    return chosen


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_finds_the_best_arm_of_every_class(kind):
    configurator = Configurator(make_config(policy={"kind": kind}), seed=1)
    device = Device()
    chosen = play(configurator, device, 150)
    for name in CLASSES:
        best = device.best(name, configurator.arms)
        late = [arm for number, own, arm in chosen if own == name and number >= 100]
        reached = np.mean([device.truth(name, configurator.arms[arm].rate) for arm in late])
        assert reached >= 0.85 * device.truth(name, configurator.arms[best].rate), (name, kind)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("best", range(4))
def test_every_policy_settles_on_exactly_the_best_arm(kind, best):
    worth = [1.0 if arm == best else 0.7 for arm in range(4)]
    configurator = Configurator(make_config(policy={"kind": kind}), seed=2)
    noise = np.random.default_rng(3)
    pulls = []
    for number in range(120):
        decisions = configurator.choose(
            number,
            [Candidate(client=c, device_class="a", peaks=[1.0] * 4, memory=2.0) for c in range(6)],
        )
        outcomes = [
            Outcome(
                client=d.client,
                device_class="a",
                arm=d.arm,
                peaks=[1.0] * 4,
                verdict="ok",
                gain=0.95**number * worth[d.arm] * max(0.1, 1 + 0.3 * noise.standard_normal()),
            )
            for d in decisions
        ]
        configurator.observe(number, outcomes)
        pulls += [d.arm for d in decisions if number >= 80]
    assert configurator.best_arms(120) == {"a": configurator.arms[best].name}
    assert np.bincount(pulls, minlength=4).argmax() == best


@pytest.mark.parametrize("kind", POLICIES)
def test_a_device_class_that_becomes_slower_gets_another_arm(kind):
    configurator = Configurator(make_config(policy={"kind": kind}), seed=3)
    device = Device()
    play(configurator, device, 120)
    before = device.best("fast", configurator.arms)
    device.slow_down["fast"] = 200.0
    after = device.best("fast", configurator.arms)
    assert before != after
    chosen = play(configurator, device, 120, start=120)
    late = [arm for number, own, arm in chosen if own == "fast" and number >= 200]
    reached = np.mean([device.truth("fast", configurator.arms[arm].rate) for arm in late])
    best, old = (device.truth("fast", configurator.arms[arm].rate) for arm in (after, before))
    assert reached >= 0.85 * best > old


def test_a_change_of_speed_makes_the_class_try_all_arms_again():
    configurator = Configurator(make_config(), seed=3)
    device = Device()
    play(configurator, device, 60)
    device.slow_down["medium"] *= 10
    play(configurator, device, 20, start=60)
    state = configurator.state()["classes"]
    assert min(item["round"] for item in state["medium"]["observations"]) >= 60
    assert min(item["round"] for item in state["slow"]["observations"]) == 0


def test_the_state_goes_through_json_and_back_exactly():
    device, twin_device = Device(seed=5), Device(seed=5)
    first = Configurator(make_config(policy={"kind": "thompson"}), seed=4)
    play(first, device, 30)
    whole = Configurator(make_config(policy={"kind": "thompson"}), seed=4)
    play(whole, twin_device, 30)
    resumed = Configurator(make_config(policy={"kind": "thompson"}), seed=4)
    resumed.restore(json.loads(json.dumps(first.state())))
    assert resumed.state() == first.state()
    assert play(resumed, device, 20, start=30) == play(whole, twin_device, 20, start=30)
    assert resumed.state() == whole.state()


def one(configurator, round, *, client=0, peaks=(4.0, 3.0, 2.0, 1.0), memory=100.0):
    (decision,) = configurator.choose(
        round, [Candidate(client=client, device_class="a", peaks=peaks, memory=memory)]
    )
    return decision


def came(configurator, round, arm, verdict, **fields):
    configurator.observe(
        round,
        [
            Outcome(
                client=fields.pop("client", 0),
                device_class="a",
                arm=arm,
                peaks=(4.0, 3.0, 2.0, 1.0),
                verdict=verdict,
                **fields,
            )
        ],
    )


def test_an_arm_that_does_not_fit_the_memory_is_never_offered():
    configurator = Configurator(make_config(), seed=0)
    for number in range(30):
        decision = one(configurator, number, memory=3.0)  # 3 · 1.1 > 3: only two arms fit
        assert decision.arm in (2, 3)
        came(configurator, number, decision.arm, "ok", gain=1.0)
    assert one(configurator, 31, memory=1.0).arm is None
    assert one(configurator, 31, memory=1.0).reason == "no_arm_fits"


@pytest.mark.parametrize("verdict", ["error", "timeout", "not_finite", "refused"])
def test_an_arm_that_failed_is_not_offered_until_its_quarantine_ends(verdict):
    configurator = Configurator(make_config(quarantine_rounds=5), seed=0)
    came(configurator, 0, 1, verdict)
    offered = {one(configurator, number, client=9).arm for number in range(1, 6)}
    assert 1 not in offered
    for number, arm in enumerate((0, 2, 3)):
        came(configurator, 1 + number, arm, "ok", gain=1.0, client=9)
    # Its only reward is 0, and discounted: least pulled, it is explored again.
    later = {one(configurator, number, client=9).arm for number in range(6, 60)}
    assert 1 in later


def test_out_of_memory_forbids_every_arm_that_needs_as_much():
    configurator = Configurator(make_config(quarantine_rounds=50), seed=0)
    came(configurator, 0, 1, "out_of_memory")
    assert {one(configurator, number, client=9).arm for number in range(1, 50)} <= {2, 3}


def test_two_falls_of_accuracy_in_a_row_are_a_failure_and_one_is_none():
    configurator = Configurator(make_config(rates=[0.0, 0.5], quarantine_rounds=9), seed=0)
    came(configurator, 0, 1, "ok", gain=5.0, accuracy_change=-0.2)
    came(configurator, 1, 1, "ok", gain=5.0)
    came(configurator, 2, 1, "ok", gain=5.0, accuracy_change=-0.2)
    assert configurator.state()["classes"]["a"]["quarantine"] == {}
    came(configurator, 3, 1, "ok", gain=5.0, accuracy_change=-0.2)
    assert configurator.state()["classes"]["a"]["quarantine"] == {1: 13}


def test_a_client_that_failed_gets_what_worked_for_it():
    configurator = Configurator(make_config(), seed=0)
    came(configurator, 0, 2, "ok", gain=1.0)
    came(configurator, 1, 3, "error")
    decision = one(configurator, 2)
    assert (decision.arm, decision.reason) == (2, "after_failure")
    fresh = Configurator(make_config(), seed=0)
    came(fresh, 0, 0, "error")
    assert one(fresh, 1).arm == 3  # nothing worked yet: the smallest peak


def test_where_every_arm_is_in_quarantine_the_client_still_gets_one_and_a_warning_is_kept():
    configurator = Configurator(make_config(), seed=0)
    for arm in range(4):
        came(configurator, 0, arm, "error")
    decision = one(configurator, 1)
    assert (decision.arm, decision.reason) == (3, "all_quarantined")
    assert "every arm of device class 'a' is in quarantine" in configurator.warnings[0]


def test_only_a_share_of_a_round_explores():
    configurator = Configurator(make_config(explore_share=0.25), seed=0)
    candidates = [
        Candidate(client=c, device_class="a", peaks=(4.0, 3.0, 2.0, 1.0), memory=9.0)
        for c in range(8)
    ]
    for number in range(40):
        decisions = configurator.choose(number, candidates)
        assert sum(d.reason in ("first_try", "explore") for d in decisions) <= 2
        configurator.observe(
            number,
            [
                Outcome(
                    client=d.client,
                    device_class="a",
                    arm=d.arm,
                    peaks=(4.0, 3.0, 2.0, 1.0),
                    verdict="ok",
                    gain=1.0,
                )
                for d in decisions
            ],
        )


@settings(max_examples=25)
@given(data=st.data())
def test_no_sequence_of_failures_ever_loses_a_client(data):
    kind = data.draw(st.sampled_from(POLICIES))
    configurator = Configurator(make_config(policy={"kind": kind}), seed=data.draw(st.integers(0)))
    verdicts = st.sampled_from(["ok", "error", "timeout", "out_of_memory", "not_finite", "refused"])
    for number in range(8):
        candidates = [
            Candidate(client=c, device_class="ab"[c % 2], peaks=(4.0, 3.0, 2.0, 1.0), memory=3.5)
            for c in range(4)
        ]
        decisions = configurator.choose(number, candidates)
        assert [d.client for d in decisions] == [0, 1, 2, 3]
        assert all(d.arm in (1, 2, 3) for d in decisions)  # an arm each, and one that fits
        configurator.observe(
            number,
            [
                Outcome(
                    client=d.client,
                    device_class="ab"[d.client % 2],
                    arm=d.arm,
                    peaks=(4.0, 3.0, 2.0, 1.0),
                    verdict=data.draw(verdicts),
                    gain=data.draw(st.floats(-1, 1)),
                    cost=data.draw(st.floats(0.1, 10)),
                    slowness=data.draw(st.floats(0.1, 10)),
                )
                for d in decisions
            ],
        )


def test_the_order_of_clients_and_outcomes_does_not_matter():
    states = []
    for turn in (1, -1):
        configurator, device = Configurator(make_config(), seed=6), Device(seed=1)
        for number in range(10):
            candidates = [
                Candidate(client=c, device_class=class_of(c), peaks=[1.0] * 4, memory=2.0)
                for c in range(9)
            ]
            decisions = configurator.choose(number, candidates[::turn])
            outcomes = [
                device.outcome(d.client, d.arm, configurator.arms, shrink=1) for d in decisions
            ]
            configurator.observe(number, outcomes[::turn])
        states.append(configurator.state())
    assert states[0] == states[1]


def test_nothing_dropped_is_always_an_arm_and_stands_once():
    arms = make_arms(ConfiguratorConfig())
    assert len(arms) == 11
    assert [arm.name for arm in arms[:3]] == ["0", "0.2-incremental", "0.2-uniform"]
    assert make_arms(make_config(rates=[0.5]))[0].rate == 0


def test_equal_rates_are_refused():
    with pytest.raises(ConfigError, match=r"rates: give one or more different values"):
        validate(ConfiguratorConfig, {"rates": [0.5, 0.5]})


@pytest.mark.parametrize(
    ("most", "memory", "offered"),
    [(9.0, 100.0, {0, 1, 2, 3}), (3.0, 100.0, {1, 2, 3}), (0.1, 100.0, {3}), (3.0, 2.5, {2, 3})],
)
def test_a_device_keeps_the_pace_or_comes_as_near_as_it_can(most, memory, offered):
    configurator = Configurator(
        make_config(policy={"kind": "thompson"}, explore_share=1.0, memory_margin=0.0), seed=1
    )
    times = (4.0, 3.0, 2.0, 1.0)
    chosen = {
        decision.arm
        for round in range(40)
        for decision in configurator.choose(
            round,
            [
                Candidate(
                    client=client,
                    device_class="a",
                    peaks=times,
                    memory=memory,
                    seconds=times,
                    most_seconds=most,
                )
                for client in range(3)
            ],
        )
    }
    assert chosen <= offered
    assert min(offered) in chosen
