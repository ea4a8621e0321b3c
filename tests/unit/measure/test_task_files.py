"""Tasks from files: what each kind asks, how solved examples are drawn, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from samara.errors import ConfigError, DataError
from samara.measure.local_tasks import (
    TaskSource,
    is_task_path,
    load_task,
    read_task_file,
    task_source,
)
from samara.measure.standard_tasks import STANDARD_TASKS, missing_reason, standard_source
from samara.measure.suites import SUITES
from samara.measure.task_examples import ChoiceExample, Example, TextExample, WrittenExample
from samara.measure.task_metrics import METRICS
from samara.measure.task_scoring import task_metrics
from samara.measure.tasks_config import KINDS

Rows = list[dict[str, Any]]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(folder: Path, rows: Rows, **settings: Any) -> Path:
    write_rows(folder / "rows.jsonl", rows)
    task = folder / "task.yaml"
    task.write_text(json.dumps({"name": "mine", "data": "rows.jsonl", **settings}))
    return task


def examples(folder: Path, rows: Rows, **settings: Any) -> tuple[Example, ...]:
    return load_task(task_source(write_task(folder, rows, **settings))).examples


def first_choice(folder: Path, row: dict[str, Any], **settings: Any) -> ChoiceExample:
    example = examples(folder, [row], **settings)[0]
    assert isinstance(example, ChoiceExample)
    return example


# --- what each kind asks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold"), [(1, 1), ("b", 1), ("C", 2), ("2", 2), (True, 1), (False, 0)]
)
def test_a_right_choice_is_given_by_position_letter_or_text(tmp_path, answer, gold):
    row = {"question": "Q", "choices": ["a", "b", "c"], "answer": answer}
    example = first_choice(tmp_path, row, kind="multiple_choice")
    assert example.contexts == ("Question: Q\nAnswer:",) * 3
    assert example.continuations == (" a", " b", " c")
    assert example.names == ("a", "b", "c")
    assert example.gold == (gold,)
    assert example.shot == "Question: Q\nAnswer: " + "abc"[gold]


def test_choices_may_be_fixed_or_taken_from_columns(tmp_path):
    row = {"question": "Q", "one": "x", "two": "y", "answer": "B"}
    example = first_choice(tmp_path, row, kind="multiple_choice", choices=["{one}", "{two}", "z"])
    assert example.names == ("x", "y", "z")
    assert example.gold == (1,)


def test_a_true_set_lists_the_true_choices_first(tmp_path):
    row = {"question": "Q", "correct_answers": ["a", "b", "a"], "incorrect_answers": ["c"]}
    example = first_choice(tmp_path, row, kind="true_set")
    assert (example.names, example.gold) == (("a", "b", "c"), (0, 1))


def test_a_partial_task_scores_one_continuation_after_each_context(tmp_path):
    row = {"context_options": ["Ann", "Bea"], "continuation": "ran.", "answer": 1}
    example = first_choice(tmp_path, row, kind="partial")
    assert example.contexts == ("Ann", "Bea")
    assert example.continuations == (" ran.", " ran.")
    assert example.shot == "Bea ran."


def test_a_minimal_pair_has_no_context(tmp_path):
    example = first_choice(tmp_path, {"good": "It is.", "bad": "It are."}, kind="minimal_pairs")
    assert example.contexts == ("", "")
    assert example.continuations == ("It is.", "It are.")
    assert example.gold == (0,)


def test_a_classification_chooses_among_the_words_for_its_labels(tmp_path):
    row = {"text": "T", "label": 1}
    example = first_choice(tmp_path, row, kind="classification", labels={"0": "no", "1": "yes"})
    assert example.continuations == (" no", " yes")
    assert example.gold == (1,)


def test_a_classification_takes_its_labels_from_all_rows(tmp_path):
    rows = [{"text": "T", "label": label} for label in ("b", "a", "b")]
    source = task_source(write_task(tmp_path, rows, kind="classification", limit=2))
    assert len(load_task(source).examples) == 2
    task = load_task(source, limit=1)
    assert dict(task.labels) == {"a": "a", "b": "b"}
    assert len(task.examples) == 1


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ("x", ("x",)),
        (["x", "y", "x"], ("x", "y")),
        ([{"text": "x", "answer_start": 3}], ("x",)),
        ({"text": ["x", "y"], "answer_start": [1, 2]}, ("x", "y")),
        ([], ("",)),
        (7, ("7",)),
    ],
)
def test_answers_come_in_several_forms(tmp_path, answers, references):
    row = {"context": "C", "question": "Q", "answers": answers}
    (example,) = examples(tmp_path, [row], kind="question")
    assert isinstance(example, WrittenExample)
    assert example.prompt == "C\nQuestion: Q\nAnswer:"
    assert example.references == references
    assert example.shot == f"C\nQuestion: Q\nAnswer: {references[0] or 'unanswerable'}"


def test_a_summary_may_have_several_references(tmp_path):
    row = {"document": "D", "summaries": ["a", " ", "b"]}
    (example,) = examples(tmp_path, [row], kind="summarization")
    assert isinstance(example, WrittenExample)
    assert (example.prompt, example.references) == ("D\nSummary:", ("a", "b"))


def test_a_text_is_scored_whole(tmp_path):
    (example,) = examples(tmp_path, [{"a": "x", "b": "y"}], kind="perplexity", text="{a} {b}")
    assert isinstance(example, TextExample)
    assert example.text == "x y"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"question": "q", "choices": ["a"], "answer": 0}, "multiple_choice"),
        ({"context_options": ["a"], "continuation": "b", "answer": 0}, "partial"),
        ({"good": "a", "bad": "b"}, "minimal_pairs"),
        ({"sentence_good": "a", "sentence_bad": "b"}, "minimal_pairs"),
        ({"question": "q", "answers": ["a"]}, "question"),
        ({"question": "q", "answers": ["a"], "context": "c"}, "question"),
        ({"document": "d", "summary": "s"}, "summarization"),
        ({"dialogue": "d", "summaries": ["s"]}, "summarization"),
        ({"text": "t", "label": "a"}, "classification"),
        ({"text": "t"}, "perplexity"),
    ],
)
def test_a_data_file_says_by_its_fields_what_it_is(tmp_path, fields, kind):
    rows = [fields, {**fields, "label": "b"}] if "label" in fields else [fields]
    source = task_source(write_rows(tmp_path / "my rows.jsonl", rows))
    assert isinstance(source.config, KINDS[kind])
    assert source.config.name == "my_rows"
    task = load_task(source)
    assert len(task.examples) == len(rows)
    assert set(task_metrics(source.config)) <= set(METRICS)


def test_a_split_s_name_is_completed_by_its_folder(tmp_path):
    (tmp_path / "trec").mkdir()
    path = write_rows(tmp_path / "trec" / "test.jsonl", [{"text": "a"}])
    assert task_source(path).config.name == "trec_test"


@pytest.mark.parametrize(
    ("name", "is_path"),
    [("arc_easy", False), ("a/b.yaml", True), ("x.jsonl.gz", True), ("x.csv", True)],
)
def test_a_task_path_is_told_from_a_name(name, is_path):
    assert is_task_path(name) is is_path


# --- solved examples --------------------------------------------------------------------------

PAIRS = [{"good": f"g{n}", "bad": f"b{n}", "group": "xy"[n % 2]} for n in range(8)]


def prefixes(source: TaskSource, **options: Any) -> list[str]:
    task = load_task(source, **options)
    return [example.contexts[0] for example in task.examples if isinstance(example, ChoiceExample)]


def test_examples_are_drawn_as_the_harness_draws_them(tmp_path):
    write_rows(tmp_path / "shots.jsonl", [{"good": f"s{n}", "bad": ""} for n in range(6)])
    task = write_task(
        tmp_path, PAIRS, kind="minimal_pairs", num_fewshot=2, fewshot_data="shots.jsonl", bad="x"
    )
    generator = random.Random(5)
    names = [f"s{n}" for n in range(6)]
    expected = ["".join(f"{s}\n\n" for s in generator.sample(names, 2)) for _ in PAIRS]
    assert prefixes(task_source(task), seed=5) == expected
    assert prefixes(task_source(task), seed=6) != expected


def test_a_limit_changes_no_row_s_examples(tmp_path):
    source = task_source(write_task(tmp_path, PAIRS, kind="minimal_pairs", num_fewshot=3))
    every = prefixes(source)
    assert prefixes(source, limit=4) == every[::2]
    assert prefixes(source, limit=100) == every
    assert prefixes(source, num_fewshot=0) == [""] * 8


def test_a_row_is_never_its_own_example(tmp_path):
    source = task_source(write_task(tmp_path, PAIRS, kind="minimal_pairs", num_fewshot=7))
    for number, prefix in enumerate(prefixes(source)):
        shown = set(prefix.split())
        assert shown == {f"g{n}" for n in range(8)} - {f"g{number}"}


def test_examples_may_be_the_first_of_the_row_s_group(tmp_path):
    source = task_source(
        write_task(
            tmp_path,
            PAIRS,
            kind="minimal_pairs",
            num_fewshot=2,
            fewshot_order="first",
            fewshot_field="group",
            description="About {group}.\n",
            separator=" | ",
        )
    )
    assert prefixes(source)[:4] == [
        "About x.\ng2 | g4 | ",
        "About y.\ng3 | g5 | ",
        "About x.\ng0 | g4 | ",
        "About y.\ng1 | g5 | ",
    ]


def test_more_examples_than_there_are_is_refused(tmp_path):
    source = task_source(write_task(tmp_path, PAIRS, kind="minimal_pairs", num_fewshot=8))
    with pytest.raises(
        ConfigError, match=r"mine.num_fewshot: 8 examples were asked for, .*rows.jsonl holds 7$"
    ):
        load_task(source)
    grouped = task_source(
        write_task(tmp_path, PAIRS, kind="minimal_pairs", num_fewshot=4, fewshot_field="group")
    )
    with pytest.raises(ConfigError, match=r"holds 3 with group 'x'$"):
        load_task(grouped)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"task.yaml: kind: is required and not given \(known: classification, "),
        ({"kind": "multipl_choice"}, r"kind: unknown value 'multipl_choice' \(did you mean 'mult"),
        ({"kind": "question", "promt": "x"}, r"task.yaml: promt: unknown key \(did you mean 'pro"),
        ({"kind": "question", "name": "a b"}, r"task.yaml: name: string should match pattern"),
        ({"kind": "question", "max_new_tokens": 0}, r"task.yaml: max_new_tokens: input should be"),
        ({"kind": "perplexity", "num_fewshot": 1}, r"task.yaml: num_fewshot: unknown key"),
    ],
)
def test_a_malformed_task_file_is_one_clear_line(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_task_file(write_task(tmp_path, [], **settings))
    assert len(str(caught.value).splitlines()) == 1


def test_a_task_file_that_is_no_yaml_names_the_line(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("name: a\nkind: [\n")
    with pytest.raises(ConfigError, match=r"task.yaml: not valid YAML at line 3"):
        read_task_file(path)


def choice(**fields: Any) -> dict[str, Any]:
    return {"question": "Q", "choices": ["a", "b"], "answer": 0, **fields}


def misspelt() -> dict[str, Any]:
    return {"qestion": "Q", "choices": ["a", "b"], "answer": 0}


def truths() -> dict[str, Any]:
    return {"question": "Q", "correct_answers": [], "incorrect_answers": ["a"]}


def partial() -> dict[str, Any]:
    return {"context_options": ["a", "b"], "continuation": " ", "answer": 0}


def question() -> dict[str, Any]:
    return {"context": "C", "question": "Q", "answers": [None]}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("multiple_choice", choice(answer=2), r"rows.jsonl:1: field 'answer' holds 2, which is"),
        (
            "multiple_choice",
            choice(answer=2),
            r"none of the 2 choices; write its position \(0 to 1",
        ),
        ("multiple_choice", choice(answer="c c"), "field 'answer' holds 'c c', which is none"),
        ("multiple_choice", choice(answer=-1), "field 'answer' holds -1, which is none"),
        ("multiple_choice", choice(choices=["a", " "]), r"rows.jsonl:1: choice 1 is empty: noth"),
        ("multiple_choice", choice(choices={"a": 1}), r"field 'choices' holds .*, not texts"),
        ("multiple_choice", {"question": "Q", "answer": 0}, r"rows.jsonl:1: no field 'choices'"),
        ("multiple_choice", misspelt(), r"no field 'question' \(did you mean 'qestion'\?\)"),
        ("true_set", truths(), "needs at least one true and one false choice"),
        ("partial", partial(), "the continuation is empty"),
        ("minimal_pairs", {"good": "a", "bad": " "}, "one of the two texts is empty"),
        ("question", question(), r"field 'answers' holds .*, not answers"),
        ("summarization", {"document": "D", "summaries": []}, "field 'summaries' holds no summ"),
        ("classification", {"text": "T", "label": ["a"]}, r"field 'label' holds .*, not a label"),
        ("perplexity", {"text": " "}, r"rows.jsonl:1: the text is empty"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, kind, row, message):
    with pytest.raises(DataError, match=message) as caught:
        examples(tmp_path, [row], kind=kind)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_label_is_named(tmp_path):
    rows = [{"text": "T", "label": "posiitve"}]
    labels = {"positive": "good", "negative": "bad"}
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: label 'posiitve' is none of the task's \(did you mean"
    ):
        examples(tmp_path, rows, kind="classification", labels=labels)


def test_one_label_is_no_classification(tmp_path):
    rows = [{"text": "T", "label": "a"}] * 2
    with pytest.raises(ConfigError, match=r"mine.labels: a classification needs two labels or mo"):
        examples(tmp_path, rows, kind="classification")


def test_fields_that_fit_no_kind_are_refused(tmp_path):
    path = write_rows(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(DataError, match=r"odd.jsonl: its fields \(a, b\) fit no kind of task"):
        task_source(path)


# --- suites -----------------------------------------------------------------------------------


def test_every_suite_is_made_of_known_tasks_and_scores():
    for suite in SUITES.values():
        names = [item.task for item in suite.tasks]
        assert len(set(names)) == len(names)
        for item in suite.tasks:
            assert item.metric in task_metrics(STANDARD_TASKS[item.task].config)
        for wanted in suite.averages.values():
            assert set(wanted) <= set(names)


def test_the_suites_are_the_paper_s():
    def row(name: str) -> dict[str, int]:
        return {item.task: item.num_fewshot for item in SUITES[name].tasks}

    assert row("openelm-zero-shot") == dict.fromkeys(
        ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "sciq", "winogrande"), 0
    )
    assert row("openllm") == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
    }
    assert row("llm360") == {
        **row("openllm"),
        "crows_pairs_english": 25,
        "piqa": 0,
        "race": 0,
    }
    assert len(SUITES["openelm-zero-shot"].averages["average without sciq"]) == 6


def test_a_bias_is_marked_as_no_quality():
    (crows,) = (item for item in SUITES["llm360"].tasks if item.task == "crows_pairs_english")
    assert METRICS[crows.metric].better == "neither"


def test_a_standard_task_is_found_in_the_first_file_there_is(tmp_path):
    assert standard_source("sciq", tmp_path) is None
    assert missing_reason("sciq", tmp_path).startswith("no sciq/test.jsonl or sciq/valid.jsonl (")
    (tmp_path / "sciq").mkdir()
    row = {"question": "Q", "support": " S", "choices": ["a", "b"], "answer": 1}
    write_rows(tmp_path / "sciq" / "valid.jsonl", [row])
    source = standard_source("sciq", tmp_path)
    assert source is not None
    assert source.has_own_shots
    (example,) = load_task(source).examples
    assert isinstance(example, ChoiceExample)
    assert example.shot == "S\nQuestion: Q\nAnswer: b"


def test_an_unknown_standard_task_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"task 'arc_esy': unknown \(did you mean 'arc_easy'\?\); a task of your"
    ):
        standard_source("arc_esy", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "valid.jsonl:1: no field 'sentence'"),
        (
            {"sentence": "none", "choices": ["a", "b"], "answer": 0},
            "1: not a row of this task: the",
        ),
    ],
)
def test_a_standard_task_s_row_that_does_not_fit_is_named(tmp_path, row, message):
    (tmp_path / "winogrande").mkdir()
    write_rows(tmp_path / "winogrande" / "valid.jsonl", [row])
    source = standard_source("winogrande", tmp_path)
    assert source is not None
    with pytest.raises(DataError, match=message):
        load_task(source)
