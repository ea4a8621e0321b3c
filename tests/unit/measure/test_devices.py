"""Device profiles: the built-in ones, one's own, detection; energy and money from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from samara.errors import ConfigError
from samara.measure import devices
from samara.measure.devices import built_in_profiles, device_profile, estimated_cost

OWN = """\
name: my-box
peak_flops: {float32: 1e12, bfloat16: 2e12}
memory_bytes: 16000000000
watts: 100
price_per_hour: 1.0
price_per_kwh: 0.5
currency: EUR
source: "measured with a plug"
"""


@pytest.mark.parametrize("name", built_in_profiles())
def test_built_in_profiles_say_where_their_figures_come_from(name):
    profile = device_profile(name)
    assert profile.name == name
    assert profile.source.startswith(("data sheet:", "measured:"))
    assert "assumed:" in profile.source
    assert set(profile.peak_flops) == {"float32", "bfloat16"}


def test_the_named_profiles_are_there():
    assert {"cpu-2core", "h100-sxm", "h200-sxm", "a100-80", "rtx4090"} <= set(built_in_profiles())


def test_no_two_profiles_claim_the_same_device():
    claims = [name for p in built_in_profiles() for name in device_profile(p).cuda_names]
    assert len(claims) == len(set(claims))


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "box.yaml"
    path.write_text(OWN)
    profile = device_profile(path)
    assert profile.name == "my-box"
    assert profile.peak_flops["bfloat16"] == 2e12


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError) as error:
        device_profile("h100-smx")
    assert str(error.value) == (
        "device profile 'h100-smx' is not built in (did you mean 'h100-sxm'?); "
        "or give the path of a .yaml file"
    )


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as error:
        device_profile(path)
    assert str(error.value) == f"{path}: no such file; give a device profile in YAML"


def test_a_wrong_file_names_its_key(tmp_path):
    path = tmp_path / "box.yaml"
    path.write_text(OWN.replace("watts: 100", "watt: 100"))
    with pytest.raises(ConfigError, match=r"box\.yaml\.watt: unknown key \(did you mean 'watts'"):
        device_profile(path)


def test_auto_measures_the_processor_once():
    profile = device_profile("auto", device="cpu")
    assert profile.peak_flops["float32"] > 1e8
    assert profile.memory_bytes > 0
    assert profile.source.startswith("measured:")
    assert device_profile("auto", device="cpu") is profile


def test_auto_knows_a_gpu_by_its_name(monkeypatch):
    devices._detect.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert device_profile("auto").name == "h200-sxm"
    devices._detect.cache_clear()


def test_energy_and_money_by_hand(tmp_path):
    path = tmp_path / "box.yaml"
    path.write_text(OWN)
    cost = estimated_cost(device_profile(path), seconds=7200, num_devices=3)
    assert cost.energy_kwh == pytest.approx(0.6)  # 3 devices x 2 h x 100 W
    assert cost.money == pytest.approx(6.3)  # 6 h at 1.0, 0.6 kWh at 0.5
    assert cost.joules == pytest.approx(2.16e6)
    assert cost.currency == "EUR"


def test_the_profile_in_the_docs_is_one(tmp_path):
    page = (Path(__file__).resolve().parents[3] / "docs" / "devices.md").read_text()
    path = tmp_path / "my-box.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    profile = device_profile(path)
    assert profile.name == "my-box"
    assert profile.currency == "EUR"
    assert profile.cuda_names == ("NVIDIA GeForce RTX 3060",)
