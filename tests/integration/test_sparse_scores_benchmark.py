"""The ablation of scores sweeps, runs the best rate at all seeds, and compares with chance."""

from __future__ import annotations

import json

import pytest

from samara.runs import read_json

from .test_finetune import build


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMARA_CACHE", str(tmp_path / "cache"))
    build("llama", tmp_path / "base")
    words = ("good", "bad", "great", "awful")
    for split, number in (("train", 24), ("test", 8)):
        rows = [
            {"sentence": f"the film is {words[i % 4]} .", "kind": ("plus", "minus")[i % 2]}
            for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


COMMAND = [
    *("--base", "base", "--train", "train.jsonl", "--test", "test.jsonl"),
    *("--text", "{sentence}", "--label", "kind", "--out", "out", "--workers", "0"),
    *("--steps", "2", "--batch", "4", "--length", "16", "--samples", "4", "--seeds", "2"),
    *("--lr", "0.001", "0.01", "--json", "sparse_scores-toy.json"),
]


def test_scores_are_compared_at_their_best_rates(benchmark, work, monkeypatch, capsys):
    bench = benchmark("sparse_scores")
    command = [*COMMAND, "--scores", "grad_fisher", "lift", "--density", "0.2"]
    bench.main(command)
    printed = capsys.readouterr().out.splitlines()
    written = read_json(work / "sparse_scores-toy.json")
    runs = [row for row in written["rows"] if row["kind"] == "run"]
    found = {row["score"]: row for row in written["rows"] if row["kind"] == "summary"}
    assert set(found) == {"grad_fisher", "lift", "random"}
    assert len(printed) == len(runs) == 3 * (2 + 1)
    assert written["complete"] is True
    for score, row in found.items():
        sweep = [r for r in runs if r["score"] == score and r["seed"] == 1]
        assert row["lr"] == min(sweep, key=lambda r: r["validation_loss"])["lr"]
        assert len(row["validation_losses"]) == 2
        assert row["trained"] == found["random"]["trained"]
        assert (row["against_random"] is None) == (score == "random")
    page = benchmark("results").markdown(work)
    assert "2 steps of 4 rows, 2 seeds." in page
    assert "| 20.00%, lift |" in page
    monkeypatch.setattr(bench, "carry_out", None)  # nothing is run again
    bench.main(command)
    assert read_json(work / "sparse_scores-toy.json")["rows"] == written["rows"]


def test_what_the_verb_refuses_is_said_before_anything_runs(benchmark, work):
    with pytest.raises(SystemExit, match="density"):
        benchmark("sparse_scores").main([*COMMAND, "--density", "1.5"])
