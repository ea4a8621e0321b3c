"""The section on growth: races as they were recorded, and grown against scratch."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samara.report.config import ReportConfig
from samara.report.inputs import read_inputs
from samara.report.sections.growth import growth
from samara.runs import Compute, Lineage, RunFolder, read_json, write_json

LABELS = ("stack", "interpose.zero", "random_top")


def candidate(label: str, losses: dict[int, float], **changes: Any) -> dict[str, Any]:
    return {
        "label": label,
        "layer_map": "[0, 1, 0, 1]",
        "exactness": "exact" if label.endswith("zero") else "changes",
        "proposed_from": None,
        "left_at": None,
        "failure": None,
        "losses": {str(step): loss for step, loss in losses.items()},
        "flops": 1e12,
        **changes,
    }


def stage(**changes: Any) -> dict[str, Any]:
    return {
        "stage": 1,
        "steps": 400,
        "loss_before": 4.5,
        "candidates": [
            candidate("interpose.zero", {0: 4.5, 50: 4.45, 100: 4.44}, left_at=100),
            candidate("stack", {0: 4.9, 50: 4.4, 100: 4.3, 200: 4.2}),
            candidate("random_top", {0: 6.0}, failure="step 9: the loss is nan"),
            candidate("middle", {0: 4.8, 50: 4.42, 100: 4.35, 200: 4.25}, proposed_from="stack"),
        ],
        "settled_at": 50,
        "k": 200,
        "k_tokens": 819_200,
        "k_share": 0.5,
        "metric": "loss",
        "winner": "stack",
        "undecided": ["middle", "stack"],
        "spent_flops": 4.2e12,
        "net_flops": 3.1e12,
        **changes,
    }


@pytest.fixture
def grown(quickstart) -> Callable[..., str]:
    """The section's text where the second arm grew."""

    def make(*stages: dict[str, Any], dense_flops: float = 2.0) -> str:
        config, run = quickstart()
        write_race(config, stages or (stage(),), dense_flops)
        section = growth(read_inputs(config, run))
        assert section is not None
        return section.render()

    return make


def write_race(config: ReportConfig, stages: tuple[Any, ...], dense_flops: float) -> None:
    """Make the second arm a growth, and let the first have more FLOPs than it in all."""
    folder = Path(config.pretraining["layer-wise"])
    write_json(folder / "race.json", {"schema": 1, "source": "/root/x", "stages": list(stages)})
    for name, share in (("layer-wise", 1.0), ("dense", dense_flops)):
        path = Path(config.pretraining[name])
        own = read_json(path / "summary.json")["flops"]
        inherited = Compute(flops=0.5 * own) if name == "layer-wise" else Compute()
        if name == "dense" and share != 1.0:
            records = RunFolder(path).metrics()
            scaled = [{**record, "flops": record["flops"] * share} for record in records]
            text = "".join(json.dumps(line) + "\n" for line in scaled)
            (path / "metrics.jsonl").write_text(text)
            summary = read_json(path / "summary.json")
            write_json(path / "summary.json", {**summary, "flops": own * share})
            own *= share
        RunFolder(path).write_lineage(Lineage(spent=Compute(flops=own), inherited=inherited))


def words(text: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", text)))


def test_without_growth_there_is_no_section(quickstart):
    assert growth(read_inputs(*quickstart())) is None


def test_the_finding_says_who_won_when_and_at_what_price(grown):
    text = words(grown()).replace("\u00a0", " ").replace("\u202f", " ")
    assert (
        "stack went on after 200 steps (819 k tokens, 50 % of the stage), ranked by loss; the race "
        "could not tell it from middle." in text
    )
    assert "All candidates together took 4.20 TFLOP, 3.10 TFLOP of it beside the winner's" in text
    assert "The ranking settled at 50 steps." in text
    assert "interpose.zero [0, 1, 0, 1] same, bit for bit 4.500 4.500 4.440 left after 100" in text
    assert "failed: step 9: the loss is nan" in text
    assert "neighbour of stack; not chosen" in text


def test_the_plot_marks_where_the_ranking_settled(grown):
    text = grown()
    assert text.count('class="mark"') == 1
    assert "Loss of each candidate by rung: stack ends at 4.200; middle ends at 4.250" in text


def test_a_ranking_that_did_not_settle_is_said(grown):
    text = grown(stage(settled_at=None))
    assert "had not settled before the last rung" in words(text)
    assert 'class="mark"' not in text


def test_a_ranking_that_never_changed_is_said(grown):
    assert "The ranking was settled right after growth." in words(grown(stage(settled_at=0)))


def test_a_race_that_is_not_over_says_so(grown):
    assert "The race is not over." in words(grown(stage(winner=None, undecided=[])))


def test_one_operator_is_no_race(grown):
    alone = stage(candidates=[candidate("stack", {0: 4.9})], undecided=[], settled_at=None, k=0)
    text = grown(alone)
    assert "One operator, stack: nothing to choose." in words(text)
    assert "Loss of each candidate by rung" not in text


def test_stages_are_numbered(grown):
    text = words(grown(stage(), stage(stage=2)))
    assert "layer-wise , stage 1" in text
    assert "layer-wise , stage 2" in text


def test_grown_stands_beside_scratch_at_equal_total_flops(grown):
    text = words(grown())
    assert "from scratch at equal total FLOPs its loss there grown difference" in text
    row = re.search(r"dense (\S+)\s\wFLOP (\S+) (\S+) (\S+)", text)
    assert row is not None
    scratch, own, difference = (float(value.replace("\u2212", "-")) for value in row.groups()[1:])
    assert difference == pytest.approx(own - scratch, abs=0.0011)
    assert re.search(
        r"In the end, \S+.\wFLOP against \S+.\wFLOP in all, its loss on held-out", text
    )
    assert "unresolved" in text


def test_nothing_is_compared_where_the_budgets_do_not_meet(grown):
    assert "from scratch at equal" not in words(grown(dense_flops=0.2)).split("CoLA")[0]


def test_the_section_stands_on_the_page(quickstart):
    from samara.report.page import render_page

    config, run = quickstart()
    write_race(config, (stage(),), 2.0)
    text = render_page(read_inputs(config, run))
    assert '<a href="#growth">Growing</a>' in text
    assert "/root" not in text
