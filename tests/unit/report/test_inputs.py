"""Reading: what is missing is said, what is damaged is refused in one line."""

from __future__ import annotations

import json

import pytest

from samara.errors import CheckpointError
from samara.report.inputs import read_inputs
from samara.report.run_files import without_paths


def message(config, run) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_inputs(config, run)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_everything_is_read(quickstart):
    inputs = read_inputs(*quickstart())
    assert [arm.name for arm in inputs.arms] == ["dense", "layer-wise", "CoLA + layer-wise"]
    assert [arm.state for arm in inputs.arms] == ["finished"] * 3
    assert inputs.finished == inputs.arms
    dense, layerwise, _ = inputs.arms
    assert dense.comparison is None
    assert layerwise.comparison is not None
    assert layerwise.comparison.verdict == "unresolved"
    assert dense.budget is not None
    assert dense.summary is not None
    assert dense.budget.parameters.total == dense.summary.parameters
    assert inputs.corpus is not None
    assert inputs.corpus.vocab_size == 4096


def test_validation_points_get_the_training_time_of_their_tokens(quickstart):
    dense = read_inputs(*quickstart()).arms[0]
    for point in dense.validation:
        assert point.seconds == pytest.approx(point.tokens / 12_350.0)


def test_losses_that_are_not_numbers_are_passed_over(quickstart):
    config, run = quickstart()
    path = run.path.parent / "dense" / "metrics.jsonl"
    before = len(read_inputs(config, run).arms[0].training)
    with path.open("a") as file:
        file.write(json.dumps({"step": 245, "tokens": 1, "flops": 1, "loss": None}) + "\n")
    assert len(read_inputs(config, run).arms[0].training) == before


def test_a_cut_last_line_is_forgiven_and_a_damaged_one_is_not(quickstart):
    config, run = quickstart()
    path = run.path.parent / "dense" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 24')
    read_inputs(config, run)
    lines = whole.splitlines()
    lines[4] = lines[4][:20]
    path.write_text("\n".join(lines))
    assert message(config, run).endswith(
        "metrics.jsonl: line 5 is not JSON; the file is damaged, run its stage again"
    )


def test_folders_that_do_not_exist(quickstart, tmp_path):
    config, run = quickstart()
    gone = str(tmp_path / "gone")
    for key in ("evaluation", "corpus"):
        changed = config.model_copy(update={key: gone})
        assert message(changed, run) == (f"report.{key}: {gone}: no such folder; give a run folder")
    changed = config.model_copy(update={"pretraining": {"dense": gone}})
    assert message(changed, run).startswith("report.pretraining.dense: ")


@pytest.mark.parametrize(
    "file",
    ["dense/summary.json", "evaluation/results.json", "data/corpus.json", "dense/status.json"],
)
def test_a_file_that_is_not_json(quickstart, file):
    config, run = quickstart()
    path = run.path.parent / file
    path.write_text(path.read_text()[:12])
    assert message(config, run).startswith(f"{path}: not valid JSON")


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("dense/summary.json", "flops_per_token"),
        ("evaluation/results.json", "models"),
        ("data/corpus.json", "statistics"),
    ],
)
def test_a_file_that_lacks_something(quickstart, file, key):
    config, run = quickstart()
    path = run.path.parent / file
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data))
    assert message(config, run) == (
        f"{path}: {key}: field required; the file is damaged or of another version, "
        "run its stage again"
    )


def test_what_has_not_run_yet_is_a_note(quickstart):
    config, run = quickstart()
    base = run.path.parent
    (base / "evaluation" / "results.json").unlink()
    (base / "evaluation" / "status.json").write_text('{"state": "running"}')
    (base / "data" / "corpus.json").unlink()
    inputs = read_inputs(config, run)
    assert inputs.evaluation_note == "The evaluation has no results yet (running)."
    assert inputs.corpus_note == "The corpus is not prepared yet (unfinished)."


def test_paths_of_this_machine_are_left_out(quickstart, tmp_path):
    config, run = quickstart()
    inputs = read_inputs(config, run)
    assert inputs.shown_path(run.path.parent / "dense" / "model") == "dense/model"
    assert inputs.shown_path("/somewhere/else/corpus") == "corpus"
    assert without_paths("see /root/a b: '/home/me/runs/x.json', 3/4 and a/b/c") == (
        "see …/a b: '…/x.json', 3/4 and a/b/c"
    )
