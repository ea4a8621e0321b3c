"""What a client's device can take: the limits that the configurator is given."""

from __future__ import annotations

import math

import pytest

from samara.config import validate
from samara.federated.class_arms import ClassArms
from samara.federated.config import FederateConfig
from samara.federated.configurator import Configurator
from samara.federated.devices import CostModel, federated_device

COSTS = CostModel(
    seconds_fixed=1.0,
    seconds_per_layer=1.0,
    bytes_fixed=0.0,
    bytes_per_layer=1.0,
    r_squared=1.0,
    basis="modelled",
    source="by hand",
)
DEVICES = [federated_device(name) for name in ("jetson-tx2", "jetson-nano", "raspberry-pi-4b")]
LAYERS = (12, 8, 4, 1)


def class_arms(pace):
    config = validate(
        FederateConfig,
        {
            "init_from": "base",
            "task": {"kind": "perplexity", "name": "text", "data": "test.jsonl"},
            "data": {"train": "train.jsonl"},
            "clients": {"number": 3, "partition": {"kind": "iid"}},
            "server": {"rounds": 1},
            "configurator": {
                "rates": [0.3, 0.6, 0.9],
                "shapes": ["incremental"],
                "pace": pace,
                "explore_share": 1.0,
            },
        },
    )
    return config, ClassArms(config, devices=DEVICES, costs=COSTS, arm_layers=LAYERS)


def test_time_is_the_device_s_and_the_pace_that_of_the_fastest_at_full_depth():
    fastest = min(device.slowness for device in DEVICES)
    _, arms = class_arms(1.5)
    for client, device in enumerate(DEVICES):
        candidate = arms.candidate(client)
        assert candidate.seconds == pytest.approx([device.slowness * (1 + k) for k in LAYERS])
        assert candidate.most_seconds == pytest.approx(1.5 * fastest * 13)
    _, free = class_arms(None)
    assert free.candidate(0).most_seconds == math.inf


def test_a_round_at_one_pace_lasts_as_long_as_the_fastest_kind_or_the_least_there_is():
    config, arms = class_arms(1.0)
    configurator = Configurator(config.configurator, seed=0)
    for round in range(30):
        for decision in configurator.choose(round, arms.candidates()):
            candidate = arms.candidate(decision.client)
            most = max(candidate.most_seconds, min(candidate.seconds))
            assert candidate.seconds[decision.arm] <= most
