"""The scores themselves against their references: SQuAD by hand, rouge-score, sklearn, scipy."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from samara.errors import ConfigError
from samara.measure.task_metrics import (
    METRICS,
    Item,
    Resampling,
    class_scores,
    mcnemar_p,
    mean_over_tasks,
    metric_interval,
    paired_mean_over_tasks,
    paired_metric,
)
from samara.measure.text_scores import RougeScorer, exact_match, normalize_answer, token_f1

HOW = Resampling(samples=4000, seed=3)


def item(
    *,
    gold: str = "",
    prediction: str = "",
    sums: dict[str, tuple[float, float]] | None = None,
    **scores: float,
) -> Item:
    return Item(
        line=1,
        id=None,
        scores=scores,
        sums=sums or {},
        gold=(gold,),
        prediction=prediction,
        is_truncated=False,
        details={},
    )


def labelled(gold: Sequence[str], predicted: Sequence[str]) -> list[Item]:
    return [item(gold=g, prediction=p) for g, p in zip(gold, predicted, strict=True)]


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat!", "cat"),
        ("a theatre, an apple", "theatre apple"),
        ("U.S.A.", "usa"),
        ("twenty-one", "twentyone"),
        ("", ""),
    ],
)
def test_answers_are_put_in_squad_s_normal_form(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        # The development set's first question: any reference counts.
        ("Denver Broncos", ["Denver Broncos", "the Broncos"], 1.0, 1.0),
        ("the Denver Broncos!", ["Denver Broncos"], 1.0, 1.0),
        # Two of three words right, two of two found: 2 * (2/3 * 1) / (2/3 + 1) = 0.8
        ("the big Denver Broncos", ["Denver Broncos"], 0.0, 0.8),
        ("Carolina", ["Denver Broncos"], 0.0, 0.0),
        # A word counts as often as both have it.
        ("x x y", ["x y y"], 0.0, 2 / 3),
        # Unanswerable questions of SQuAD 2.0 have the empty answer.
        ("", [""], 1.0, 1.0),
        ("something", [""], 0.0, 0.0),
        ("", ["something"], 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_squad_compares_them(answer, references, exact, f1):
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


# --- summaries --------------------------------------------------------------------------------


def test_rouge_is_rouge_score_s_best_over_the_references():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    reference = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    summary = "The cats were sitting on a mat."
    references = ["A cat sat on the mat.", "Cats sit on mats, the cats were sitting."]
    expected = [reference.score(text, summary) for text in references]
    for name, value in RougeScorer().score(summary, references).items():
        assert value == max(scores[name].fmeasure for scores in expected)


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    # 3 of 4 words, 1 of 3 pairs; the longest common subsequence is "a b d".
    scores = RougeScorer().score("a b x d", ["a b c d"])
    assert scores == pytest.approx({"rouge1": 0.75, "rouge2": 1 / 3, "rougeL": 0.75})


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(
        ConfigError, match=r"needs the package rouge-score; pip install 'samara\[ev"
    ):
        RougeScorer()


# --- labels -----------------------------------------------------------------------------------


def test_macro_scores_are_sklearn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    gold = [str(n) for n in generator.integers(0, 4, 60)]
    predicted = [g if generator.random() < 0.6 else str(generator.integers(0, 6)) for g in gold]
    expected = metrics.precision_recall_fscore_support(
        gold, predicted, average="macro", zero_division=0
    )
    scores = class_scores(gold, predicted)
    assert scores["macro_precision"] == pytest.approx(expected[0])
    assert scores["macro_recall"] == pytest.approx(expected[1])
    assert scores["macro_f1"] == pytest.approx(expected[2])


def test_macro_scores_by_hand():
    # a: precision 1/2, recall 1; b: precision 1, recall 1/2; c is never right.
    scores = class_scores(["a", "b", "b", "b"], ["a", "b", "a", "c"])
    assert scores["macro_precision"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert scores["macro_recall"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("name", ["macro_f1", "macro_precision", "macro_recall"])
def test_the_interval_of_a_macro_score_is_that_of_resampled_items(name):
    generator = np.random.default_rng(1)
    gold = np.array(list("abc"))[generator.integers(0, 3, 80)]
    predicted = np.where(generator.random(80) < 0.5, gold, "a")
    interval = metric_interval(name, labelled(list(gold), list(predicted)), HOW)
    assert interval.value == pytest.approx(class_scores(list(gold), list(predicted))[name])
    drawn = [generator.integers(0, 80, 80) for _ in range(1500)]
    direct = [class_scores(list(gold[d]), list(predicted[d]))[name] for d in drawn]
    low, high = np.quantile(direct, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.02)
    assert interval.high == pytest.approx(high, abs=0.02)


def test_equal_predictions_differ_by_nothing():
    items = labelled("abcabc", "abcaab")
    difference = paired_metric("macro_f1", items, items, HOW)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_the_difference_of_macro_scores_is_paired():
    generator = np.random.default_rng(2)
    gold = ["ab"[n] for n in generator.integers(0, 2, 200)]
    worse = [g if generator.random() < 0.6 else "b" for g in gold]
    # Better on some rows and never worse: far surer than the two intervals suggest.
    better = [g if n % 5 == 0 else w for n, (g, w) in enumerate(zip(gold, worse, strict=True))]
    difference = paired_metric("macro_f1", labelled(gold, better), labelled(gold, worse), HOW)
    alone = metric_interval("macro_f1", labelled(gold, worse), HOW)
    assert 0 < difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < (alone.high - alone.low) / 2


# --- means and ratios -------------------------------------------------------------------------


def test_a_mean_has_the_interval_of_a_mean():
    items = [item(acc=float(n % 4 == 0)) for n in range(400)]
    interval = metric_interval("acc", items, HOW)
    spread = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert interval.value == 0.25
    assert interval.low == pytest.approx(0.25 - spread, abs=0.006)
    assert interval.high == pytest.approx(0.25 + spread, abs=0.006)


def test_a_perplexity_is_the_exponential_of_a_ratio_of_sums():
    items = [item(sums={"perplexity": (nll, count)}) for nll, count in ((20.0, 10.0), (5.0, 5.0))]
    interval = metric_interval("perplexity", items, HOW)
    assert interval.value == pytest.approx(math.exp(25 / 15))
    assert interval.low == pytest.approx(math.exp(1.0))
    assert interval.high == pytest.approx(math.exp(2.0))


def test_an_endless_perplexity_does_not_overflow():
    items = [item(sums={"perplexity": (1e5, 1.0)})] * 3
    assert metric_interval("perplexity", items, HOW).value == math.inf


def test_one_item_says_nothing():
    for name, items in (("acc", [item(acc=1.0)]), ("macro_f1", labelled("a", "a"))):
        interval = metric_interval(name, items, HOW)
        assert (interval.value, interval.low, interval.high) == (1.0, -math.inf, math.inf)


def test_tasks_weigh_the_same_in_their_mean():
    large = [item(acc=1.0)] * 90
    small = [item(f1=0.0)] * 10
    interval = mean_over_tasks([("acc", large), ("f1", small)], HOW)
    assert interval.value == pytest.approx(0.5)
    worse = paired_mean_over_tasks(
        [("acc", [item(acc=0.0)] * 90), ("f1", small)], [("acc", large), ("f1", small)], HOW
    )
    assert worse.value == pytest.approx(-0.5)
    assert worse.high < 0


def test_equal_seeds_give_equal_intervals():
    items = [item(acc=float(n % 3 == 0)) for n in range(50)]
    labels = labelled("aabb" * 5, "abab" * 5)
    for name, scored in (("acc", items), ("macro_f1", labels)):
        assert metric_interval(name, scored, HOW) == metric_interval(name, scored, HOW)


# --- zeros and ones ---------------------------------------------------------------------------


def test_mcnemar_by_hand():
    # 1 against 5 disagreements: 2 * (1 + 6) / 64
    assert mcnemar_p(5, 1) == pytest.approx(14 / 64)
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(3, 3) == 1.0


@pytest.mark.parametrize(("one", "other"), [(0, 9), (7, 2), (40, 61), (900, 1100)])
def test_mcnemar_is_scipy_s_binomial_test(one, other):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(one, one + other, 0.5).pvalue
    assert mcnemar_p(one, other) == pytest.approx(expected)
    assert mcnemar_p(other, one) == mcnemar_p(one, other)


def test_every_score_says_which_way_is_better():
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower", "neither"}
