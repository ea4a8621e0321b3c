"""What holds for any rows, labels and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.measure.language_model import _windows
from samara.measure.task_metrics import (
    Item,
    Resampling,
    class_scores,
    mcnemar_p,
    metric_interval,
    paired_metric,
)
from samara.measure.task_rows import Row, fill, read_rows, spread
from samara.measure.text_scores import exact_match, normalize_answer, token_f1

LABELS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcde")), min_size=2)
HOW = Resampling(samples=50)


def items(pairs: list[tuple[str, str]]) -> list[Item]:
    return [
        Item(
            line=1,
            id=None,
            scores={"accuracy": float(gold == predicted)},
            sums={},
            gold=(gold,),
            prediction=predicted,
            is_truncated=False,
            details={},
        )
        for gold, predicted in pairs
    ]


@given(LABELS)
@settings(max_examples=60, deadline=None)
def test_macro_scores_are_sklearn_s(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    gold, predicted = zip(*pairs, strict=True)
    expected = metrics.precision_recall_fscore_support(
        gold, predicted, average="macro", zero_division=0
    )
    found = class_scores(gold, predicted)
    assert list(found.values()) == pytest.approx(list(expected[:3]))


@given(LABELS, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_intervals_hold_their_value_and_the_order_of_items_does_not_matter(pairs, shuffle):
    shuffled = list(pairs)
    shuffle.shuffle(shuffled)
    interval = metric_interval("macro_f1", items(pairs), HOW)
    assert interval.low <= interval.value <= interval.high
    assert metric_interval("macro_f1", items(shuffled), HOW) == interval


@given(LABELS, st.lists(st.sampled_from("abcde")))
@settings(max_examples=40, deadline=None)
def test_a_difference_is_that_of_the_values_and_turns_its_sign(pairs, others):
    other = [(gold, new) for (gold, _), new in zip(pairs, others, strict=False)]
    one, two = items(pairs), items(other + pairs[len(other) :])
    for name in ("accuracy", "macro_f1"):
        forth, back = paired_metric(name, one, two, HOW), paired_metric(name, two, one, HOW)
        values = [metric_interval(name, x, HOW).value for x in (one, two)]
        assert forth.value == pytest.approx(values[0] - values[1])
        assert back.value == pytest.approx(-forth.value)


@given(st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None)
def test_mcnemar_is_a_probability_and_symmetric(one, other):
    p = mcnemar_p(one, other)
    assert 0 < p <= 1
    assert p == mcnemar_p(other, one)
    assert (one != other) or p == 1
    assert p >= mcnemar_p(max(one, other) + 1, min(one, other)) or one == other


@given(st.text(), st.text())
def test_answers_agree_with_themselves_and_in_both_directions(one, other):
    assert exact_match(one, [other, one]) == 1
    assert token_f1(one, [one]) == 1
    assert token_f1(one, [other]) == pytest.approx(token_f1(other, [one]))
    assert token_f1(one, [other]) >= exact_match(one, [other])


@given(st.text(alphabet="aAnthe .,-THE\n"))
def test_the_normal_form_is_lower_case_words(text):
    normal = normalize_answer(text)
    assert normal == " ".join(normal.split()).lower()
    assert not set(normal.split()) & {"a", "an", "the"}


@given(st.text(), st.text())
def test_a_field_s_text_is_not_read_as_a_template(value, literal):
    row = Row(fields={"x": value}, path=Path("r"), line=1)
    escaped = literal.replace("{", "{{").replace("}", "}}")
    assert fill(f"{escaped}{{x}}", row, key="t") == literal + value


@given(st.lists(st.dictionaries(st.text(min_size=1), st.text() | st.integers()), min_size=1))
@settings(max_examples=40, deadline=None)
def test_json_lines_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="")
    assert [row.fields for row in read_rows(path)] == rows


@given(st.lists(st.integers(1, 9)), st.integers(1, 7))
def test_windows_score_each_token_once_after_the_one_before_it(ids, size):
    windows = list(_windows(ids, 0, size))
    assert [token for window in windows for token in window.continuation] == ids
    whole = [0, *ids]
    done = 0
    for window in windows:
        assert len(window.context) + len(window.continuation) <= size + 1
        assert list(window.context) == whole[done + 1 - len(window.context) : done + 1]
        done += len(window.continuation)


@given(st.integers(1, 200), st.none() | st.integers(1, 250))
def test_a_limit_takes_distinct_rows_in_order_from_the_whole_file(num_rows, limit):
    chosen = spread(num_rows, limit)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(num_rows, limit or num_rows)
    assert chosen[0] == 0
    assert num_rows - chosen[-1] <= -(-num_rows // len(chosen))
