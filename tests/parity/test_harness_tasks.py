"""The suites' tasks ask what the lm-evaluation-harness's own task files ask, word for word.

The harness's task files are read from the installed package and pointed at local rows, so nothing
is fetched. Solved examples must be the same draws, too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from samara.measure.local_tasks import load_task
from samara.measure.standard_tasks import STANDARD_TASKS, standard_source

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"),
]

NUM_ROWS = 6
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
Rows = list[dict[str, Any]]


def choice_rows(split: str, **more: str) -> Rows:
    return [
        {
            "question": f"Which colour is number {n} of {split}?",
            "choices": [COLOURS[n % 6], COLOURS[(n + 1) % 6], COLOURS[(n + 2) % 6], "grey"],
            "answer": n % 4,
            **more,
        }
        for n in range(NUM_ROWS)
    ]


def boolq_rows(split: str) -> Rows:
    return [
        {"question": f"is {n} of {split} even", "passage": f"Numbers. {n}.", "answer": n % 2 == 0}
        for n in range(NUM_ROWS)
    ]


def hellaswag_rows(split: str) -> Rows:
    return [
        {
            "context": f"Cooking: A pan of {split} {n} heats up. The cook",
            "choices": ["adds oil.", "runs away.", "sings.", "paints it."],
            "answer": n % 4,
        }
        for n in range(NUM_ROWS)
    ]


def piqa_rows(split: str) -> Rows:
    return [
        {"goal": f"Dry {n} {split}.", "choices": ["Use a towel.", "Use soup."], "answer": n % 2}
        for n in range(NUM_ROWS)
    ]


def sciq_rows(split: str) -> Rows:
    rows = choice_rows(split)
    # The harness always lists the right answer last.
    return [
        {**row, "answer": 3, "support": "  Some support." if n else ""}
        for n, row in enumerate(rows)
    ]


def winogrande_rows(split: str) -> Rows:
    return [
        {
            "sentence": f"Ann met Bea in {split} and _ waved {n} times.",
            "choices": ["Ann", "Bea"],
            "answer": n % 2,
        }
        for n in range(NUM_ROWS)
    ]


def mmlu_rows(split: str) -> Rows:
    # One subject: the harness makes a task of each.
    rows = choice_rows(split, subject="abstract_algebra")
    return [{**row, "question": f" {row['question']} "} for row in rows]


def truthful_rows(split: str) -> Rows:
    return [
        {
            "question": f"What is {n} of {split}?",
            "correct_answers": ["A number.", f"It is {n}."],
            "incorrect_answers": ["A dog.", "A cat.", "Tea."],
        }
        for n in range(NUM_ROWS)
    ]


def crows_rows(split: str) -> Rows:
    return [{"sent_more": f"They are {n}.", "sent_less": f"We are {n}."} for n in range(NUM_ROWS)]


def race_rows(split: str) -> Rows:
    problems = [
        {"question": "Tom likes  _  .", "options": ["tea", "milk", "rain", "snow"], "answer": "B"},
        {"question": "Who is Tom?", "options": ["a cat", "a dog", "a man", "a boy"], "answer": "A"},
        {"question": "What does Tom do?", "options": ["run", "sit", "eat", "nap"], "answer": "D"},
    ]
    return [
        {"article": f"Tom is cat {n}.", "problems": problems[: 1 + n % 3]} for n in range(NUM_ROWS)
    ]


# --- the same rows as the hub's datasets have them ---------------------------------------------


def arc(row: dict[str, Any]) -> dict[str, Any]:
    labels = list("ABCD")
    choices = {"text": row["choices"], "label": labels}
    return {"question": row["question"], "choices": choices, "answerKey": labels[row["answer"]]}


def boolq(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label": int(row["answer"])}


def hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    activity, _, context = row["context"].partition(": ")
    first, _, second = context.rpartition(". ")
    return {
        "activity_label": activity,
        "ctx_a": first + ".",
        "ctx_b": second,
        "endings": row["choices"],
        "label": str(row["answer"]),
    }


def piqa(row: dict[str, Any]) -> dict[str, Any]:
    one, two = row["choices"]
    return {"goal": row["goal"], "sol1": one, "sol2": two, "label": row["answer"]}


def sciq(row: dict[str, Any]) -> dict[str, Any]:
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    own = dict(zip(names, row["choices"], strict=True))
    return {"question": row["question"], "support": row["support"], **own}


def winogrande(row: dict[str, Any]) -> dict[str, Any]:
    one, two = row["choices"]
    answer = str(row["answer"] + 1)
    return {"sentence": row["sentence"], "option1": one, "option2": two, "answer": answer}


def truthful(row: dict[str, Any]) -> dict[str, Any]:
    true, false = row["correct_answers"], row["incorrect_answers"]
    targets = {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}
    return {"question": row["question"], "mc1_targets": targets, "mc2_targets": targets}


def race(row: dict[str, Any]) -> dict[str, Any]:
    return {"article": row["article"], "problems": repr(row["problems"])}


def same(row: dict[str, Any]) -> dict[str, Any]:
    return row


@dataclass(frozen=True)
class Case:
    """A task: the harness's file, what our splits are called there, rows, and shots to try."""

    file: str
    splits: dict[str, str]
    rows: Callable[[str], Rows]
    translate: Callable[[dict[str, Any]], dict[str, Any]]
    shots: tuple[int, ...]


