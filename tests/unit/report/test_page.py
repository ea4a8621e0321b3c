"""The page as a whole: true, complete, safe, self-contained."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import pytest

from samara.report.humanize import GAP, MINUS
from samara.report.report import report

VOID = {"meta", "br", "hr", "col", "wbr"}


class Outline(HTMLParser):
    """Checks that tags close in order, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def page(config, run) -> str:
    report(config, run)
    return (run.path / "report.html").read_text(encoding="utf-8")


def words(text: str) -> str:
    """What a reader sees, with plain spaces and hyphens."""
    seen = "".join(Outline(text).text).replace(GAP, " ").replace(MINUS, "-")
    return re.sub(r"\s+", " ", seen)


def test_the_page_is_well_formed_and_small(quickstart):
    text = page(*quickstart())
    outline = Outline(text)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for tag, a in outline.tags if tag == "a"]
    assert {link[1:] for link in links} <= set(ids)
    assert len(text.encode()) < 500_000


def test_equal_inputs_give_equal_bytes(quickstart):
    config, run = quickstart()
    assert page(config, run) == page(config, run)


def test_nothing_is_loaded_and_only_our_script_may_run(quickstart):
    text = page(*quickstart())
    assert "http://" not in text
    assert "https://" not in text
    for tag, attributes in Outline(text).tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "srcset", "xlink:href", "onclick", "onload"} & set(attributes)
        if tag == "a":
            assert str(attributes["href"]).startswith("#")
    assert "url(" not in text
    assert "@import" not in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert html.unescape(policy[1]) == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def test_text_of_models_names_and_titles_is_escaped(quickstart):
    config, run = quickstart(title="A <b>title</b> & $more")
    names = {
        ("<dense>" if name == "dense" else name): folder
        for name, folder in config.pretraining.items()
    }
    text = page(config.model_copy(update={"pretraining": names}), run)
    assert text.count("<script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<title>A &lt;b&gt;title&lt;/b&gt; &amp; $more</title>" in text
    assert "<dense>" not in text


def test_samples_show_the_prompt_once_and_close_up_blank_lines(quickstart):
    config, run = quickstart()
    path = run.path.parent / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    for model in results["models"].values():
        model["samples"] = [{"prompt": "To be", "text": "To be\n\n \n\n  or not\nto be \n\n\n"}]
    path.write_text(json.dumps(results))
    text = page(config, run)
    assert text.count("<b>To be</b>\n\n  or not\nto be</blockquote>") == 3


def test_no_path_of_this_machine_is_shown(quickstart, tmp_path):
    config, run = quickstart(states={"layer-wise": "failed"})
    text = page(config, run)
    assert str(tmp_path) not in text
    assert "/root" not in text
    assert "the loss is nan; see …/ckpt" in text


def test_pictures_have_words(quickstart):
    text = page(*quickstart())
    pictures = [a for tag, a in Outline(text).tags if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) >= 9
    assert all(picture.get("aria-label") for picture in pictures)
    assert "Layer 1: 4 query heads, 2 key-value heads, FFN 256, dense" in text
    assert "Loss against tokens: dense ends at 4.2" in text


# --- the findings ---------------------------------------------------------------------------


def test_findings_when_one_arm_is_unresolved_and_one_worse(quickstart):
    text = words(page(*quickstart()))
    assert "Three language models were trained on the same 999 k tokens" in text
    assert "scored on 1,481 documents held out from training" in text
    assert (
        "layer-wise reaches 1.545 bits per byte"
        "Against dense (1.550): 4.5 % fewer parameters, 6.5 % fewer FLOPs per token; "
        "its loss differs by -0.015 [-0.036, +0.006]: unresolved." in text
    )
    assert "its loss is 0.093 higher [+0.062, +0.124]: worse." in text


def test_findings_when_the_arm_wins(quickstart):
    text = words(
        page(*quickstart(verdicts={"layer-wise": (-0.05, 0.01), "CoLA + layer-wise": (0.2, 0.5)}))
    )
    assert "its loss is 0.050 lower [-0.060, -0.040]: better." in text
    assert "its loss differs by +0.200 [-0.300, +0.700]: unresolved." in text


def test_findings_follow_the_baseline_not_the_name(quickstart):
    config, run = quickstart()
    turned = dict(reversed(config.pretraining.items()))
    text = words(page(config.model_copy(update={"pretraining": turned}), run))
    assert "Against CoLA + layer-wise (1.584): 100 % more parameters, 84 % more FLOPs" in text
    assert "the losses were not compared" in text


def test_equal_arms_are_the_same(quickstart):
    config, run = quickstart()
    folder = config.pretraining["dense"]
    both = {"dense": folder, "layer-wise": folder}
    text = words(page(config.model_copy(update={"pretraining": both}), run))
    assert "the same parameters, the same FLOPs per token" in text


def best_marks(text: str) -> dict[str, int]:
    """Marked cells per row of the table of arms."""
    table = text[text.index('id="arms"') : text.index('id="difference"')]
    rows = re.findall(r"<tr>(<th.*?)</tr>", table, re.DOTALL)
    titles = (re.sub("<.*?>", "", row.partition("</th>")[0]) for row in rows)
    return {
        title: row.count('<span class="best">') for title, row in zip(titles, rows, strict=True)
    }


def test_the_best_is_marked_and_ties_are_not(quickstart):
    marks = best_marks(page(*quickstart()))
    assert marks["Parameters counted"] == 1
    assert marks["Tokens read counted"] == 0
    assert marks["Share of peak FLOP/s (MFU) estimated"] == 0
    # Layer-wise has the lowest loss, but the documents cannot tell it from dense.
    assert marks["Loss, nats per token measured"] == 2


def test_a_resolved_best_stands_alone(quickstart):
    verdicts = {"layer-wise": (-0.05, 0.01), "CoLA + layer-wise": (0.093, 0.03)}
    assert best_marks(page(*quickstart(verdicts=verdicts)))["Loss, nats per token measured"] == 1


def test_demo_scale_speaks_with_the_runs_own_numbers(quickstart):
    config, run = quickstart()
    text = words(page(config, run))
    summary = json.loads((run.path.parent / "dense" / "summary.json").read_text())
    share = 4096 * 256 / summary["parameters"]
    work = 6 * 4096 * 256 / summary["flops_per_token"]
    assert "At a width of 256 the vocabulary weighs heavily" in text
    assert f"hold {100 * share:.0f} % of the parameters of dense" in text
    assert f"takes {100 * work:.0f} % of the training FLOPs" in text
    assert "In the layers alone, CoLA + layer-wise has 60 % fewer parameters" in text
    assert "Each arm was trained once, with one seed" in text
    without = words(page(config.model_copy(update={"demo_scale": False}), run))
    assert "Demo scale" not in without


def test_the_vocabulary_dominates_only_where_it_does(quickstart):
    config, run = quickstart()
    path = run.path.parent / "dense" / "summary.json"
    summary = json.loads(path.read_text())
    summary["flops_per_token"] = 6 * 4096 * 256 * 1.5
    path.write_text(json.dumps(summary))
    assert "the vocabulary dominates" in words(page(config, run))


# --- what is missing ------------------------------------------------------------------------


def test_no_evaluation_yet(quickstart):
    config, run = quickstart(evaluated=False)
    text = words(page(config, run))
    assert "they have not been evaluated yet" in text
    assert "layer-wise ended training at a validation loss of 4.197" in text
    assert "Against dense (4.212): 4.5 % fewer parameters" in text
    assert "The report names no evaluation." in text
    assert "Loss at the end of training measured" in text
    assert "What they write" not in text


def test_failed_running_and_unfinished_arms(quickstart):
    states = {"dense": "finished", "layer-wise": "failed", "CoLA + layer-wise": "running"}
    config, run = quickstart(states=states)
    text = words(page(config, run))
    assert "One language model was trained" in text
    assert "layer-wise failed after step 81 (NonFiniteLossError" in text
    assert "CoLA + layer-wise is still running after step 81; its figures are missing." in text
    (run.path.parent / "cola" / "status.json").unlink()
    assert "CoLA + layer-wise has not finished after step 81" in words(page(config, run))


def test_nothing_finished(quickstart):
    names = ("dense", "layer-wise", "CoLA + layer-wise")
    config, run = quickstart(states=dict.fromkeys(names, "stopped"), evaluated=False)
    text = words(page(config, run))
    assert "No training run has finished yet." in text
    assert "No arm has finished yet." in text
    assert "dense was stopped after step 81" in text


def test_an_empty_report(quickstart):
    config, run = quickstart()
    nothing = config.model_copy(
        update={"pretraining": {}, "evaluation": None, "corpus": None, "demo_scale": False}
    )
    text = words(page(nothing, run))
    assert "No training run has finished yet." in text
    assert "Do it again" in text


def test_one_arm_alone(quickstart):
    config, run = quickstart()
    one = {"dense": config.pretraining["dense"]}
    text = words(page(config.model_copy(update={"pretraining": one}), run))
    assert "One language model was trained on 999 k tokens" in text
    assert "dense has 6.56 M parameters and reaches 1.550 bits per byte." in text
    assert "Better or worse?" not in text


def test_a_run_without_any_metrics(quickstart):
    config, run = quickstart()
    for name in ("dense", "layerwise", "cola"):
        (run.path.parent / name / "metrics.jsonl").unlink()
    assert "No training loss has been logged yet." in words(page(config, run))


def test_a_stale_evaluation_and_mixed_corpora_are_said(quickstart):
    config, run = quickstart()
    path = run.path.parent / "cola" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "weights_hash": "0" * 64, "corpus_hash": "1" * 64}))
    text = words(page(config, run))
    assert "CoLA + layer-wise was evaluated with other weights than its run now holds" in text
    assert "The arms did not read the same corpus" in text


