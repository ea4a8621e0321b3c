"""Verb release: deltas and models into a registry, through gates, back, and never twice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from samara import cli
from samara.config import dump_yaml, validate
from samara.errors import ConfigError, GateError, RegistryError
from samara.registry.registry import Registry
from samara.release import release as module
from samara.release.config import ReleaseConfig
from samara.release.release import release
from samara.runs import RunFolder, hash_weights, read_json, write_json
from samara.sparse.delta import make_delta

GATES = {"kpis": [{"task": "package", "metric": "accuracy", "bound": 0.3, "max_loss": 0.05}]}


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "better": "higher"}


def write_results(run: Path, method: str, base: Path, accuracy: float, written: str) -> None:
    write_json(
        run / "results.json",
        {
            "schema": 1,
            "method": method,
            "task": {"name": "package", "kind": "labels"},
            "scores": {"accuracy": score(accuracy)},
            "base_scores": {"accuracy": score(0.1)},
            "num_items": 500,
            "artefacts": {written: 1},
            "parents": {"init_from": hash_weights(base)},
        },
    )


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, str]:
    """A model, and finished fine-tunings of it: a delta with a head, all weights, and a bad one."""
    weights = {"w": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", {"model_type": "any"})
    save_file(weights, base / "model.safetensors")
    changed = {"w": weights["w"] + torch.eye(8, 4)}
    for name, accuracy in (("sparse", 0.6), ("bad", 0.2)):
        run = tmp_path / name
        run.mkdir()
        write_results(run, "sparse", base, accuracy, "delta.safetensors")
        make_delta(weights, changed).save(run / "delta.safetensors")
        save_file({"score": torch.ones(2, 4)}, run / "head.safetensors")
        (run / "support.safetensors").write_bytes(b"needed for resuming alone")
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "state").write_bytes(b"x")
    full = tmp_path / "full"
    (full / "model").mkdir(parents=True)
    write_json(full / "model" / "config.json", {"model_type": "any"})
    save_file(changed, full / "model" / "model.safetensors")
    write_results(full, "full", base, 0.62, "model")
    return {name: str(tmp_path / name) for name in ("base", "sparse", "full", "bad")}


@pytest.fixture
def config(runs: dict[str, str]) -> Callable[..., ReleaseConfig]:
    def make(**changes: Any) -> ReleaseConfig:
        settings = {
            "line": "package",
            "versions": {name: {"source": runs[name]} for name in ("base", "sparse", "full")},
            "gates": {"stable": {**GATES, "audits": []}},
            "steps": [
                {"do": "promote", "version": "sparse"},
                {"do": "promote", "version": "full"},
                {"do": "rollback", "reason": "a drill"},
            ],
            "actor": "ada",
            **changes,
        }
        return validate(ReleaseConfig, settings)

    return make


def run_one(config: ReleaseConfig, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    release(config, RunFolder(folder))
    summary: dict[str, Any] = read_json(folder / "summary.json")
    return summary


def actions(summary: dict[str, Any]) -> list[str]:
    return [entry["action"] for entry in summary["log"]]


def test_two_versions_are_promoted_and_one_is_rolled_back(config, tmp_path):
    found = run_one(config(), tmp_path / "release")
    sparse, full = found["versions"]["sparse"], found["versions"]["full"]
    assert (sparse["number"], full["number"]) == (2, 3)
    assert (sparse["kind"], full["kind"]) == ("delta", "run")
    assert sparse["made_from"] == full["made_from"] == ["package:1"]
    assert set(sparse["files"]) == {"delta.safetensors", "head.safetensors", "results.json"}
    (row,) = sparse["evaluations"]
    assert (row["task"], row["value"], row["n"], row["base_value"]) == ("package", 0.6, 500, 0.1)
    assert found["aliases"] == {"stable": 2}
    assert found["problems"] == []
    assert actions(found) == ["add", "add", "add", "gates", "promote", "promote", "rollback"]
    assert "gain +0.02" in found["log"][5]["details"]["gates"]
    assert found["log"][6]["details"]["reason"] == "a drill"
    assert set(RunFolder(tmp_path / "release").lineage().parents) == {"base", "sparse", "full"}


def test_released_again_nothing_is_done_twice(config, tmp_path):
    first = run_one(config(), tmp_path / "release")
    assert run_one(config(), tmp_path / "release") == first


@pytest.mark.parametrize("stop_at", [0, 1, 2])
def test_an_interrupted_release_goes_on_with_the_next_step(config, tmp_path, monkeypatch, stop_at):
    class KilledError(Exception):
        pass

    taken = []
    take = module._take

    def until(*arguments, **named):
        if len(taken) == stop_at:
            raise KilledError
        taken.append(1)
        take(*arguments, **named)

    monkeypatch.setattr(module, "_take", until)
    with pytest.raises(KilledError):
        run_one(config(), tmp_path / "release")
    monkeypatch.undo()
    found = run_one(config(), tmp_path / "release")
    assert actions(found) == ["add", "add", "add", "gates", "promote", "promote", "rollback"]
    assert found["aliases"] == {"stable": 2}


def test_a_version_that_does_not_pass_stops_the_release_and_is_tried_again(config, runs, tmp_path):
    versions = {"sparse": {"source": runs["sparse"]}, "bad": {"source": runs["bad"]}}
    steps = [{"do": "promote", "version": "sparse"}, {"do": "promote", "version": "bad"}]
    stopping = config(versions=versions, steps=steps)
    for _ in range(2):
        with pytest.raises(GateError, match=r"package:2: .* say refuse .*0\.2 \[0\.18, 0\.22\]"):
            run_one(stopping, tmp_path / "release")
    log = Registry.open(str(tmp_path / "release" / "registry")).log()
    assert [entry.action for entry in log][-3:] == ["promote", "refuse", "refuse"]


def test_a_version_that_may_fail_is_passed_over_and_a_person_may_overrule(config, runs, tmp_path):
    steps = [
        {"do": "promote", "version": "sparse"},
        {"do": "promote", "version": "bad", "unless_passed": "go_on"},
        {"do": "promote", "version": "bad", "override": {"name": "Grace", "reason": "a test"}},
        {"do": "rollback", "version": "sparse", "reason": "enough"},
    ]
    versions = {"sparse": {"source": runs["sparse"]}, "bad": {"source": runs["bad"]}}
    wanted = config(versions=versions, steps=steps)
    found = run_one(wanted, tmp_path / "release")
    assert actions(found)[-4:] == ["promote", "refuse", "promote", "rollback"]
    assert found["log"][-2]["details"]["override"] == {"name": "Grace", "reason": "a test"}
    assert found["aliases"] == {"stable": 1}
    assert run_one(wanted, tmp_path / "release") == found


def test_audits_come_from_files_of_evidence(config, runs, tmp_path):
    path = tmp_path / "audits.json"
    write_json(path, {"audits": [{"suite": "bias", "verdict": "pass"}]})
    settings = {
        "versions": {"sparse": {"source": runs["sparse"], "evidence": [str(path)]}},
        "gates": {"stable": {**GATES, "audits": ["bias"]}},
        "steps": [{"do": "promote", "version": "sparse"}],
    }
    found = run_one(config(**settings), tmp_path / "release")
    assert found["versions"]["sparse"]["audits"][0]["verdict"] == "pass"
    assert actions(found) == ["add", "evidence", "gates", "promote"]
    assert run_one(config(**settings), tmp_path / "release") == found
    without = config(**{**settings, "versions": {"sparse": {"source": runs["sparse"]}}})
    with pytest.raises(GateError, match="audit bias: not audited"):
        run_one(without, tmp_path / "other")


def test_a_registry_is_shared_between_releases(config, tmp_path):
    shared = str(tmp_path / "shared")
    run_one(config(registry=shared), tmp_path / "one")
    found = run_one(config(registry=shared), tmp_path / "two")
    assert [version["number"] for version in found["versions"].values()] == [1, 2, 3]
    assert actions(found).count("add") == 3
    assert found["aliases"] == {"stable": 2}


def test_what_somebody_else_did_under_the_same_name_is_not_taken_for_a_step(config, tmp_path):
    wanted = config(steps=[{"do": "promote", "version": "sparse"}])
    run_one(wanted, tmp_path / "release")
    more = config(steps=[{"do": "rollback", "reason": "x"}])
    with pytest.raises(RegistryError, match=r"\(promote stable\) is none of this release's"):
        run_one(more, tmp_path / "release")


def test_what_makes_no_sense_is_said_in_a_line(config):
    with pytest.raises(
        ConfigError, match=r"steps\.0\.version: 'ful' is no name of versions \(did you mean 'full'"
    ):
        config(steps=[{"do": "promote", "version": "ful"}])


def test_the_command(config, tmp_path, monkeypatch, capsys):
    recipe = {"schema": 1, "name": "r", "release": config().model_dump(mode="json")}
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe))
    command = ["samara", "release", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    assert read_json(tmp_path / "out" / "summary.json")["aliases"] == {"stable": 2}
    add = ["registry", "add", "package", config().versions["sparse"].source]
    registry = ["--registry", str(tmp_path / "out" / "registry")]
    monkeypatch.setattr(sys, "argv", ["samara", *add, *registry])
    cli.main()
    assert "package:2: delta" in capsys.readouterr().out
