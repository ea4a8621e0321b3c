"""The noisy mean: a fixed denominator, noise in every round, clients drawn by themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samara.config import validate
from samara.errors import ConfigError
from samara.federated.accounting import epsilon_of
from samara.federated.aggregation import Layout
from samara.federated.config import FederateConfig
from samara.federated.messages import Reply
from samara.federated.privacy_config import ENGINES, METHODS, check_privacy
from samara.federated.protection import Protection
from samara.federated.randomness import Secrets
from samara.federated.secure_round import SecureSum

LAYOUT = Layout(
    shapes={"0.a": (40, 50), "1.a": (300,), "head": (20,)},
    groups={"0.a": "0", "1.a": "1", "head": "head"},
    num_layers=2,
)
BEFORE = {name: np.ones(shape, dtype=np.float32) for name, shape in LAYOUT.shapes.items()}
CLIENT = {"epsilon": 1e3, "delta": 0.01, "clip": 2.0, "noise_multiplier": 1.0}
CLIENTS, PER_ROUND = 50, 10


def _config(privacy, **changes):
    return validate(
        FederateConfig,
        {
            "init_from": "base",
            "task": {"kind": "labels", "name": "x", "data": "test.jsonl"},
            "data": {"train": "train.jsonl", "sequence_length": 16},
            "method": "fedlora",
            "clients": {"number": CLIENTS, "per_round": PER_ROUND},
            "server": {"rounds": 3, "max_change": None},
            "privacy": {"randomness": "reproducible", **privacy},
            **changes,
        },
    )


def _protection(tmp_path, privacy, **changes):
    config = _config(privacy, **changes)
    secrets = Secrets(tmp_path, config.privacy, seed=config.seed)
    return Protection(config, layout=LAYOUT, num_clients=CLIENTS, secrets=secrets)


def _reply(client, **tensors):
    sent = {n.replace("_", "."): np.array(v, dtype=np.float32) for n, v in tensors.items()}
    return Reply(round=0, client=client, num_examples=1, tensors=sent)


def _flat(tensors):
    return np.concatenate([(tensors[n].astype(float) - BEFORE[n]).ravel() for n in LAYOUT.shapes])


def test_the_denominator_is_fixed_and_who_sends_nothing_counts_as_zero(tmp_path):
    """One client of ten expected: its change is divided by ten, not by one."""
    tiny = {**CLIENT, "noise_multiplier": 1e-3, "epsilon": 1e12}
    protection = _protection(tmp_path, {"client": tiny})
    head = BEFORE["head"] + 0.1
    found = protection.aggregate(BEFORE, [_reply(4, head=head)], None, 0)
    np.testing.assert_allclose(found.tensors["head"] - BEFORE["head"], 0.01, atol=2e-3)
    np.testing.assert_allclose(found.tensors["1.a"], BEFORE["1.a"], atol=2e-3)
    assert not np.array_equal(found.tensors["1.a"], BEFORE["1.a"])  # noise on unsent layers


def test_a_client_moves_the_mean_by_no_more_than_its_clip(tmp_path):
    protection = _protection(tmp_path, {"client": CLIENT})
    grid = protection._grid
    huge = _reply(1, head=BEFORE["head"] + 1e6)
    total, clients = protection._plain_sum(BEFORE, [huge], {})
    assert clients == (1,)
    assert 0.999 * grid.units < np.linalg.norm(total) <= grid.units


@pytest.mark.parametrize("replies", [[], [_reply(1, head=BEFORE["head"] + 5)]])
def test_the_noise_is_that_of_the_accountant_in_an_empty_round_too(tmp_path, replies):
    protection = _protection(tmp_path, {"client": CLIENT})
    found = _flat(protection.aggregate(BEFORE, replies, None, 0).tensors)[:-20]
    assert found.std() == pytest.approx(1.0 * 2.0 / PER_ROUND, rel=0.06)
    assert abs(found.mean()) < 5 * 0.2 / np.sqrt(len(found))


def test_the_same_sum_gets_the_same_noise_and_another_gets_another(tmp_path):
    """A round done again after a crash releases nothing new; no noise is ever used twice."""
    protection = _protection(tmp_path, {"client": CLIENT})
    one = _flat(protection.aggregate(BEFORE, [], None, 0).tensors)
    np.testing.assert_array_equal(one, _flat(protection.aggregate(BEFORE, [], None, 0).tensors))
    other_sum = _reply(1, head=BEFORE["head"] + 1e-6)
    for other in (
        protection.aggregate(BEFORE, [], None, 1),
        protection.aggregate(BEFORE, [other_sum], None, 0),
        protection.aggregate({**BEFORE, "head": 2 * BEFORE["head"]}, [], None, 0),
    ):
        assert abs(np.corrcoef(one, _flat(other.tensors))[0, 1]) < 0.12


def test_a_malformed_reply_is_a_zero_and_is_named(tmp_path):
    protection = _protection(tmp_path, {"client": CLIENT})
    bad = BEFORE["head"].copy()
    bad[0] = np.nan
    found = protection.aggregate(BEFORE, [_reply(3, head=bad)], None, 0)
    assert "not finite" in found.refused[3]
    np.testing.assert_array_equal(
        _flat(found.tensors), _flat(protection.aggregate(BEFORE, [], None, 0).tensors)
    )


def test_each_client_is_drawn_by_itself_with_the_same_probability(tmp_path):
    protection = _protection(tmp_path, {"client": CLIENT})
    drawn = [protection.draw(range(CLIENTS), round) for round in range(400)]
    sizes = np.array([len(clients) for clients in drawn])
    assert sizes.mean() == pytest.approx(PER_ROUND, abs=5 * np.sqrt(8 / 400))
    assert sizes.var() == pytest.approx(8.0, rel=0.35)  # n q (1 - q): not a fixed number
    counts = np.bincount(np.concatenate(drawn), minlength=CLIENTS)
    assert abs(counts - 80).max() < 5 * np.sqrt(64)
    assert drawn == [protection.draw(range(CLIENTS), round) for round in range(400)]
    assert set(protection.draw([3, 4], 0)) == set(drawn[0]) & {3, 4}


def test_the_next_round_is_refused_before_it_would_pass_the_budget(tmp_path):
    protection = _protection(tmp_path, {"client": {**CLIENT, "epsilon": 4.0, "delta": 1e-3}})
    last = max(round for round in range(100) if protection.allows(round)) + 1
    assert protection.summary(last)["client"]["epsilon"] <= 4.0
    assert protection.summary(last + 1)["client"]["epsilon"] > 4.0


def test_rounds_stay_charged_with_the_noise_they_had_when_the_recipe_changes(tmp_path):
    """Ten rounds of noise 1, then ten of noise 5; or more rounds with a noise settled for ten."""
    first = _protection(tmp_path, {"client": CLIENT})
    louder = _protection(tmp_path, {"client": {**CLIENT, "noise_multiplier": 5.0}})
    louder.restore(json.loads(json.dumps(first.state())), 10)
    assert louder.summary(10)["client"]["epsilon"] == first.summary(10)["client"]["epsilon"]
    expected = epsilon_of([(1.0, 0.2, 10), (5.0, 0.2, 10)], 0.01)
    assert louder.summary(20)["client"]["epsilon"] == pytest.approx(expected)
    again = _protection(tmp_path, {"client": {**CLIENT, "noise_multiplier": 5.0}})
    again.restore(json.loads(json.dumps(louder.state())), 20)
    assert again.summary(20) == louder.summary(20)

    settled = {**CLIENT, "epsilon": 4.0, "noise_multiplier": None}
    ten = _protection(tmp_path, {"client": settled}, server={"rounds": 10, "max_change": None})
    more = _protection(tmp_path, {"client": settled}, server={"rounds": 20, "max_change": None})
    assert more.budget.noise_multiplier > ten.budget.noise_multiplier
    more.restore(json.loads(json.dumps(ten.state())), 10)
    assert more.summary(10) == ten.summary(10)
    assert not more.allows(11)


def test_a_secure_sum_that_was_not_opened_leaves_the_values_as_they_are(tmp_path):
    protection = _protection(tmp_path, {"secure_sum": {"clip": 1.0}})
    secure = SecureSum(replies=[], problem="the sum was not opened: 1 clients were left")
    found = protection.aggregate(BEFORE, [_reply(2)], secure, 0)
    assert found.refused == {2: secure.problem}
    assert not any(found.senders.values())
    np.testing.assert_array_equal(_flat(found.tensors), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"privacy": {"client": CLIENT}, "server": {"rounds": 3}},
            "server.max_change: compares the replies of single clients.*set it to null",
        ),
        (
            {"privacy": {"secure_sum": {"clip": 1.0}}, "server": {"rounds": 3}},
            "server.max_change: compares the replies of single clients.*set it to null",
        ),
        (
            {"privacy": {"client": CLIENT}, "method": "droppeft"},
            "configurator.rewards: clients would tell the server their losses.*set it to server",
        ),
        (
            {"privacy": {"secure_sum": {"clip": 1.0}}, "method": "droppeft"},
            "configurator.rewards: clients would tell the server their losses.*set it to server",
        ),
        (
            {
                "privacy": {"client": CLIENT},
                "method": "droppeft",
                "configurator": {"rewards": "server"},
                "sharing": {"direction": "share_common"},
            },
            "sharing.direction: share_common lets a client's data decide.*privacy.client rules out",
        ),
        (
            {
                "privacy": {"records": CLIENT},
                "method": "droppeft",
                "configurator": {"rewards": "server"},
                "sharing": {"direction": "share_important"},
            },
            "sharing.direction: share_important lets a client's data.*privacy.records rules out",
        ),
        (
            {"privacy": {"records": CLIENT}},
            "local.clip_grad_norm: privacy.records clips the gradient of each row instead",
        ),
        (
            {"privacy": {"records": CLIENT}, "method": "static_stld", "payload": "sparse"},
            "payload: sparse is not built with privacy.records.*use lora",
        ),
        (
            {"privacy": {"records": CLIENT}, "method": "fedavg", "payload": "full"},
            "payload: full is not built with privacy.records.*use lora",
        ),
        (
            {"privacy": {"records": CLIENT}, "local": {"proximal": 0.1}},
            "local.proximal: 0.1 pulls on gradients that the noise.*set it to 0",
        ),
        (
            {"privacy": {"client": CLIENT}, "method": "hetlora"},
            "method: hetlora is not built with privacy; use one of",
        ),
        (
            {
                "privacy": {"records": CLIENT},
                "local": {"clip_grad_norm": None, "precision": "bfloat16"},
            },
            "local.precision: bfloat16 is not built with privacy.records; use float32",
        ),
        (
            {
                "privacy": {"records": CLIENT},
                "local": {"clip_grad_norm": None},
                "method": "fedlora_checkpointing",
            },
            "method: fedlora_checkpointing runs layers twice.*use fedlora",
        ),
        (
            {"privacy": {"secure_sum": {"clip": 1.0, "min_clients": 11}}},
            "clients.per_round: 10 are fewer than privacy.secure_sum.min_clients 11.*raise it",
        ),
        (
            {"privacy": {"secure_sum": {}}},
            "secure_sum.clip: give the largest norm of a client's change",
        ),
        (
            {"privacy": {"client": CLIENT, "secure_sum": {"clip": 1.0}}},
            "secure_sum.clip: client.clip bounds a client's change already; leave it out",
        ),
        (
            {"privacy": {"client": {**CLIENT, "delta": 0}}},
            "privacy.client.delta: .* than 0, got 0",
        ),
    ],
)
def test_what_would_break_a_promise_is_refused(changes, message):
    privacy = changes.pop("privacy")
    with pytest.raises(ConfigError, match=message):
        _config(privacy, **changes)


def test_a_method_or_engine_that_the_promises_were_not_thought_through_for_is_refused():
    settings = {
        "direction": "all",
        "rewards": "server",
        "max_change": None,
        "clip_grad_norm": None,
        "precision": "float32",
        "proximal": 0.0,
        "payload": "lora",
        "per_round": 10,
    }
    promised, nothing = (_config(own).privacy for own in ({"client": CLIENT}, {}))
    with pytest.raises(ConfigError, match="method: newest is not built with privacy; use one of"):
        check_privacy(promised, engine="flower", method="newest", **settings)
    with pytest.raises(ConfigError, match="engine: newest is not built with privacy; use one of"):
        check_privacy(promised, engine="newest", method="fedlora", **settings)
    check_privacy(nothing, engine="newest", method="newest", **settings)
    for method in METHODS:
        for engine in ENGINES:
            check_privacy(promised, engine=engine, method=method, **settings)