TEST, VALID = {"test": "test", "train": "train"}, {"valid": "validation", "train": "train"}
CASES = {
    "arc_challenge": Case("arc/arc_challenge.yaml", TEST, choice_rows, arc, (0, 3)),
    "arc_easy": Case("arc/arc_easy.yaml", TEST, choice_rows, arc, (0,)),
    "boolq": Case("super_glue/boolq/default.yaml", VALID, boolq_rows, boolq, (0, 2)),
    "hellaswag": Case("hellaswag/hellaswag.yaml", VALID, hellaswag_rows, hellaswag, (0, 3)),
    "piqa": Case("piqa/piqa.yaml", VALID, piqa_rows, piqa, (0,)),
    "sciq": Case("sciq/sciq.yaml", TEST, sciq_rows, sciq, (0, 2)),
    "winogrande": Case("winogrande/default.yaml", VALID, winogrande_rows, winogrande, (0, 5)),
    "mmlu": Case(
        "mmlu/default/mmlu_abstract_algebra.yaml",
        {"test": "test", "dev": "dev"},
        mmlu_rows,
        same,
        (0, 5),
    ),
    "truthfulqa_mc2": Case(
        "truthfulqa/truthfulqa_mc2.yaml",
        {"truthfulqa": "validation"},
        truthful_rows,
        truthful,
        (0,),
    ),
    "crows_pairs_english": Case(
        "crows_pairs/crows_pairs_english.yaml", {"crows_pairs": "test"}, crows_rows, same, (0,)
    ),
    "race": Case("race/race.yaml", {"test": "test"}, race_rows, race, (0,)),
}


def write_lines(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def harness_requests(case: Case, folder: Path, shots: int) -> list[tuple[str, str]]:
    """The requests of the harness's own task on the hub's form of the rows."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = {
        theirs: write_lines(
            folder / f"{theirs}.jsonl", [case.translate(row) for row in case.rows(ours)]
        )
        for ours, theirs in case.splits.items()
    }
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / case.file),
        "task": "under_test",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    (folder / "under_test.yaml").write_text(json.dumps(settings))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load("under_test")["tasks"]["under_test"]
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", CASES)
def test_requests_are_the_harness_s(name: str, tmp_path: Path):
    case = CASES[name]
    stem = STANDARD_TASKS[name].data[0].partition("/")[0]
    for split in case.splits:
        write_lines(tmp_path / "ours" / stem / f"{split}.jsonl", case.rows(split))
    source = standard_source(name, tmp_path / "ours")
    assert source is not None
    for shots in case.shots:
        task = load_task(source, num_fewshot=shots)
        ours = [
            pair
            for example in task.examples
            for pair in zip(example.contexts, example.continuations, strict=True)
        ]
        assert ours == harness_requests(case, tmp_path / f"theirs-{shots}", shots)


def test_every_standard_task_is_compared():
    assert set(CASES) == set(STANDARD_TASKS)
