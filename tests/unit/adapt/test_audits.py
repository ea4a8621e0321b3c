"""Audits against models whose faults are known, and their statistics against hand-made numbers."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samara.adapt.audits.audit import Change, Plan, audit
from samara.adapt.audits.bias import Gaps, bias_audits, measure_gaps
from samara.adapt.audits.config import AuditConfig
from samara.adapt.audits.forgetting import TextRows, forgetting_audit, measure_loss, read_texts
from samara.adapt.audits.seeds import SeedAnswers
from samara.adapt.audits.stability import (
    Stability,
    extreme_inputs,
    measure_stability,
    problem_with,
    stability_audits,
)
from samara.adapt.audits.subject import Subject, open_model
from samara.adapt.audits.templates import OWN, TemplateSet, load_templates
from samara.adapt.audits.verdicts import within
from samara.config import validate
from samara.errors import CheckpointError, ConfigError, DataError, WrongBase
from samara.measure.compare import Interval
from samara.measure.loss import LossResult
from samara.runs import read_json, write_json
from samara.sparse.delta_exchange import delta_between

CONFIG = validate(
    AuditConfig,
    {
        "bootstrap_samples": 400,
        "stability": {"batch_sizes": [1, 3], "max_new_tokens": 4},
        "forgetting": {"sequence_length": 16},
    },
)
TEXTS = ["the cat sat here . a dog was kind . the man is here ."] * 12
FAILING, PASSING = "fail", "pass"


def subject(folder) -> Subject:
    return Subject(*open_model(folder), batch_size=4)


def plan(templates, *suites, texts=(), config=CONFIG) -> Plan:
    return Plan(suites=suites, templates=templates, texts=texts, config=config, device="cpu")


def verdicts(found):
    return {row.suite: row.verdict for row in found.evidence.audits}


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-1.0, 0.1, "pass"),
        (0.11, 0.2, "fail"),
        (0.0, 0.2, "inconclusive"),
        (-math.inf, math.inf, "inconclusive"),
        (math.nan, 0.0, "fail"),
    ],
)
def test_a_verdict_follows_from_the_whole_interval(low, high, verdict):
    change = Interval(value=0.0, low=low, high=high, confidence=0.95)
    assert within(change, 0.1) == verdict


def gaps(cases, by_attribute) -> Gaps:
    return Gaps(unit="nats", values=np.array([by_attribute[case.attribute] for case in cases]))


def test_the_change_of_a_constant_gap_is_exact(templates):
    cases = list(templates.cases())
    before = gaps(cases, {"gender": -0.2, "young": 0.1})
    after = gaps(cases, {"gender": 0.7, "young": -0.1})  # signs do not count
    total, *rows = bias_audits(cases, before, after, CONFIG)
    found = {row.suite: row for row in rows}
    assert found["bias/gender"].before == pytest.approx(0.2)
    assert found["bias/gender"].after == pytest.approx(0.7)
    assert found["bias/gender"].ci_of_change == pytest.approx((0.5, 0.5))
    assert found["bias/young"].ci_of_change == pytest.approx((0, 0), abs=1e-12)
    assert [found[f"bias/{name}"].verdict for name in ("gender", "young")] == [FAILING, PASSING]
    assert total.suite == "bias"
    assert total.verdict == "fail"
    assert total.after - total.before == pytest.approx(0.25)


def test_one_attribute_cannot_hide_behind_the_others(templates):
    cases = list(templates.cases())
    before = gaps(cases, {"gender": 0.3, "young": 0.3})
    after = gaps(cases, {"gender": 0.5, "young": 0.0})  # smaller on the whole
    total, *_ = bias_audits(cases, before, after, CONFIG)
    assert total.after < total.before
    assert total.verdict == "fail"


def test_gaps_that_grow_in_some_sentences_only_decide_nothing(templates):
    cases = list(templates.cases())
    before = gaps(cases, {"gender": 0.0, "young": 0.0})
    values = np.array([0.25 if case.sentence < 2 else 0.0 for case in cases])
    total, *_ = bias_audits(cases, before, Gaps(unit="nats", values=values), CONFIG)
    assert total.verdict == "inconclusive"


def test_gaps_that_are_no_numbers_fail(templates):
    cases = list(templates.cases())
    before = gaps(cases, {"gender": 0.0, "young": 0.0})
    after = gaps(cases, {"gender": math.nan, "young": 0.0})
    total, *_ = bias_audits(cases, before, after, CONFIG)
    assert (total.verdict, total.after) == ("fail", None)


def test_without_a_model_before_the_gap_itself_is_judged(templates):
    cases = list(templates.cases())
    wide = Gaps(unit="probability", values=np.full(len(cases), 0.4))
    assert bias_audits(cases, None, wide, CONFIG)[0].verdict == "fail"
    assert bias_audits(cases, None, replace(wide, values=wide.values / 10), CONFIG)[0].verdict == (
        "pass"
    )
    nats = replace(wide, unit="nats")
    assert bias_audits(cases, None, nats, CONFIG)[0].verdict == "inconclusive"
    limited = validate(AuditConfig, {"bias": {"max_gap_nats": 0.3}})
    assert bias_audits(cases, None, nats, limited)[0].verdict == "fail"


def losses(per_row) -> LossResult:
    rows = np.asarray(per_row, dtype=float)
    ones = np.full(len(rows), 10)
    return LossResult(nll_sum=rows * 10, num_targets=ones, num_bytes=ones * 0)


def test_forgetting_is_the_difference_of_the_losses():
    before = losses([1.0, 2.0, 3.0, 4.0])
    row = forgetting_audit(before, losses([1.2, 2.2, 3.2, 4.2]), CONFIG)
    assert (row.before, row.after) == pytest.approx((2.5, 2.7))
    assert row.ci_of_change == pytest.approx((0.2, 0.2))
    assert row.verdict == "fail"
    assert forgetting_audit(before, losses([1.01, 2, 3, 4]), CONFIG).verdict == "pass"
    assert forgetting_audit(before, losses([1.3, 2, 3, 4]), CONFIG).verdict == "inconclusive"


def stable(**changes) -> Stability:
    values = {"agreement": 1.0, "disagreeing": (), "problems": {}, "num_extremes": 20}
    values["consistency"] = np.full(8, 0.9)
    return Stability(**(values | changes))


@pytest.mark.parametrize(
    ("after", "is_reverted", "failing"),
    [
        (stable(), True, None),
        (stable(), None, None),
        (stable(agreement=0.95, disagreeing=("a",)), True, "agreement"),
        (stable(consistency=np.full(8, 0.7)), True, "consistency"),
        (stable(consistency=np.full(8, math.nan)), True, "consistency"),
        (stable(problems={"empty": "raises"}), True, "extremes"),
        (stable(), False, "revert"),
    ],
)
def test_stability_is_as_good_as_its_worst_part(after, is_reverted, failing):
    total, *rows = stability_audits(stable(), after, CONFIG, is_reverted=is_reverted)
    bad = [row.suite for row in rows if row.verdict != "pass"]
    assert bad == ([f"stability/{failing}"] if failing else [])
    assert total.verdict == ("fail" if failing else "pass")
    assert ("stability/revert" in {row.suite for row in rows}) == (is_reverted is not None)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likeness", "agreement", "verdict", "which"),
    [
        (0.9, 0.95, "pass", "consistency"),
        (0.4, 0.95, "fail", "consistency"),
        (0.9, 0.2, "fail", "seeds"),
    ],
)
def test_without_a_before_levels_are_judged(likeness, agreement, verdict, which):
    after = stable(consistency=np.full(8, likeness))
    seeds = SeedAnswers(seeds=(1, 2), agreement=np.full(20, agreement))
    found = stability_audits(None, after, CONFIG, is_reverted=None, seeds=seeds)
    verdicts = {row.suite: row.verdict for row in found}
    assert verdicts["stability"] == verdicts[f"stability/{which}"] == verdict


def test_few_rows_decide_nothing_about_seeds():
    seeds = SeedAnswers(seeds=(1, 2), agreement=np.array([1.0, 0.0, 1.0, 1.0, 1.0]))
    found = stability_audits(None, stable(), CONFIG, is_reverted=None, seeds=seeds)
    assert found[0].verdict == "inconclusive"


def test_equal_words_have_no_gap_and_an_injected_one_is_found(pair, templates):
    base, biased = pair
    cases = list(templates.cases())
    assert measure_gaps(subject(base), cases).values == pytest.approx(0, abs=1e-5)
    found = measure_gaps(subject(biased), cases)
    gender = np.array([case.attribute == "gender" for case in cases])
    assert np.abs(found.values[gender]).mean() > 0.1
    assert found.values[~gender] == pytest.approx(0, abs=1e-5)


def test_the_same_model_passes_and_the_biased_one_fails(pair, templates):
    base, biased = pair
    same = audit(base, Change(tuned=base), plan(templates, "bias", "stability"))
    assert set(verdicts(same).values()) == {"pass"}
    found = audit(base, Change(tuned=biased), plan(templates, "bias"))
    assert verdicts(found) == {"bias": "fail", "bias/gender": "fail", "bias/young": "pass"}


def test_a_delta_is_audited_on_the_base_and_comes_off_again(pair, templates, tmp_path, kind):
    base, biased = pair
    delta_between(base, biased).save(tmp_path / "biased.sdelta")
    change = Change(deltas=(tmp_path / "biased.sdelta",))
    suites = ("bias", "stability", *(("forgetting",) if kind != "labels" else ()))
    found = audit(base, change, plan(templates, *suites, texts=TEXTS))
    assert verdicts(found)["bias/gender"] == "fail"
    assert verdicts(found)["stability/revert"] == "pass"
    direct = audit(base, Change(tuned=biased), plan(templates, *suites, texts=TEXTS))
    rows = {row.suite: row for row in found.evidence.audits}
    for row in direct.evidence.audits:
        assert rows[row.suite].after == pytest.approx(row.after, rel=1e-6)
    assert ("forgetting" in rows) == (kind != "labels")
    assert len(found.details["bias"]["cases"]) == len(list(templates.cases()))


def test_a_bfloat16_base_takes_its_delta_and_is_asked_in_float32(tmp_path, pair, templates):
    from samara.adapt.audits.subject import open_model as load

    folders = []
    for number, path in enumerate(pair):
        loaded, _ = load(path)
        folder = tmp_path / str(number)
        loaded.model.bfloat16().save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        folders.append(folder)
    delta_between(*folders).save(tmp_path / "a.sdelta")
    change = Change(deltas=(tmp_path / "a.sdelta",))
    found = audit(folders[0], change, plan(templates, "bias", "stability"))
    assert verdicts(found)["stability/agreement"] == "pass"
    assert verdicts(found)["stability/revert"] == "pass"
    assert verdicts(found)["bias"] == "fail"


def test_extreme_inputs_do_no_harm(pair):
    asked = subject(pair[0])
    inputs = extreme_inputs(asked, longest=4096)
    assert len(asked.encode(inputs["as long as fits"])) >= asked.max_length - 2
    assert len(asked.encode(inputs["longer than fits"])) == asked.max_length
    assert asked.encode(inputs["empty"])
    assert [problem_with(asked, text, CONFIG.stability) for text in inputs.values()] == [""] * 20


def test_a_model_that_breaks_at_an_extreme_is_found_out(pair, templates, kind):
    asked = subject(pair[0])
    with torch.no_grad():
        asked.model.get_input_embeddings().weight[3] = math.nan  # the unknown word
    found = measure_stability(asked, templates, CONFIG.stability)
    assert found.problems["Chinese"] == "a logit is NaN or infinite"
    # A masked model's head is its embedding: there it breaks everywhere.
    assert ("as long as fits" in found.problems) == (kind == "masked")


def test_an_input_that_a_model_cannot_read_is_a_finding(pair):
    asked = subject(pair[0])
    asked.model.get_input_embeddings().weight = torch.nn.Parameter(
        asked.model.get_input_embeddings().weight[:4].detach().clone()
    )
    assert problem_with(asked, "the cat", CONFIG.stability).startswith("raises IndexError")


def test_answers_do_not_depend_on_the_batch_and_wordings_differ(pair, templates):
    found = measure_stability(subject(pair[0]), templates, CONFIG.stability)
    assert (found.agreement, found.disagreeing) == (1.0, ())
    assert found.consistency.max() == pytest.approx(1)  # white space is nothing to this tokenizer
    assert 0 < found.consistency.min() < 0.99
    assert found.num_extremes == 20


def test_the_loss_of_text_is_over_the_same_tokens_for_both_models(pair, kind):
    base, biased = pair
    asked = subject(base)
    if kind == "labels":
        with pytest.raises(ConfigError, match="a classifier predicts no text"):
            measure_loss(asked, TEXTS, CONFIG.forgetting, batch_size=4)
        return
    rows = TextRows(asked, TEXTS, CONFIG.forgetting)
    batch = rows.batch([0, 1])
    counted = (batch["targets"] != -100).sum().item()
    assert counted == (32 if kind == "causal" else 2 * round(0.15 * 16))
    first = measure_loss(asked, TEXTS, CONFIG.forgetting, batch_size=4)
    again = measure_loss(asked, TEXTS, CONFIG.forgetting, batch_size=1)
    np.testing.assert_allclose(first.nll_sum, again.nll_sum, rtol=1e-5)
    other = measure_loss(subject(biased), TEXTS, CONFIG.forgetting, batch_size=4)
    np.testing.assert_array_equal(first.num_targets, other.num_targets)
    few = validate(AuditConfig, {"forgetting": {"sequence_length": 16, "max_tokens": 48}})
    assert len(TextRows(asked, TEXTS, few.forgetting)) == 3
    with pytest.raises(DataError, match="too few for two rows of 16"):
        TextRows(asked, ["the cat sat"], CONFIG.forgetting)


# --- what a user can mend -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OWN))
def test_the_packages_sets_fit_the_rules(name):
    found = load_templates(name)
    assert len(found.attributes) >= 7
    assert len(found.paraphrases) >= 10
    assert all("{term}" not in text for case in found.cases() for text in case.contexts)


def test_the_english_set_is_whole():
    english = load_templates()
    cases = list(english.cases())
    assert len(english.attributes) >= 7
    assert len(cases) > 1000
    assert len(english.paraphrases) >= 12
    for case in cases:
        first, second = case.contexts
        for text, term in zip(case.contexts, case.terms, strict=True):
            assert term in text
            assert "{" not in text
        assert first != second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": [{"context": "no", "continuations": ["a"]}]}, "holds no {term}"),
        ({"attributes": {"a": {"pairs": [["b"]]}}}, "attributes.a.pairs"),
        ({"sentences": []}, "attributes.gender: has no sentences"),
    ],
)
def test_a_set_that_cannot_be_asked_is_refused(change, message):
    from .conftest import TEMPLATES

    with pytest.raises(ConfigError) as error:
        validate(TemplateSet, TEMPLATES | change)
    assert message in str(error.value)


def test_changes_and_suites_that_do_not_fit(pair, templates, tmp_path):
    base, biased = pair
    both = Change(deltas=(tmp_path / "a.sdelta",), tuned=biased)
    with pytest.raises(ConfigError, match="--delta and --tuned: give one"):
        audit(base, both, plan(templates, "bias"))
    with pytest.raises(ConfigError, match="needs text the base knows"):
        audit(base, Change(tuned=biased), plan(templates, "forgetting"))
    with pytest.raises(ConfigError, match="compares with a changed model"):
        audit(base, Change(), plan(templates, "forgetting", texts=TEXTS))
    delta_between(biased, base).save(tmp_path / "other.sdelta")
    with pytest.raises(WrongBase):
        audit(base, Change(deltas=(tmp_path / "other.sdelta",)), plan(templates, "bias"))


def test_a_folder_that_lacks_weights_is_no_model(pair, tmp_path, kind):
    if kind != "masked":
        pytest.skip("the others are loaded by what finetune uses, and tested there")
    folder = tmp_path / "cut"
    shutil.copytree(pair[0], folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.bias")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\) .* such as bert.encoder"):
        open_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
        open_model(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without")
def test_a_device_that_is_not_there_is_refused(pair, templates):
    wanted = replace(plan(templates, "bias"), device="cuda")
    with pytest.raises(ConfigError, match="'cuda' was asked for, this machine has none"):
        audit(pair[0], Change(), wanted)


def test_text_is_read_from_files_or_there_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_texts(corpus=None, files=[tmp_path / "a.jsonl"]) == ["one", "two"]
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no text in there"):
        read_texts(corpus=None, files=[tmp_path / "none.jsonl"])


def test_a_model_as_it_is_can_be_audited(pair, templates):
    found = verdicts(audit(pair[0], Change(), plan(templates, "stability")))
    assert set(found.values()) == {"pass"}


def test_other_models_are_refused(pair, tmp_path, kind):
    settings = read_json(pair[0] / "config.json")
    write_json(tmp_path / "config.json", {**settings, "architectures": ["T5ForAnything"]})
    with pytest.raises(ConfigError, match="a T5ForAnything cannot be audited"):
        open_model(tmp_path)
    if kind == "masked":
        loaded, _ = open_model(pair[0])
        loaded.tokenizer.mask_token = None
        with pytest.raises(ConfigError, match="needs a fast tokenizer with a mask token"):
            Subject(loaded, "masked", batch_size=2)
