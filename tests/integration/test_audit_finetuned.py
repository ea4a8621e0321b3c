"""Runs of verb finetune are audited against their base, whatever head they got."""

from __future__ import annotations

import json

import pytest

from samara.adapt.audits.audit import Change, Plan, audit
from samara.adapt.audits.config import AuditConfig
from samara.adapt.audits.templates import TemplateSet
from samara.config import validate
from samara.errors import ConfigError

from .test_finetune import METHODS, build, run_one, settings

TEMPLATES = {
    "schema": 1,
    "language": "en",
    "sentences": [
        {"context": "the {term} is", "continuations": ["good", "bad"]},
        {"context": "a {term} is", "continuations": ["great"]},
    ],
    "attributes": {"plant": {"pairs": [["grass", "rose"]]}},
    "paraphrases": [["the sky is", "the film is"]],
}
CONFIG = {
    "bootstrap_samples": 200,
    "stability": {"batch_sizes": [1, 2], "max_new_tokens": 2},
    "forgetting": {"sequence_length": 16},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for split, number in (("train", 12), ("test", 4)):
        lines = [
            {
                "text": f"the {'film' if i % 3 else 'book'} is good .",
                "label": "ab"[i % 2],
                "question": "what is the sky ?",
                "answers": ["blue"],
            }
            for i in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama") / "base")


def plan(*suites):
    texts = ["the sky is blue . the grass is green . " * 6]
    return Plan(
        suites=suites,
        templates=validate(TemplateSet, TEMPLATES),
        texts=texts if "forgetting" in suites else (),
        config=validate(AuditConfig, CONFIG),
        device="cpu",
    )


@pytest.mark.parametrize("method", ["sparse", "full", "lora"])
def test_a_run_of_the_same_kind_has_a_before_and_an_after(base, rows, tmp_path, method):
    run_one(settings(base, rows, "question", METHODS[method]), tmp_path / "run")
    found = audit(base, Change(tuned=tmp_path / "run"), plan("bias", "stability", "forgetting"))
    audits = {row.suite: row for row in found.evidence.audits}
    for suite in ("bias", "stability", "forgetting"):
        assert audits[suite].before != audits[suite].after
        assert audits[suite].ci_of_change is not None
    assert audits["stability/extremes"].verdict == "pass"


def test_a_new_head_has_no_before_but_the_trunk_can_forget(base, rows, tmp_path):
    for method in ("sparse", "full"):
        run_one(settings(base, rows, "labels", METHODS[method]), tmp_path / method)
    found = audit(base, Change(tuned=tmp_path / "sparse"), plan("bias", "forgetting"))
    audits = {row.suite: row for row in found.evidence.audits}
    assert audits["bias"].before is None
    assert audits["bias"].after is not None
    assert audits["forgetting"].before != audits["forgetting"].after
    change = Change(tuned=tmp_path / "full")
    with pytest.raises(ConfigError, match="holds no delta that could be tried"):
        audit(base, change, plan("bias", "forgetting"))
    assert audit(base, change, plan("stability")).evidence.audit("stability").before is None
