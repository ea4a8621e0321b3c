"""Verb ``grow``: from a trained run to a larger one, through a race or without."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from samara.config import dump_yaml, validate
from samara.data.config import PrepareConfig
from samara.data.prepare import PreparedCorpus, prepare
from samara.errors import CheckpointError, RaceError, Stopped
from samara.growth.config import GrowConfig
from samara.growth.grow import grow_verb
from samara.measure.budget import budget
from samara.model.loading import load_model
from samara.runs import RunFolder, hash_file, read_json
from samara.train import pretrain as pretrain_module
from samara.train.checkpoint import TrainingState
from samara.train.config import PretrainConfig
from samara.train.pretrain import pretrain

Settings = dict[str, Any]

MODEL: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
}
STACK: Settings = {"depth": {"kind": "stack"}}
ZERO: Settings = {"depth": {"kind": "interpose"}, "new_layers": "zero"}
RANDOM: Settings = {"depth": {"kind": "random_top"}, "moments": "zero"}
BROKEN: Settings = {"depth": {"kind": "stack"}, "noise": 1e60}
TIMING = {"tokens_per_second", "mfu", "memory_bytes", "seconds"}


def training_settings(corpus: PreparedCorpus) -> Settings:
    return {
        "data": {"corpus": str(corpus.folder), "sequence_length": 32},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "schedule": {"kind": "wsd", "warmup_steps": 2},
        "training": {
            "max_steps": 8,
            "batch_size": 8,
            "micro_batch_size": 4,
            "precision": "float32",
            "device": "cpu",
            "evaluate_every_steps": 4,
            "evaluate_max_tokens": 320,
        },
        "checkpoint": {"every_steps": 4, "keep_last": 1},
        "logging": {"every_steps": 3, "device_profile": "cpu-2core"},
    }


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_pretrain(folder: Path, settings: Settings) -> Path:
    config = validate(PretrainConfig, settings)
    run = RunFolder(folder)
    run.start({"schema": 1, "name": "source", "pretrain": config.model_dump(mode="json")})
    pretrain(config, run)
    return folder


@pytest.fixture(scope="module")
def source(small_corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory):
    """A trained run, which no test may change."""
    folder = tmp_path_factory.mktemp("source") / "run"
    run_pretrain(folder, {"model": MODEL, **training_settings(small_corpus)})
    before = files_of(folder)
    yield folder
    assert files_of(folder) == before, "the source was touched"


@pytest.fixture
def settings(source: Path, small_corpus: PreparedCorpus) -> Callable[..., Settings]:
    def make(*candidates: Settings, **changes: Any) -> Settings:
        return {
            **training_settings(small_corpus),
            "source": str(source),
            "model": {**MODEL, "num_hidden_layers": 4},
            "candidates": list(candidates),
            **changes,
        }

    return make


def run_grow(folder: Path, settings: Settings) -> RunFolder:
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    grow_verb(validate(GrowConfig, settings), run)
    return run


def content(run: RunFolder) -> Settings:
    """All that must not depend on interruptions or on trials."""
    last = sorted((run.path / "checkpoints").iterdir())[-1]
    files = [run.path / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    summary = read_json(run.path / "summary.json")
    return {
        "files": {f"{file.parent.name}/{file.name}": hash_file(file) for file in files},
        "counts": {key: summary[key] for key in ("steps", "tokens", "flops", "weights_hash")},
        "validation_loss": summary["validation_loss"],
    }


def history(run: RunFolder) -> list[Settings]:
    """The races without what depends on the clock."""
    stages = read_json(run.path / "race.json")["stages"]
    for stage in stages:
        for candidate in stage["candidates"]:
            candidate.pop("seconds")
    return stages


def metrics(run: RunFolder) -> list[Settings]:
    return [{k: v for k, v in r.items() if k not in TIMING} for r in run.metrics()]


FIXED = {"kind": "fixed", "k": 4, "measurements": 2}


def test_the_command_prints_what_growth_did_and_leaves_a_pretraining_run(
    samara, settings, source, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    content = {"schema": 1, "name": "grown", "grow": settings(STACK, ZERO, race=FIXED)}
    recipe.write_text(dump_yaml(content))
    done = samara("grow", str(recipe), "--out", "out")
    assert done.returncode == 0, done.stderr
    (race,) = read_json(tmp_path / "out" / "race.json")["stages"]
    before = race["loss_before"]
    assert f"interpose.zero: loss {before:.4f} before, {before:.4f} after growth (exact)" in (
        done.stderr
    )
    assert f"stack: loss {before:.4f} before, " in done.stderr
    assert "after growth (changes)" in done.stderr
    assert f"stage 1: {race['winner']} goes on from step 4" in done.stderr

    run = RunFolder(tmp_path / "out")
    summary, lineage = read_json(run.path / "summary.json"), run.lineage()
    assert summary["design"]["num_hidden_layers"] == 4
    assert summary["steps"] == 8
    assert summary["growth"]["operators"] == [race["winner"]]
    model = load_model(run.path / "model")
    assert model.config.num_hidden_layers == 4
    assert [r["step"] for r in run.metrics() if "validation_loss" in r] == [2, 4, 8]
    # The lineage counts everything: the source, the trials that lost, the measuring.
    assert lineage.inherited == RunFolder(source).lineage().total
    assert lineage.spent.flops == pytest.approx(summary["flops"] + race["net_flops"])
    assert lineage.spent.tokens == summary["tokens"] + 4 * 8 * 32
    assert set(lineage.parents) == {"data", "source", "growth"}
    assert race["spent_flops"] == sum(c["flops"] for c in race["candidates"])
    assert {c["num_units"] for c in race["candidates"]} == {64}  # of 10 rows asked for
    # Losers keep their losses and give back their disk.
    for candidate in (run.path / "candidates").glob("*/"):
        assert (candidate / "rungs" / "00000004.json").exists()
        assert not (candidate / "checkpoints").exists()
    assert samara("grow", str(recipe), "--out", "out").stderr.startswith("out: finished")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_winner_goes_on_as_if_there_had_been_no_trial(
    settings, tmp_path, optimizer, small_corpus
):
    changes: Settings = {"optimizer": {"kind": optimizer, "lr": 0.01}}
    if optimizer == "muon":
        run_pretrain(
            tmp_path / "source", {"model": MODEL, **training_settings(small_corpus), **changes}
        )
        changes["source"] = str(tmp_path / "source")
    raced = run_grow(tmp_path / "raced", settings(STACK, ZERO, RANDOM, race=FIXED, **changes))
    winner = history(raced)[0]["winner"]
    operator = {"stack": STACK, "interpose.zero": ZERO}.get(winner, RANDOM)
    straight = run_grow(tmp_path / "straight", settings(operator, **changes))
    assert content(raced) == content(straight)
    assert raced.lineage().parents == straight.lineage().parents


def test_the_data_goes_on_where_the_source_stopped(settings, tmp_path, source):
    run = run_grow(tmp_path / "a", settings(ZERO))
    assert read_json(run.path / "summary.json")["growth"]["first_row"] == 8 * 8
    again = run_grow(
        tmp_path / "b",
        settings(ZERO, source=str(run.path), model={**MODEL, "num_hidden_layers": 8}),
    )
    # The recipe of a run that was started by hand is not on record: nothing is known of its data.
    assert read_json(again.path / "summary.json")["growth"]["first_row"] == 0
    other = run_grow(tmp_path / "c", settings(ZERO, seed=1))
    assert read_json(other.path / "summary.json")["growth"]["first_row"] == 0
    assert content(other)["files"] != content(run)["files"]


def test_k_0_chooses_by_the_loss_after_growth(settings, tmp_path):
    run = run_grow(tmp_path, settings(STACK, ZERO, race={"kind": "fixed", "k": 0}))
    (race,) = history(run)
    first = {c["label"]: c["losses"]["0"] for c in race["candidates"]}
    assert race["winner"] in race["contenders"]
    assert min(first, key=lambda label: first[label]) in race["contenders"]
    assert race["k"] == 0


def test_layers_are_dropped_before_and_after_growth(settings, small_corpus, tmp_path):
    """The source's second layer was never called: it has no moments, and grows all the same."""
    recipe = training_settings(small_corpus)
    dropout = {"layer_dropout": {"rate": 0.45, "max_rate": 0.9}, "max_steps": 1}
    training = {**recipe["training"], **dropout, "micro_batch_size": 8}
    folder = run_pretrain(
        tmp_path / "source", {**recipe, "seed": 1, "model": MODEL, "training": training}
    )
    last = sorted((folder / "checkpoints").iterdir())[-1]
    with safe_open(last / "optimizer.safetensors", framework="pt") as stored:
        layers = {name.split(".")[2] for name in stored.keys() if ".layers." in name}  # noqa: SIM118
    assert layers == {"0"}

    training = {**recipe["training"], "layer_dropout": {"rate": 0.5}}
    run = run_grow(
        tmp_path / "grown",
        {
            **settings(STACK, ZERO, race={"kind": "fixed", "k": 2}, training=training),
            "source": str(folder),
        },
    )
    summary = read_json(run.path / "summary.json")
    costs = budget(load_model(run.path / "model").config.to_design())
    per_token = costs.flops_per_token(32).training
    layer = costs.layers[0].flops_per_token(32).training

    assert summary["flops"] == summary["tokens"] * (per_token - 2 * layer)
    assert summary["layer_dropout"]["budget"] == 2


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Send this process a signal in the middle of the ``update``-th update from now on."""
    show_progress = pretrain_module._progress
    done = [0]

    def progress(line: Any, start: TrainingState) -> Callable[..., None]:
        show = show_progress(line, start)

        def on_step(state: TrainingState, *arguments: Any) -> None:
            show(state, *arguments)
            done[0] += 1
            if done[0] == update:
                signal.raise_signal(signal.SIGTERM)

        return on_step

    monkeypatch.setattr(pretrain_module, "_progress", progress)


STAGES = {"models": [{**MODEL, "num_hidden_layers": 3}], "rewarmup_steps": 1}
PAIRED = {"kind": "paired", "cap": 60.0, "first_rung": 1}
POOL = ({"depth": {"kind": "last"}}, {**ZERO, "depth": {"kind": "random_top"}})


@pytest.fixture
def staged(settings) -> Settings:
    """Two stages of races that go to the end, with a proposal in each."""
    return settings(*POOL, stages=STAGES, race=PAIRED, proposals={"count": 1}, metric="auto")


@pytest.fixture(scope="module")
def cache() -> Settings:
    return {}


@pytest.fixture
def straight(staged, cache, tmp_path_factory) -> Settings:
    if not cache:
        run = run_grow(tmp_path_factory.mktemp("staged"), staged)
        cache.update(content=content(run), history=history(run), metrics=metrics(run), run=run)
    return cache


def test_stages_race_one_after_the_other(straight):
    first, second = straight["history"]
    run: RunFolder = straight["run"]
    assert (first["first_step"], first["steps"]) == (0, 2)
    assert (second["first_step"], second["steps"]) == (2, 6)
    assert len(first["candidates"]) == len(second["candidates"]) == 3
    assert sum(c["proposed_from"] is not None for c in second["candidates"]) == 1
    assert second["agreement"]
    assert second["foretold"]["loss"]["num_pairs"] > 0
    steps = [r["step"] for r in straight["metrics"]]
    assert steps == sorted(steps)
    assert steps[-1] == 8
    assert read_json(run.path / "summary.json")["design"]["num_hidden_layers"] == 4
    assert (run.path / "stages" / "1" / "checkpoints").exists()


def test_an_interrupted_race_equals_the_uninterrupted_one(staged, straight, tmp_path, monkeypatch):
    for _ in range(5):  # in trials of both stages, at their rungs, and in what comes after
        with monkeypatch.context() as patch:
            stop_at(patch, 3)
            with pytest.raises(Stopped, match="saved; run the same command to go on"):
                run_grow(tmp_path, staged)
    run = run_grow(tmp_path, staged)
    assert history(run) == straight["history"]
    assert content(run) == straight["content"]
    assert run.lineage().spent.flops == straight["run"].lineage().spent.flops


def test_a_candidate_whose_loss_is_no_number_is_left_out(settings, tmp_path, capsys):
    wide = {**MODEL, "num_hidden_layers": 4, "ffn_dim": 96}
    run = run_grow(tmp_path / "a", settings(BROKEN, ZERO, model=wide, race=FIXED))
    (race,) = history(run)
    assert race["winner"] == "interpose.zero"
    (broken,) = [c for c in race["candidates"] if c["failure"]]
    assert "loss is nan" in broken["failure"]
    assert f"{broken['label']} is out: its validation loss is nan" in capsys.readouterr().err
    with pytest.raises(RaceError, match=r"candidates: all 1 failed .* the source is untouched"):
        run_grow(tmp_path / "b", settings(BROKEN, model=wide))


def test_stages_follow_what_zero_padding_does_to_the_norm(settings, tmp_path):
    stages = {"models": [{**MODEL, "hidden_size": 48, "num_query_heads": 2}]}
    operator = {"depth": {"kind": "stack"}, "width": "zero_pad"}
    larger = {**MODEL, "hidden_size": 64, "num_query_heads": 2}
    run = run_grow(tmp_path, settings(operator, stages=stages, model=larger))
    first, second = history(run)
    for race in (first, second):
        (candidate,) = race["candidates"]
        assert candidate["exactness"] == "tolerance"
        assert candidate["losses"]["0"] == pytest.approx(race["loss_before"], abs=1e-5)
    design = read_json(run.path / "summary.json")["design"]
    assert design["rms_norm_eps"] == pytest.approx(1e-6 * 32 / 64)


def test_a_chain_grows_again_and_reports(samara, small_corpus, tmp_path):
    settings = training_settings(small_corpus)

    def growth(source: str, layers: int) -> Settings:
        model = {**MODEL, "num_hidden_layers": layers}
        pool = {"candidates": [STACK, ZERO], "race": FIXED}
        return {"grow": {**settings, "source": source, "model": model, **pool}}

    stages = {
        "small": {"pretrain": {**settings, "model": MODEL}},
        "grown": growth("stage:small", 3),
        "again": growth("stage:grown", 4),
        "scratch": {"pretrain": {**settings, "model": {**MODEL, "num_hidden_layers": 4}}},
        "page": {"report": {"pretraining": {n: f"stage:{n}" for n in ("scratch", "again")}}},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml({"schema": 1, "name": "chain", "stages": stages}))
    done = samara("run", str(recipe), "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "the data goes on behind the 128 rows that the source has read" in done.stderr
    again = tmp_path / "out" / "again"
    assert read_json(again / "summary.json")["growth"]["first_row"] == 128
    totals = [RunFolder(tmp_path / "out" / name).lineage().total for name in ("grown", "again")]
    assert RunFolder(again).lineage().inherited == totals[0]
    assert totals[1].flops > totals[0].flops
    assert 'id="growth"' in (tmp_path / "out" / "report.html").read_text()
    assert samara("run", str(recipe), "--out", "out").stderr.count("finished, unchanged") == 5


def test_few_rows_to_compare_on_are_said(settings, small_corpus, tmp_path, capsys):
    # Longer rows are fewer.
    data = {"corpus": str(small_corpus.folder), "sequence_length": 64}
    run_grow(tmp_path, settings(STACK, ZERO, race={"kind": "fixed", "k": 0}, data=data))
    told = capsys.readouterr().err
    assert "candidates are compared on 34 validation rows, all there are; 64 or more" in told
    assert "data starts at its beginning: sequence_length differs from the source's" in told


def test_who_failed_before_an_interruption_has_failed(settings, tmp_path):
    pool = settings(STACK, ZERO, race=FIXED)
    failed = tmp_path / "candidates" / "stack" / "failed.json"
    failed.parent.mkdir(parents=True)
    failed.write_text(json.dumps({"step": 4, "reason": "step 3: the loss is nan"}))
    (race,) = history(run_grow(tmp_path, pool))
    stack = next(c for c in race["candidates"] if c["label"] == "stack")
    assert stack["failure"] == "step 3: the loss is nan"
    assert set(stack["losses"]) == {"0", "2"}
    assert race["winner"] == "interpose.zero"
    assert race["spent_flops"] == 2 * next(
        c["flops"] for c in race["candidates"] if c["label"] == "interpose.zero"
    )


def test_another_source_under_the_same_name_is_refused(settings, source, tmp_path):
    run_grow(tmp_path / "a", settings(ZERO))
    path = tmp_path / "a" / "candidates" / "source.json"
    path.write_text(json.dumps({"loss": 1.0, "hash": "other"}))
    with pytest.raises(CheckpointError, match="began from another state of source"):
        run_grow(tmp_path / "a", settings(ZERO))


def test_a_model_folder_grows_without_moments(settings, source, tmp_path):
    reset = {**ZERO, "moments": "reset"}
    run = run_grow(tmp_path / "a", settings(reset, source=str(source / "model")))
    assert read_json(run.path / "summary.json")["steps"] == 8


def test_a_masked_model_grows(small_corpus, settings, tmp_path):
    masked = {"objective": {"kind": "masked_lm"}}
    base = {**training_settings(small_corpus), **masked}
    folder = run_pretrain(tmp_path / "source", {"model": MODEL, **base})
    run = run_grow(
        tmp_path / "grown", settings(STACK, ZERO, race=FIXED, source=str(folder), **masked)
    )
    (race,) = history(run)
    exact = next(c for c in race["candidates"] if c["exactness"] == "exact")
    assert exact["losses"]["0"] == race["loss_before"]


def test_ray_gives_the_same_run(settings, tmp_path):
    ray = pytest.importorskip("ray")
    pool = settings(STACK, ZERO, RANDOM, race=FIXED)
    here = run_grow(tmp_path / "here", pool)
    there = run_grow(tmp_path / "there", {**pool, "executor": "ray"})
    ray.shutdown()
    assert content(there) == content(here)
    assert history(there) == history(here)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {**MODEL, "num_hidden_layers": 1}},
            "candidates.0 (stack): target.num_hidden_layers: is 1, less than the source's 2; "
            "nothing may shrink",
        ),
        (
            {"source": "nowhere"},
            "source: nowhere: no such folder; give a run folder or a model folder",
        ),
        (
            {"source": "{unfinished}"},
            "source: {unfinished}: the run has not finished, there is no model in it; run it to "
            "its end",
        ),
        (
            {"source": "{source}/model"},
            "candidates.0.moments: map needs the optimizer's state, and source {source}/model has "
            "no checkpoints; give the run folder that has them, or set moments: reset",
        ),
        ({"source": "{other}"}, "source: {other} holds no Samara model"),
        (
            {"objective": {"kind": "masked_lm"}},
            "source: the tokenizer of {source}/model is not that of",
        ),
        (
            {"race": {"kind": "fixed", "k": 9}},
            "race.k: 9 exceeds the 8 steps of stage 1 of 1; lower it, or raise training.max_steps",
        ),
        (
            {"race": {"kind": "paired", "cap": 0.5}},
            "race.first_rung: the first comparison is after 50 steps, stage 1 of 1 has 8; lower "
            "it, or raise training.max_steps",
        ),
        (
            {"proposals": {"at_rung": 3}, "race": FIXED},
            "proposals.at_rung: 3 exceeds the 2 rungs of stage 1 of 1; lower it",
        ),
        (
            {"stages": {"models": [{**MODEL, "num_hidden_layers": 3}] * 9}},
            "stages: 8 steps leave none for one of 10 stages; raise training.max_steps, or lower "
            "stages.alpha",
        ),
        (
            {"stages": {"models": [{**MODEL, "num_hidden_layers": 5}]}},
            "candidates: none fits stage 2 of 2; stack: target.num_hidden_layers: is 4, less than "
            "the source's 5; nothing may shrink",
        ),
        ({"optimizer": {"kind": "muon", "lr": 0.01}}, "optimizer state: "),
        ({"data": {"corpus": "{unsplit}", "sequence_length": 32}}, "data.corpus: {unsplit} has no"),
    ],
)
def test_a_mistake_is_one_line(samara, settings, source, tmp_path, unsplit, changes, message):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    places = {
        "unfinished": str(tmp_path / "unfinished"),
        "source": str(source),
        "other": str(other),
        "unsplit": str(unsplit),
    }

    def fill(text: str) -> str:
        for name, place in places.items():
            text = text.replace(f"{{{name}}}", place)
        return text

    recipe = tmp_path / "recipe.yaml"
    text = json.dumps({"schema": 1, "name": "x", "grow": settings(STACK, **changes)})
    recipe.write_text(fill(text))
    done = samara("grow", str(recipe), "--out", "out")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"samara: {fill(message)}"), last


@pytest.fixture(scope="module")
def unsplit(small_corpus, tmp_path_factory) -> Path:
    """The corpus without validation text."""
    folder = tmp_path_factory.mktemp("unsplit")
    text = folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"one more text {n} " * 9}) + "\n" for n in range(9))
    )
    config = {
        "source": {"kind": "files", "paths": [str(text)]},
        "cleaning": {"english_only": False, "near_duplicate_threshold": None},
        "split": {"validation_fraction": 0.0, "test_fraction": 0.0},
        "tokenizer": {"kind": "load", "path": str(small_corpus.tokenizer_folder)},
    }
    return prepare(validate(PrepareConfig, config), folder / "prepared").folder
