"""Which rows a fine-tuning takes: how many, of which labels, and what becomes of the others."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from samara.adapt.config import FinetuneConfig, LabelsConfig
from samara.adapt.cross_validation import _fold_config, fold_of_rows
from samara.adapt.data import find_labels, read_task_rows, read_training_rows, with_labels
from samara.config import validate
from samara.errors import ConfigError, DataError
from samara.runs import RunFolder

LABELS = ["torch"] * 8 + ["sympy"] * 6 + ["numpy"] * 6 + ["rich"]


def write(path: Path, labels: list[str]) -> Path:
    rows = [{"text": f"text {n}\nand more", "label": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(train: Path, *, data: dict[str, Any] | None = None, **task: Any) -> FinetuneConfig:
    return validate(
        FinetuneConfig,
        {
            "init_from": "model",
            "task": {"kind": "labels", "name": "t", "data": str(train), **task},
            "data": {"train": str(train), **(data or {})},
            "training": {"epochs": 1},
        },
    )


def test_rows_are_chosen_by_content_and_keep_their_order(tmp_path):
    labels = [f"label{n % 3}" for n in range(40)]
    path = write(tmp_path / "a.jsonl", labels)
    whole = [row.fields["text"] for row in read_training_rows(settings(path))]
    some = [r.fields["text"] for r in read_training_rows(settings(path, data={"max_rows": 10}))]
    assert len(some) == 10
    assert some == [text for text in whole if text in some]
    lines = path.read_text().splitlines()
    reordered = tmp_path / "b.jsonl"
    reordered.write_text("\n".join(reversed(lines)) + "\n")
    again = read_training_rows(settings(reordered, data={"max_rows": 10}))
    assert {row.fields["text"] for row in again} == set(some)
    assert len(read_training_rows(settings(path, data={"max_rows": 99}))) == 40


def test_the_held_out_rows_are_among_the_most_rows_and_the_hash_tells_them_apart(tmp_path):
    path = write(tmp_path / "a.jsonl", LABELS * 2)
    found = read_task_rows(settings(path, data={"max_rows": 20}))
    assert (len(found.train), len(found.validation)) == (18, 2)
    assert found.hash == read_task_rows(settings(path, data={"max_rows": 20})).hash
    assert found.hash != read_task_rows(settings(path)).hash
    assert found.hash != read_task_rows(settings(path, data={"max_rows": 21})).hash


def test_the_most_frequent_labels_are_kept_and_the_first_by_name_of_equals(tmp_path):
    path = write(tmp_path / "a.jsonl", LABELS)
    config = settings(path, max_labels=2, other_labels="leave_out")
    rows = read_training_rows(config)
    labels = find_labels(config.task, rows)
    assert labels == ("numpy", "torch")
    kept = Counter(row.fields["label"] for row in with_labels(rows, config.task, labels))
    assert kept == {"torch": 8, "numpy": 6}


def test_rows_of_other_labels_stay_where_they_are_to_be_refused(tmp_path):
    rows = read_training_rows(settings(write(tmp_path / "a.jsonl", LABELS)))
    config = LabelsConfig(name="t", data="x")
    assert with_labels(rows, config, ("torch", "sympy")) == rows


def test_labels_that_leave_nothing(tmp_path):
    rows = read_training_rows(settings(write(tmp_path / "a.jsonl", LABELS)))
    config = LabelsConfig(name="t", data="x", labels=("a", "b"), other_labels="leave_out")
    with pytest.raises(DataError, match=r"a\.jsonl: no row has one of the 2 labels"):
        with_labels(rows, config, ("a", "b"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"max_labels": 2}, "leaves rows out; say so with other_labels: leave_out"),
        (
            {"max_labels": 2, "labels": ["a", "b"], "other_labels": "leave_out"},
            "max_labels: chooses among labels, and labels names them; give one",
        ),
    ],
)
def test_settings_that_contradict_each_other(task, message):
    with pytest.raises(ConfigError, match=message):
        settings(Path("x.jsonl"), **task)


def test_folds_share_one_head_and_are_not_cut_again(tmp_path):
    path = write(tmp_path / "a.jsonl", LABELS)
    config = settings(path, data={"max_rows": 18}, max_labels=2, other_labels="leave_out", limit=3)
    rows = read_training_rows(config)
    part = RunFolder(tmp_path / "folds" / "0")
    part.path.mkdir(parents=True)
    fold = _fold_config(config, part, rows, fold_of_rows(rows, 3), 0)
    assert isinstance(fold.task, LabelsConfig)
    assert fold.task.labels == find_labels(config.task, rows)
    assert (fold.task.max_labels, fold.task.limit, fold.data.max_rows) == (None, None, None)
    assert len(read_training_rows(fold)) == 12


def test_a_field_is_taken_apart_before_rows_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"first {n}\nrest {n}" if n % 2 else f"alone {n}" for n in range(20)]
    path.write_text("".join(json.dumps({"text": t, "label": "a"}) + "\n" for t in texts))
    rows = read_training_rows(settings(path, data={"max_rows": 4}, split_first_line="text"))
    assert len(rows) == 4
    assert all(row.fields["rest"].startswith("rest") for row in rows)
