"""The virtual clock is the sum by hand; traces depend on where they are asked for alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.config import dump_yaml
from samara.errors import ConfigError
from samara.federated.config import DeviceShare, FederatedDevice
from samara.federated.devices import (
    CostModel,
    assign_devices,
    built_in_devices,
    client_cost,
    fails,
    federated_device,
    is_available,
    speed_factor,
)

COSTS = CostModel(
    seconds_fixed=0.5,
    seconds_per_layer=0.1,
    bytes_fixed=100.0,
    bytes_per_layer=10.0,
    r_squared=1.0,
    basis="measured",
    source="by hand",
)


def device(**changes):
    settings = {
        "name": "d",
        "slowness": 2.0,
        "memory_bytes": 1e9,
        "download_bytes_per_second": 1000.0,
        "upload_bytes_per_second": 500.0,
        "compute_watts": 12.0,
        "communicate_watts": 4.0,
        "source": "by hand",
        **changes,
    }
    return FederatedDevice.model_validate(settings)


def test_the_virtual_clock_is_the_sum_by_hand():
    found = client_cost(
        device(), COSTS, active_layers=[3, 1, 2], bytes_down=2000, bytes_up=1000, round=0
    )
    assert found.compute_seconds == pytest.approx(2 * (3 * 0.5 + 6 * 0.1))
    assert found.communicate_seconds == pytest.approx(2 + 2)
    assert found.seconds == pytest.approx(4.2 + 4)
    assert found.joules == pytest.approx(4.2 * 12 + 4 * 4)
    assert found.slowness == 1.0
    assert COSTS.peak_bytes(3) == 130


def test_a_change_of_speed_counts_from_its_round_on():
    changing = device(slowness_changes=[{"round": 5, "factor": 3.0}, {"round": 8, "factor": 0.5}])
    assert [speed_factor(changing, number) for number in (4, 5, 8)] == [1.0, 3.0, 1.5]
    late = client_cost(changing, COSTS, active_layers=[1], bytes_down=0, bytes_up=0, round=5)
    assert late.compute_seconds == pytest.approx(2 * 0.6 * 3)
    assert late.slowness == pytest.approx(3)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**64), client=st.integers(0, 10**6), round=st.integers(0, 10**4))
def test_traces_are_functions_of_seed_client_and_round(seed, client, round):
    shaky = device(availability=0.5, failure_probability=0.5)
    where = {"seed": seed, "client": client, "round": round}
    assert is_available(shaky, **where) == is_available(shaky, **where)
    assert fails(shaky, **where) == fails(shaky, **where)
    assert is_available(device(), **where)
    assert not fails(device(), **where)


def test_traces_have_the_frequencies_of_the_profile():
    shaky = device(availability=0.8, failure_probability=0.1)
    places = [{"seed": 0, "client": c, "round": r} for c in range(50) for r in range(100)]
    assert np.mean([is_available(shaky, **p) for p in places]) == pytest.approx(0.8, abs=0.02)
    assert np.mean([fails(shaky, **p) for p in places]) == pytest.approx(0.1, abs=0.02)


def test_clients_get_devices_by_their_shares():
    shares = [
        DeviceShare(profile="jetson-tx2", share=1),
        DeviceShare(profile="jetson-nano", share=1),
        DeviceShare(profile="raspberry-pi-4b", share=2),
    ]
    dealt = [own.name for own in assign_devices(shares, num_clients=20, seed=0)]
    assert [dealt.count(name) for name in ("jetson-tx2", "jetson-nano", "raspberry-pi-4b")] == [
        5,
        5,
        10,
    ]
    assert dealt == [own.name for own in assign_devices(shares, num_clients=20, seed=0)]
    assert dealt != [own.name for own in assign_devices(shares, num_clients=20, seed=1)]
    assert len(assign_devices(shares, num_clients=7, seed=0)) == 7


def test_the_built_in_devices_say_where_their_figures_come_from():
    assert built_in_devices() == ["jetson-nano", "jetson-tx2", "raspberry-pi-4b"]
    for name in built_in_devices():
        own = federated_device(name)
        assert own.name == name
        assert "published:" in own.source
        assert "assumed" in own.source or name == "jetson-tx2"
    assert [federated_device(name).slowness for name in built_in_devices()] == [2.0, 1.0, 20.0]


def test_a_device_of_ones_own_is_a_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml(device(name="mine").model_dump(mode="json")))
    assert federated_device(str(path)) == device(name="mine")


def test_a_device_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'jetson-tx' is not built in \(did you mean"):
        federated_device("jetson-tx")
    with pytest.raises(ConfigError, match=r"none.yaml: no such file"):
        federated_device("none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nslownes: 2\n")
    with pytest.raises(ConfigError, match=r"bad.yaml.slownes: unknown key"):
        federated_device(str(path))
    twice = [DeviceShare(profile="jetson-tx2"), DeviceShare(profile="jetson-tx2")]
    with pytest.raises(ConfigError, match=r"'jetson-tx2' is named twice"):
        assign_devices(twice, num_clients=3, seed=0)


def test_a_cost_model_goes_through_plain_data():
    assert CostModel.from_dict(COSTS.to_dict()) == COSTS
