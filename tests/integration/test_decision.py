"""The decision table: its sums against hand-made runs, and the whole of it at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from samara.adapt.results import write_items
from samara.measure.ownership import load_prices
from samara.measure.task_metrics import Item

from .test_finetune import build

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (1, 2)
RATES = dict.fromkeys(("full", "sparse", "lora"), (0.1, 0.2))


# --- sums -----------------------------------------------------------------------------------------


def items(right, rows=200):
    """So many of the rows right, the others wrong: the same rows first."""
    return [
        Item(
            line=line,
            id=None,
            scores={"accuracy": float(line <= right)},
            sums={},
            gold=(str(line % 2),),
            prediction=str(line % 2) if line <= right else "x",
            is_truncated=False,
            details={},
        )
        for line in range(1, rows + 1)
    ]


def finished(out, kind, task, arm, seed, right, **more):
    """A row and its items, as the queue leaves them."""
    row = {"name": f"{kind}_{task}_{arm}_{seed}", "kind": kind, "task": task, "arm": arm}
    row |= {"seed": seed, "lr": 0.0 if kind == "base" else 0.1, "wall": 36.0}
    row |= {"scores": {"accuracy": {}}, "seconds": {"selection": 0.0, "training": 72.0}}
    row["seconds"]["scoring"] = 36.0
    row |= {"tokens_per_second": 100.0, "optimizer_bytes": 8, "storage_bytes": 1e9}
    row |= {"trained_parameters": 5, "peak_memory_bytes": 10 * seed, **more}
    (out / row["name"]).mkdir()
    if right is not None:
        write_items(items(right), out / row["name"])
    return row


def sums_of(benchmark, out, rows):
    best = {
        (row["task"], row["arm"]): 0.1 for row in rows if row["kind"] == "run" and row["arm"] != "b"
    }
    prices = load_prices(ROOT / "benchmarks" / "prices.yaml")
    found = benchmark("decision_sums").sums(
        rows, out, best, seeds=SEEDS, rates=RATES, prices=prices
    )
    return {row["name"]: row for row in found}


def test_sums_are_those_of_hand_made_runs(benchmark, tmp_path):
    rows = [finished(tmp_path, "base", "t", "base", 1, 100)]
    for arm, right in (("full", 160), ("sparse", 159), ("lora", 120)):
        rows += [finished(tmp_path, "run", "t", arm, seed, right) for seed in SEEDS]
    audit = {"suite": "bias", "before": 0.1, "after": 0.2, "verdict": "fail"}
    rows.append(
        finished(tmp_path, "audit", "t", "sparse", 1, None, audits=[audit], switch_seconds=0.36)
    )
    found = sums_of(benchmark, tmp_path, rows)
    sparse = found["summary t sparse"]
    assert sparse["scores"]["accuracy"]["value"] == pytest.approx(159 / 200)
    assert set(sparse["scores"]) == {"accuracy", "macro_recall", "macro_f1"}
    assert sparse["against"]["full"]["value"] == pytest.approx(-1 / 200)
    assert sparse["against"]["base"]["value"] == pytest.approx(59 / 200)
    assert sparse["against"]["lora"]["value"] == pytest.approx(39 / 200)
    assert (sparse["spread_of_seeds"], sparse["agreement_of_seeds"]) == (0.0, 1.0)
    assert (sparse["is_at_edge"], sparse["peak_memory_bytes"]) == (True, 20)
    sheet = sparse["ownership"]  # an hour is 3.00; five trials; three copies for twelve months
    assert sheet["training"] == pytest.approx(5 * 72 / 3600 * 3)
    assert sheet["evaluation"] == pytest.approx(5 * (36 + 36) / 3600 * 3)
    assert sheet["storage"] == pytest.approx(3 * 12 * 0.023)
    assert sheet["switching"] == pytest.approx(10000 * 0.36 / 3600 * 3)
    assert sheet["return"]["value"] == pytest.approx((29.5 * 10 - sheet["total"]) / sheet["total"])
    assert found["summary t full"]["ownership"] is None
    # one row of 200 lost: the interval reaches below one point
    assert found["pooled sparse"]["verdict"] == "inconclusive"
    assert found["pooled lora"]["verdict"] == "inferior"
    assert found["pooled lora"]["against"].keys() == {"full"}


def test_equal_runs_are_non_inferior_and_without_signal_nothing_is_said(benchmark, tmp_path):
    rows = [finished(tmp_path, "base", task, "base", 1, 100) for task in "tu"]
    for arm in ("full", "sparse"):
        rows += [finished(tmp_path, "run", "t", arm, seed, 160) for seed in SEEDS]
        rows += [finished(tmp_path, "run", "u", arm, seed, 109) for seed in SEEDS]
    found = sums_of(benchmark, tmp_path, rows)
    assert found["summary t sparse"]["has_signal"] is True
    assert found["summary u sparse"]["has_signal"] is False
    assert found["pooled sparse"]["tasks"] == ["t"]
    assert found["pooled sparse"]["verdict"] == "non-inferior"
    only = [row for row in rows if row["task"] == "u"]
    assert sums_of(benchmark, tmp_path, only)["pooled sparse"]["verdict"] == "no signal"


def test_a_method_is_summed_up_when_all_its_seeds_are_in(benchmark, tmp_path):
    rows = [finished(tmp_path, "base", "t", "base", 1, 100)]
    rows += [finished(tmp_path, "run", "t", "full", seed, 160) for seed in SEEDS]
    rows.append(finished(tmp_path, "run", "t", "sparse", 1, 160))
    found = sums_of(benchmark, tmp_path, rows)
    assert "summary t full" in found
    assert "summary t sparse" not in found


# --- the whole ------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A base, a recipe and text, in the folder of the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMARA_CACHE", str(tmp_path / "cache"))
    build("llama", tmp_path / "base")
    words = ("good", "bad", "great", "awful")
    for split, number in (("train", 24), ("test", 8)):
        lines = [
            json.dumps(
                {
                    "text": f"the {'film' if i % 3 else 'book'} is {words[i % 4]} .",
                    "label": ("positive", "negative")[i % 2],
                }
            )
            for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    labels = {"positive": "good", "negative": "bad"}
    recipe = {
        "init_from": "any",
        "task": {
            "kind": "classification",
            "name": "films",
            "data": "test.jsonl",
            "labels": labels,
            "prompt": "{text} :",
        },
        "data": {"train": "train.jsonl", "sequence_length": 24},
        "method": {"kind": "sparse", "selection": {"density": 0.5}},
        "training": {"max_steps": 3, "batch_size": 6, "precision": "float32"},
        "schedule": {"kind": "cosine", "warmup_steps": 0},
        "logging": {"device_profile": "cpu-2core"},
    }
    text = yaml.safe_dump({"schema": 1, "name": "films", "finetune": recipe})
    (tmp_path / "films.yaml").write_text(text)
    (tmp_path / "known.txt").write_text("the sky is blue . the grass is green . " * 12)
    templates = {
        "schema": 1,
        "language": "en",
        "sentences": [
            {"context": "the {term} is", "continuations": ["good", "bad"]},
            {"context": "a {term} is", "continuations": ["great", "awful"]},
        ],
        "attributes": {"plant": {"pairs": [["grass", "rose"]]}},
        "paraphrases": [["the sky is", "the film is"]],
    }
    (tmp_path / "templates.yaml").write_text(yaml.safe_dump(templates))
    return tmp_path


ARGUMENTS = ["--base", "base", "--task", "films.yaml", "--out", "out", "--scale", "toy"]


def test_the_toy_table_is_whole_goes_on_and_is_shown(benchmark, work, capsys):
    decision = benchmark("decision")
    options = [
        *ARGUMENTS,
        "--text",
        "known.txt",
        "--templates",
        "templates.yaml",
        "--workers",
        "0",
        "--json",
        "decision.json",
    ]
    options += ["--arm", "sparse, as many as LoRA", "--arm", "lora"]
    decision.main(options)
    written = json.loads((work / "decision.json").read_text())
    assert written["complete"] is True, capsys.readouterr().out
    by_kind = {}
    for row in written["rows"]:
        by_kind.setdefault(row["kind"], []).append(row)
    arms = ["full", "sparse, as many as LoRA", "lora"]
    # two rates at the first seed, the better one at the second; both of these are audited
    assert {kind: len(rows) for kind, rows in by_kind.items()} == {
        "base": 1,
        "run": 9,
        "audit": 6,
        "summary": 3,
        "pooled": 2,
    }
    assert [row["arm"] for row in by_kind["summary"]] == arms
    counts = {row["arm"]: row["trained_parameters"] for row in by_kind["summary"]}
    assert counts["lora"] == counts["sparse, as many as LoRA"]
    for row in by_kind["summary"]:
        suites = [audit["suite"] for audit in row["audits"]]
        assert {"bias", "stability", "forgetting"} <= set(suites)
        assert suites.count("forgetting") == 2
        assert row["switch_seconds"] > 0
        assert row["ownership"]["total"] > 0
    losers = [p for p in (work / "out").glob("run_films_full_1_*") if not (p / "model").exists()]
    assert len(losers) == 1

    capsys.readouterr()
    decision.main(options)  # all is there: only the sums are made again
    again = json.loads((work / "decision.json").read_text())
    assert capsys.readouterr().out == ""
    assert again["rows"] == written["rows"]

    page = benchmark("results").decision([written])
    assert "films: quality (8 rows, 2 seeds" in page
    assert "films: audits, change against the base" in page
    for arm in arms:
        assert page.count(f"| {arm} |") >= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "perplexity"}, "task.kind perplexity: give one of labels"),
        (None, "another task is named 'films', too"),
    ],
)
def test_recipes_that_make_no_table_are_refused(benchmark, work, change, message):
    arguments = list(ARGUMENTS)
    if change is None:
        arguments += ["--task", "films.yaml"]
    else:
        recipe = yaml.safe_load((work / "films.yaml").read_text())
        recipe["finetune"]["task"] = {"name": "films", "data": "test.jsonl", **change}
        (work / "films.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit, match=message):
        benchmark("decision").main(arguments)


def test_every_method_gets_a_sweep_of_equal_size(benchmark):
    decision = benchmark("decision")
    for scale in decision.SCALES.values():
        assert len({len(rates) for rates in scale.lrs.values()}) == 1
        assert {decision.ARMS[arm]["kind"] for arm in scale.arms} <= set(scale.lrs)
    assert len(decision.SCALES["real"].lrs["full"]) >= 5
    assert len(decision.SCALES["real"].seeds) >= 3
