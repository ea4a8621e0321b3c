"""The sections on fine-tuning and on the registry: figures as recorded, and what is missing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from samara.errors import CheckpointError
from samara.report.config import ReportConfig
from samara.report.inputs import read_inputs
from samara.report.page import render_page
from samara.report.sections.adaptation import adaptation
from samara.report.sections.audits import audits
from samara.report.sections.registry import registry
from samara.runs import RunFolder, write_json


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.03, "high": value + 0.03, "better": "higher"}


def results(method: str, **changes: Any) -> dict[str, Any]:
    is_sparse = method == "sparse"
    return {
        "schema": 1,
        "task": {"name": "package", "kind": "labels"},
        "method": method,
        "scores": {"accuracy": score(0.66 if is_sparse else 0.7), "macro_f1": score(0.5)},
        "base_scores": None,
        "num_items": 800,
        "left_out": 225,
        "confidence": 0.95,
        "train_loss": 0.9,
        "validation_loss": 1.0,
        "steps": 40,
        "tokens": 40_000,
        "flops": 1e12,
        "seconds": {"selection": 2.5 if is_sparse else 0.0, "training": 30.0, "scoring": 3.0},
        "tokens_per_second": 1333.3,
        "peak_memory_bytes": 300_000_000,
        "optimizer_bytes": 1_000_000 if is_sparse else 25_600_000,
        "trained_parameters": 64_000 if is_sparse else 3_200_000,
        "parameters": 3_200_000,
        "storage_bytes": 256_000 if is_sparse else 12_800_000,
        "artefacts": {"delta.safetensors": 256_000},
        **changes,
    }


def write_tuned(folder: Path, found: dict[str, Any] | None) -> str:
    folder.mkdir(parents=True)
    records = [
        {"step": step, "tokens": step * 1000, "flops": 1.0, "seconds": step, "loss": 3 - step / 40}
        for step in range(1, 41)
    ]
    records.append({"step": 40, "tokens": 40_000, "flops": 1.0, "validation_loss": 2.1})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    if found is not None:
        write_json(folder / "results.json", found)
    return str(folder)


def entry(number: int, action: str, **details: Any) -> dict[str, Any]:
    return {
        "number": number,
        "at": "2026-01-01T00:00:00+00:00",
        "actor": "ada",
        "action": action,
        "details": details,
        "sha256": "a" * 64,
    }


def version(number: int, accuracy: float) -> dict[str, Any]:
    scored = {"task": "package", "metric": "accuracy", "value": accuracy, "n": 800}
    return {
        "number": number,
        "kind": "delta",
        "identity": f"{number}" * 64,
        "made_from": ["package:1"] if number > 1 else [],
        "files": {"delta.safetensors": 200_000, "results.json": 2_000},
        "evaluations": [{**scored, "ci": [accuracy - 0.03, accuracy + 0.03]}],
        "audits": [{"suite": "bias", "verdict": "pass"}],
    }


GATES = {
    "kpis": [
        {
            "task": "package", "metric": "accuracy", "direction": "higher", "bound": 0.3,
            "max_loss": 0.1, "min_samples": 500, "is_rate": False,
        }
    ],
    "audits": ["bias"],
}  # fmt: skip
RELEASE = {
    "schema": 1,
    "line": "package",
    "versions": {"sparse": version(1, 0.66), "full": version(2, 0.7)},
    "aliases": {"stable": 1},
    "log": [
        entry(1, "add", version=1),
        entry(2, "add", version=2),
        entry(3, "gates", alias="stable", content=GATES),
        entry(4, "promote", alias="stable", version=1, gates="accuracy: good", override=None),
        entry(
            5, "promote", alias="stable", version=2, gates="accuracy: doubtful",
            override={"name": "Grace", "reason": "a test"},
        ),
        entry(6, "rollback", alias="stable", version=1, reason="<b>a drill</b>"),
    ],
    "problems": [],
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path):
    """Inputs of a report on two runs of a task, one of another, and a release."""

    def make(
        runs: dict[str, Any] | None = None, release: dict[str, Any] | None = RELEASE, **changes: Any
    ):
        known = runs or {"sparse": results("sparse"), "full": results("full")}
        folders = {name: write_tuned(tmp_path / name, found) for name, found in known.items()}
        (tmp_path / "release").mkdir()
        if release is not None:
            write_json(tmp_path / "release" / "summary.json", release)
        settings = {"finetuning": folders, "release": str(tmp_path / "release"), **changes}
        run = RunFolder(tmp_path / "report")
        run.path.mkdir()
        return read_inputs(ReportConfig.model_validate(settings), run)

    return make


def words(text: str) -> str:
    plain = html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", text)))
    return re.sub(r" +", " ", plain.replace("\u00a0", " ").replace("\u202f", " "))


def test_without_runs_there_is_no_section(quickstart):
    found = read_inputs(*quickstart())
    assert adaptation(found) is None
    assert audits(found) is None
    assert registry(found) is None


def test_the_methods_stand_side_by_side(inputs):
    markup = adaptation(inputs()).render()
    text = words(markup)
    assert (
        "package (labels) 800 rows scored; 225 more have another label and were left out." in text
    )
    assert (
        "sparse : accuracy 0.660 against 0.700 of full (their intervals overlap), 98 % smaller to "
        "store." in text
    )
    assert "accuracy 0.660 [0.630, 0.690] 0.700 [0.670, 0.730]" in text
    assert "share of the model 2.0 % 100 %" in text
    assert "choosing them 2.50 s \u2014" in text
    assert "optimizer state 1.00 MB 25.6 MB" in text
    assert "to store and send 256 kB 12.8 MB" in text
    assert "bytes per trained weight 4.0 4.0" in text
    assert "Loss of each method against steps: sparse ends at 2.1" in markup


def test_scores_before_and_tasks_apart(inputs):
    other = results(
        "sparse",
        task={"name": "first-line", "kind": "summarization"},
        scores={"rougeL": score(0.2), "bits_per_byte": score(1.5)},
        base_scores={"rougeL": score(0.05)},
        left_out=0,
    )
    text = words(adaptation(inputs({"a": results("sparse"), "b": other})).render())
    assert text.index("package (labels)") < text.index("first-line (summarization)")
    assert "800 rows scored. " in text
    assert "rougeL before 0.050" in text
    assert "bits per byte 1.500" in text


def test_intervals_that_do_not_meet_are_said(inputs):
    far = results("full", scores={"accuracy": score(0.9)})
    text = words(adaptation(inputs({"sparse": results("sparse"), "full": far})).render())
    assert "(their intervals do not meet)" in text
    assert "macro f1 0.500 [0.470, 0.530] \u2014" in text


def test_a_run_without_results_is_said(inputs):
    text = words(adaptation(inputs({"sparse": None, "full": results("full")})).render())
    assert "sparse has no results yet (unfinished)." in text


def test_versions_gates_promotions_and_the_way_back(inputs):
    markup = registry(inputs()).render()
    text = words(markup)
    assert "2 versions of package; stable is version 1 (sparse)." in text
    assert "every file were read again: all whole." in text
    assert "accuracy 0.660 [0.630, 0.690] bias: pass stable" in text
    assert "accuracy of package above 0.3 and at most 0.1 worse" in text
    assert "on 500 rows or more; audit bias passed" in text
    assert "version 1 (sparse) promoted to stable ada accuracy: good" in text
    assert "accuracy: doubtful; overridden by Grace: a test" in text
    assert "stable rolled back to version 1 (sparse) ada <b>a drill</b>" in text
    assert "<b>a drill" not in markup


def audit_summary(**scope: Any) -> dict[str, Any]:
    def row(suite: str, after: float, verdict: str, **more: Any) -> dict[str, Any]:
        found = {"suite": suite, "before": None, "after": after, "verdict": verdict}
        return {**found, "ci_of_change": None, **more}

    return {
        "schema": 1,
        "identity": "a" * 64,
        "audits": [
            row("bias", 0.08, "fail"),
            row("bias/age", 0.05, "pass", before=0.04, ci_of_change=[0.0, 0.02]),
            row("stability", 0.75, "pass"),
            row("stability/extremes", 1.0, "pass"),
        ],
        "scope": {
            "templates": "documentation", "language": "en", "attributes": ["age", "income"],
            "confidence": 0.95, "unit": "probability", "pairs_of_texts": 40, "prompts": 12,
            "pairs_of_wordings": 30, "batch_sizes": [1, 16], "repeats": 1, "extreme_inputs": 20,
            "other_seeds": 0, **scope,
        },
    }  # fmt: skip


def test_audits_say_what_was_looked_at_and_what_was_not(inputs, tmp_path):
    folders = {}
    for name, found in (("sparse", audit_summary()), ("full", audit_summary(other_seeds=2))):
        write_json(tmp_path / f"audit-{name}" / "summary.json", found)
        folders[name] = str(tmp_path / f"audit-{name}")
    (tmp_path / "later").mkdir()
    found = inputs(audits={**folders, "later": str(tmp_path / "later")})
    text = words(audits(found).render())
    assert "bias gap between two protected terms, mean fail 0.080 fail 0.080" in text
    assert "age pass 0.040 \u2192 0.050, change [0.000, 0.020]" in text
    assert "stability worst of what follows pass pass" in text
    assert (
        "sparse: 40 pairs of texts on age and income (set \u201cdocumentation\u201d, en), gaps in "
        "probability moved from one label to others; 12 prompts at batch sizes 1 and 16, 1 run "
        "each; 30 pairs of wordings; 20 extreme inputs; other seeds not compared. Intervals of "
        "95 %." in text
    )
    assert "2 other seeds compared" in text
    assert "later is not audited yet (unfinished)." in text
    assert '<a href="#audits">Audits</a>' in render_page(found)


def test_a_damaged_registry_is_said(inputs):
    text = words(registry(inputs(release={**RELEASE, "problems": ["package:1: gone"]})).render())
    assert "Damaged: package:1: gone." in text


def test_a_release_that_has_not_finished(inputs):
    text = words(registry(inputs(release=None)).render())
    assert "The release has not finished yet (unfinished)." in text


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"finetuning": {"a": "/nowhere"}}, "finetuning.a"),
        ({"release": "/nowhere"}, "release"),
        ({"audits": {"a": "/nowhere"}}, "audits.a"),
    ],
)
def test_folders_that_do_not_exist(tmp_path, settings, key):
    with pytest.raises(CheckpointError, match=f"report.{key}: /nowhere: no such folder"):
        read_inputs(ReportConfig.model_validate(settings), RunFolder(tmp_path))


def test_the_sections_stand_on_the_page(inputs):
    text = render_page(inputs())
    assert '<a href="#adaptation">Fine-tuning</a>' in text
    assert '<a href="#registry">Versions</a>' in text
