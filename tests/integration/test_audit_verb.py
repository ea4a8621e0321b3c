"""Audits as stages: evidence that knows whose it is, recorded with the version, asked by gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from samara.adapt.audits.config import AuditRunConfig
from samara.adapt.audits.seeds import compare_seeds
from samara.config import validate
from samara.errors import ConfigError, GateError, RegistryError
from samara.lifecycle import run_recipe
from samara.recipe import parse_recipe
from samara.runs import read_json

from .test_audit_finetuned import TEMPLATES
from .test_finetune import SPARSE, build

LIMITS = {
    "bias": {"max_gap_probability": 1.0},
    "stability": {
        "batch_sizes": [1, 2],
        "max_new_tokens": 2,
        "longest_input": 24,
        "min_consistency": 0.0,
        "min_seed_agreement": 0.0,
    },
    "bootstrap_samples": 200,
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two fine-tunings that differ in their seed, and an audit of the first."""
    folder = tmp_path_factory.mktemp("chain")
    base = build("llama", folder / "base")
    for split, number in (("train", 12), ("test", 6)):
        lines = [
            {"text": f"the {'film' if i % 3 else 'book'} is good .", "label": "ab"[i % 2]}
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "terms.yaml").write_text(yaml.safe_dump(TEMPLATES))
    tuning = {
        "init_from": str(base),
        "task": {"kind": "labels", "name": "kind", "data": str(folder / "test.jsonl")},
        "data": {"train": str(folder / "train.jsonl"), "sequence_length": 24},
        "method": SPARSE,
        "training": {"max_steps": 2, "batch_size": 4, "precision": "float32", "device": "cpu"},
        "logging": {"device_profile": "cpu-2core"},
    }
    audit = {
        "base": str(base),
        "templates": str(folder / "terms.yaml"),
        "limits": LIMITS,
        "device": "cpu",
    }
    return {
        "schema": 1,
        "name": "c",
        "stages": {
            "one": {"finetune": {"seed": 1, **tuning}},
            "two": {"finetune": {"seed": 2, **tuning}},
            "look": {"audit": {**audit, "tuned": "stage:one", "seeds": ["stage:two"]}},
        },
    }


@pytest.fixture(scope="module")
def done(chain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    run_recipe(parse_recipe(chain), folder, say=lambda _: None)
    return folder


def released(done: Path, tmp_path: Path, *, version: str, audits: list[str], evidence: bool) -> Any:
    source: dict[str, Any] = {"source": str(done / version)}
    if evidence:
        source["evidence"] = [str(done / "look")]
    gate = {"task": "kind", "metric": "accuracy", "bound": -1.0, "min_samples": 1}
    recipe = {
        "schema": 1,
        "name": "r",
        "release": {
            "line": "kind",
            "versions": {version: source},
            "gates": {"stable": {"kpis": [gate], "audits": audits}},
            "steps": [{"do": "promote", "version": version}],
            "actor": "ada",
        },
    }
    run_recipe(parse_recipe(recipe), tmp_path / "release", say=lambda _: None)
    return read_json(tmp_path / "release" / "summary.json")


def test_an_audit_stage_opens_the_gate_and_stays_with_the_version(done, tmp_path):
    suites = {row["suite"]: row for row in read_json(done / "look" / "audit.json")["audits"]}
    assert {suites[name]["verdict"] for name in ("bias", "stability", "stability/seeds")} == {
        "pass"
    }
    found = released(done, tmp_path, version="one", audits=["bias", "stability"], evidence=True)
    assert found["aliases"] == {"stable": 1}
    recorded = {row["suite"] for row in found["versions"]["one"]["audits"]}
    assert {"bias", "bias/plant", "stability/seeds", "stability/extremes"} <= recorded
    summary = read_json(done / "look" / "summary.json")
    assert summary["identity"] == found["versions"]["one"]["identity"]
    assert summary["scope"]["other_seeds"] == 1
    assert summary["scope"]["pairs_of_texts"] == 3
    assert read_json(done / "look" / "lineage.json")["parents"]["audited"] == summary["identity"]


def test_what_was_not_audited_is_refused(done, tmp_path):
    with pytest.raises(GateError, match=r"audit bias: not audited; audit stability: not audited"):
        released(done, tmp_path, version="one", audits=["bias", "stability"], evidence=False)


def test_the_audit_of_another_version_is_no_evidence(done, tmp_path):
    with pytest.raises(RegistryError, match=r"look is an audit of .*; audit what is released"):
        released(done, tmp_path, version="two", audits=["bias"], evidence=True)


def test_a_folder_without_a_finished_audit_is_refused(done, tmp_path):
    (done / "look" / "audit.json").rename(done / "look" / "hidden")
    try:
        with pytest.raises(RegistryError, match="is no finished audit; run it, or give a file"):
            released(done, tmp_path, version="one", audits=["bias"], evidence=True)
    finally:
        (done / "look" / "hidden").rename(done / "look" / "audit.json")


def test_seeds_are_compared_row_by_row_and_only_if_nothing_else_differs(done, tmp_path):
    found = compare_seeds(done / "one", [done / "two"])
    assert found.seeds == (1, 2)
    said = [
        [
            json.loads(line)["prediction"]
            for line in (done / name / "task_items.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    assert found.agreement.tolist() == [float(a == b) for a, b in zip(*said, strict=True)]
    with pytest.raises(ConfigError, match=r"the seeds \[1, 1\]; each must have one of its own"):
        compare_seeds(done / "one", [done / "one"])
    with pytest.raises(ConfigError, match=r"holds no results.json; give a finished"):
        compare_seeds(done / "one", [tmp_path])
    other = tmp_path / "other"
    other.mkdir()
    recipe = yaml.safe_load((done / "two" / "recipe.yaml").read_text())
    recipe["finetune"]["training"]["max_steps"] = 3
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (other / "results.json").write_text((done / "two" / "results.json").read_text())
    with pytest.raises(ConfigError, match=r"has another training than .*; only the seed may"):
        compare_seeds(done / "one", [other])
    recipe["finetune"]["training"]["max_steps"] = 2
    (other / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = read_json(done / "two" / "results.json")
    results["parents"]["data"] = "0" * 64
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConfigError, match="has another model or other rows than"):
        compare_seeds(done / "one", [other])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuned": "a", "deltas": ["b"]}, "deltas and tuned: give one of them"),
        ({"corpus": "a", "texts": ["b"]}, "corpus and texts: give one of them"),
        ({"suites": ["forgetting"]}, "forgetting needs text that the base knows"),
        ({"corpus": "a"}, "forgetting needs text that the base knows"),
        ({"seeds": ["a"]}, "seeds: compares runs with tuned in the stability audit"),
    ],
)
def test_settings_that_do_not_fit_are_said_in_a_line(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(AuditRunConfig, {"base": "b", **changes})