def test_an_arm_outside_the_evaluation(quickstart):
    config, run = quickstart()
    path = run.path.parent / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    del results["models"]["layer-wise"]
    results["comparisons"] = results["comparisons"][1:]
    path.write_text(json.dumps(results))
    text = words(page(config, run))
    assert "layer-wise is not part of the evaluation." in text
    assert "the losses were not compared" in text


def test_intervals_of_a_single_document_are_left_out(quickstart):
    config, run = quickstart()
    path = run.path.parent / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    for comparison in results["comparisons"]:
        comparison["loss_difference"].update(low=None, high=None)
        comparison["verdict"] = "unresolved"
    path.write_text(json.dumps(results))
    text = words(page(config, run))
    assert "no interval: one document" in text
    assert "its loss differs by -0.015: unresolved." in text


# --- the rest of the page -------------------------------------------------------------------


def test_the_corpus_is_told(quickstart):
    text = words(page(*quickstart()))
    assert "29,908" in text
    assert "Of 52,532 documents read." in text
    assert "Passed over before: 57 docstrings without summary and 2 unparsable files." in text
    assert "code or tables, not prose" in text
    assert "Documents kept; 49 more packages not shown." in text
    assert "5 % to validation and 5 % to test" in text
    assert "c0ffeec0ffeec0ff" in text


