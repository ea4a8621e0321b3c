"""Results on disk, their tables, and the verdict on two models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from samara.errors import CheckpointError, ConfigError
from samara.measure.paired import compare_paired, paired_report, paired_table
from samara.measure.task_metrics import METRICS, Item
from samara.measure.task_results import (
    ITEMS_FILE,
    RESULTS_FILE,
    TaskResults,
    read_results,
    shown,
    task_table,
    text_table,
    write_results,
)


def scored(values: Sequence[float], metric: str = "acc") -> list[Item]:
    kind = METRICS[metric].kind
    return [
        Item(
            line=number,
            id=f"row-{number}",
            scores={} if kind == "exp_ratio" else {metric: value},
            sums={metric: (value, 2.0)} if kind == "exp_ratio" else {},
            gold=("a",),
            prediction="a" if value else "b",
            is_truncated=False,
            details={"loglikelihoods": [-1.5, -2.25]},
        )
        for number, value in enumerate(values, start=1)
    ]


def results(name: str = "a", **tasks: tuple[str, Sequence[float]]) -> TaskResults:
    items = {task: scored(values, metric) for task, (metric, values) in tasks.items()}
    summary = {
        "schema": 1,
        "model": {"path": name, "weights_hash": "0", "max_length": 8},
        "confidence": 0.95,
        "seed": 1,
        "tasks": {
            task: {
                "task_hash": f"{task} {len(values)}",
                "metric": metric,
                "num_items": len(values),
                "num_rows": len(values),
                "num_fewshot": 0,
                "num_truncated": 0,
                "data": {"path": "p", "hash": str(len(values))},
                "fewshot_data": None,
                "scores": {
                    metric: {
                        "value": 0.5,
                        "low": 0.25,
                        "high": None,
                        "better": METRICS[metric].better,
                    }
                },
            }
            for task, (metric, values) in tasks.items()
        },
        "averages": {},
        "not_run": {},
    }
    return TaskResults(summary=summary, items=items)


def verdict(metric: str, a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    report = compare_paired(results(t=(metric, a)), results(t=(metric, b)))
    score: dict[str, Any] = report["tasks"]["t"]["scores"][metric]
    return score


# --- verdicts ---------------------------------------------------------------------------------


def test_mcnemar_decides_on_zeros_and_ones():
    clear = verdict("acc", [0.0] * 10 + [1.0] * 10, [1.0] * 20)
    assert clear["verdict"] == "better"
    assert clear["mcnemar"] == {"only_a": 0, "only_b": 10, "p": 2 / 2**10}
    assert clear["difference"]["value"] == pytest.approx(0.5)
    assert verdict("acc", [1.0] * 20, [0.0] * 10 + [1.0] * 10)["verdict"] == "worse"


def test_a_few_rows_that_all_agree_on_the_better_model_prove_nothing():
    # The bootstrap would be sure: every resample says the same.
    few = verdict("acc", [0.0] * 4, [1.0] * 4)
    assert few["difference"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert few["mcnemar"]["p"] == 0.125
    assert few["verdict"] == "unresolved"


def test_the_bootstrap_decides_on_other_scores():
    low = [0.1, 0.2, 0.3, 0.4] * 10
    high = [value + 0.1 for value in low]
    assert verdict("f1", low, high)["verdict"] == "better"
    assert verdict("f1", high, low)["verdict"] == "worse"
    assert verdict("f1", low, low)["verdict"] == "unresolved"
    assert verdict("f1", low, high)["mcnemar"] is None


def test_less_perplexity_is_better():
    low, high = [2.0, 3.0] * 10, [2.5, 3.5] * 10
    assert verdict("perplexity", high, low)["verdict"] == "better"
    assert verdict("perplexity", low, high)["verdict"] == "worse"
    assert verdict("perplexity", low, high)["difference"]["value"] == pytest.approx(0.25)


def test_a_bias_is_not_ranked():
    assert verdict("pct_stereotype", [0.0] * 30, [1.0] * 30)["verdict"] == "not ranked"


def test_the_average_is_over_shared_tasks_that_can_be_ranked():
    a = results("A", x=("acc", [0.0] * 30), y=("f1", [0.5] * 9), z=("pct_stereotype", [0.0] * 9))
    b = results("B", x=("acc", [1.0] * 30), y=("f1", [0.5] * 9), z=("pct_stereotype", [1.0] * 9))
    average = compare_paired(a, b)["average"]
    assert average["tasks"] == ["x", "y"]
    assert average["difference"]["value"] == pytest.approx(0.5)
    assert average["verdict"] == "better"


def test_models_asked_different_things_are_not_compared():
    with pytest.raises(
        ConfigError,
        match=r"task 't': the two models were not asked the same \(data and number of rows diff",
    ):
        compare_paired(results(t=("acc", [1.0] * 3)), results(t=("acc", [1.0] * 4)))
    other = results(t=("acc", [1.0] * 3))
    other.summary["tasks"]["t"]["task_hash"] = "another prompt"
    with pytest.raises(ConfigError, match=r"the task file, the solved examples or the seed differ"):
        compare_paired(results(t=("acc", [1.0] * 3)), other)


def test_models_without_a_common_task_are_not_compared():
    with pytest.raises(ConfigError, match="the results of A and B have no task in common"):
        compare_paired(results("A", x=("acc", [1.0])), results("B", y=("acc", [1.0])))


# --- files ------------------------------------------------------------------------------------


def test_results_read_back_as_they_were(tmp_path: Path):
    written = results(x=("acc", [1.0, 0.0]), y=("perplexity", [2.0, 3.0]))
    write_results(written, tmp_path)
    read = read_results(tmp_path)
    assert read.summary == written.summary
    assert read.items == written.items


def test_two_folders_are_compared(tmp_path: Path):
    write_results(results("A", t=("acc", [0.0] * 12)), tmp_path / "a")
    write_results(results("B", t=("acc", [1.0] * 12), u=("acc", [1.0])), tmp_path / "b")
    report = paired_report(tmp_path / "a", tmp_path / "b")
    assert report["only_b"] == ["u"]
    assert report["tasks"]["t"]["scores"]["acc"]["verdict"] == "better"
    table = paired_table(report)
    assert "+100.00 pt  +100.00 to +100.00 pt  0.000488  better" in table
    assert table.splitlines()[-4:-2] == ["A: A", "B: B"]
    assert table.endswith("\nonly B has u")


def test_a_perplexity_s_difference_is_shown_as_that_of_logarithms():
    low, high = [2.0, 3.0] * 10, [2.5, 3.5] * 10
    report = compare_paired(results(t=("perplexity", low)), results(t=("perplexity", high)))
    assert "+0.25 ln" in paired_table(report)


def _drop_line(folder: Path) -> None:
    path = folder / ITEMS_FILE
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / RESULTS_FILE).unlink(), "holds no task_results.json; give a fol"),
        (lambda folder: (folder / RESULTS_FILE).write_text("{"), "task_results.json: not valid JS"),
        (lambda folder: (folder / RESULTS_FILE).write_text("{}"), "is not of schema 1; evaluate t"),
        (lambda folder: (folder / ITEMS_FILE).unlink(), "task_items.jsonl: cannot be read"),
        (lambda folder: (folder / ITEMS_FILE).write_text("{}\n"), "task_items.jsonl: cannot be re"),
        (
            _drop_line,
            r"task_items.jsonl: holds 2 rows of t, task_results.json says 3; evaluate the",
        ),
    ],
)
def test_incomplete_results_are_one_clear_line(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
):
    write_results(results(t=("acc", [1.0] * 3)), tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_results(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


# --- tables -----------------------------------------------------------------------------------


def test_the_table_says_what_a_reader_must_know():
    summary = json.loads(
        json.dumps(results(x=("acc", [1.0] * 3), z=("pct_stereotype", [1.0] * 3)).summary)
    )
    summary["tasks"]["x"] |= {"num_truncated": 2, "num_rows": 9, "num_fewshot": 5}
    summary["not_run"] = {"race": "no race/test.jsonl"}
    summary["averages"] = {
        "average": {"value": 0.5, "low": 0.4, "high": 0.6, "tasks": ["x"], "missing": ["race"]}
    }
    header, _, *lines = [" ".join(line.split()) for line in task_table(summary).splitlines()]
    assert header == "task shots score value 95% interval rows"
    assert lines == [
        "x 5 acc 50.00 % - 3",
        "z 0 pct_stereotype (higher is not better) 50.00 % - 3",
        "average 50.00 % 40.00 % to 60.00 %",
        "x: 2 of 3 prompts were longer than the model's context (8 tokens) and lost their "
        "beginning",
        "x: 3 of 9 rows, evenly spread",
        "x: solved examples come from the scored rows",
        "average: without race, not run",
        "not run: race: no race/test.jsonl",
    ]


def test_a_score_is_shown_as_people_read_it():
    assert shown("acc", 0.12345) == "12.35 %"
    assert shown("perplexity", 12.34567) == "12.346"
    assert shown("acc", None) == "-"


def test_columns_are_aligned():
    assert text_table([("a", "bb"), ("ccc", "d")], right=(1,)) == "a    bb\n---  --\nccc   d"
