"""The federated benchmark: the whole of it at smoke size, its findings and its page."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from samara.federated.driver import Driver

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def data(rows, tmp_path):
    """The reviews as the benchmark wants them: one folder with labels, one with users, packed."""
    for name, held_out in (("labels", "test"), ("users", "valid")):
        (tmp_path / name).mkdir()
        for split, as_name in (("train", "train"), ("test", held_out)):
            text = (rows / f"{split}.jsonl").read_bytes()
            (tmp_path / name / f"{as_name}.jsonl.gz").write_bytes(gzip.compress(text))
    return tmp_path


def arguments(base, folder, *more):
    own = {"--model": base, "--data": folder / "labels", "--users": folder / "users"}
    words = [str(word) for pair in own.items() for word in pair]
    out = ["--out", str(folder / "out"), "--json", str(folder / "federated.json")]
    return [*words, *out, "--size", "smoke", "--workers", "0", *more]


def test_the_queue_is_worked_off_goes_on_and_is_shown(bases, data, benchmark, capsys):
    federated = benchmark("federated")
    options = arguments(bases["samara"], data)
    federated.main([*options, "--only", "clock"])
    clocks = json.loads((data / "federated.json").read_text())
    assert (len(clocks["rows"]), clocks["complete"]) == (2, False)
    federated.main(options)
    written = json.loads((data / "federated.json").read_text())
    assert written["complete"] is True, capsys.readouterr().out
    by_kind = {}
    for row in written["rows"]:
        by_kind.setdefault(row["kind"], []).append(row)
    # per arm two rates at the first seed, the better of them at the second
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        "clock": 2,
        "memory": 1,
        "run": 9,
    }
    (peak,) = by_kind["memory"]
    assert (peak["active_layers"], peak["num_layers"]) == (2, 4)
    assert 0 < peak["peak_bytes_above_loaded"] <= peak["peak_bytes"]
    for row in by_kind["run"]:
        is_text, drops = row["situation"] == "users", row["arm"] == "DropPEFT"
        assert row["rounds"] == (3 if drops else 2)
        curve = row["curve"]
        assert {len(values) for values in curve.values()} == {row["rounds"] + 1}
        assert curve["seconds"] == sorted(curve["seconds"])
        assert (curve["accuracy"][0] is None) == is_text
        assert row["modelled_seconds"] == pytest.approx(curve["seconds"][-1], rel=1e-4)
        assert row["client_seconds_per_round"] > 0
        assert row["strategy_seconds_per_round"] > 0
        assert row["refused"] == 0
        assert row["modelled_peak_bytes"]["mean"] <= row["modelled_peak_bytes"]["max"]
    assert not list((data / "out").iterdir()), "figures are kept, runs are not"

    capsys.readouterr()
    federated.main(options)
    assert capsys.readouterr().out == ""
    assert json.loads((data / "federated.json").read_text())["rows"] == written["rows"]


def test_an_interrupted_run_goes_on_to_the_same_figures(bases, data, benchmark, monkeypatch):
    cases, federated = benchmark("federated_cases"), benchmark("federated")
    setting = federated.make_setting(federated.parse(arguments(bases["samara"], data)))
    case = federated.run_case(setting, "alpha 1", "DropPEFT", seed=1, lr=1e-2)
    given = {"seconds_fixed": 1, "seconds_per_layer": 2, "bytes_fixed": 3, "bytes_per_layer": 4}
    clock = {"kind": "given", "source": "by hand", **given}
    whole = cases.carry_out(setting, case, clock)
    assert whole["modelled_peak_bytes"]["max"] <= 3 + 4 * 4

    other = federated.replace(setting, out=setting.out / "again")
    run_round = Driver.run_round

    def killed_after_a_round(driver):
        run_round(driver)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "run_round", killed_after_a_round)
        with pytest.raises(KeyboardInterrupt):
            cases.carry_out(other, case, clock)
    again = cases.carry_out(other, case, clock)
    for name in ("curve", "test", "clients", "bytes", "arms"):
        assert again[name] == whole[name], name


def test_the_arms_are_tuned_with_equal_effort_and_fit_their_situations(bases, data, benchmark):
    cases, federated = benchmark("federated_cases"), benchmark("federated")
    for size in ("gpu", "cpu", "smoke"):
        words = arguments(bases["samara"], data, "--size", size)
        setting = federated.make_setting(federated.parse(words))
        for situation, arms in setting.size.arms.items():
            assert not [a for a in arms if cases.ARMS[a].needs_head and situation == "users"]
            for arm in arms:
                swept = federated.sweep(setting, situation, arm)
                assert len({case.name for case in swept}) == len(setting.size.lrs)
                for case in swept:
                    setting.config(case, clock=None, device="cpu")
    gpu = cases.SIZES["gpu"]
    assert len(gpu.seeds) >= 3
    assert {"alpha 0.1", "alpha 1", "alpha 10", "users"} <= gpu.arms.keys()
    assert {a.role for a in cases.ARMS.values()} >= {"baseline", "method", "ablation", "lever"}


def test_a_folder_without_rows_is_named(bases, tmp_path, benchmark):
    (tmp_path / "labels").mkdir()
    with pytest.raises(SystemExit, match=r"labels: holds no train\.jsonl or train\.jsonl\.gz"):
        benchmark("federated").main(arguments(bases["samara"], tmp_path))