def test_how_to_do_it_again(quickstart):
    text = words(page(*quickstart()))
    assert "samara run recipe.yaml --out again" in text
    assert "samara run dense/recipe.yaml --out dense-again" in text
    assert "72bc27b0c1de" in text
    assert "2.13.0+cpu" in text
    assert "20.0 W" in text


def test_commands_of_relative_folders_run_where_the_run_was_made(quickstart, monkeypatch):
    config, run = quickstart()
    monkeypatch.chdir(run.path.parent.parent)
    relative = {name: f"quickstart/{folder.rpartition('/')[2]}" for name, folder in
                config.pretraining.items()}  # fmt: skip
    text = words(page(config.model_copy(update={"pretraining": relative}), run))
    assert "samara run quickstart/recipe.yaml --out again" in text
    assert "samara run quickstart/dense/recipe.yaml --out dense-again" in text


@pytest.mark.parametrize("source", ["files", "hub"])
def test_other_sources_are_named_without_their_paths(quickstart, source):
    config, run = quickstart()
    path = run.path.parent / "data" / "corpus.json"
    data = json.loads(path.read_text())
    data["settings"]["source"] = {
        "files": {"kind": "files", "paths": ["/root/private/*.txt"]},
        "hub": {"kind": "hub", "name": "/root/private/stories"},
    }[source]
    data["statistics"]["packages"] = {"": 29_908}
    path.write_text(json.dumps(data))
    text = page(config, run)
    assert "/root" not in text
    assert {"files": "Text files of this machine.", "hub": "The dataset stories."}[source] in text
    assert "Where they come from" not in text
