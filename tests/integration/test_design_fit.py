"""`samara design --fit` as a user meets it: from a recipe to a recipe that keeps the limits."""

from __future__ import annotations

import json
import sys

import pytest

from samara.cli import main

RECIPE = """\
schema: 1
name: one
pretrain:
  model: {hidden_size: 64, num_hidden_layers: 2, head_dim: 16, vocab_size: 300}
  data: {corpus: nowhere, sequence_length: 32}
  optimizer: {kind: adamw, lr: 1e-3}
  schedule: {kind: cosine, warmup_steps: 5000}
  training: {max_steps: 10000, batch_size: 8, device: cpu, evaluate_every_steps: 5000}
  checkpoint: {every_steps: 5000}
"""
PROFILE = """\
name: box
peak_flops: {bfloat16: 1e10}
memory_bytes: 4000000000
watts: 50
source: measured here
"""


@pytest.fixture
def samara(monkeypatch, capsys, tmp_path):
    """Run the command in this process, in a folder with a recipe and a device profile."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(RECIPE)
    (tmp_path / "box.yaml").write_text(PROFILE)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["samara", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("limit", "spent", "most"),
    [
        ("hours=0.5", lambda d: d["estimate"]["seconds"] / 3600, 0.5),
        ("flops=1e13", lambda d: d["training"]["flops"], 1e13),
        ("params=500k", lambda d: d["parameters"], 5e5),
        ("memory=20MB", lambda d: d["memory"]["total"], 2e7),
    ],
)
def test_the_written_recipe_checks_and_keeps_the_limit(samara, limit, spent, most):
    code, out, err = samara(
        "design", "one.yaml", "--fit", limit, "--device", "box.yaml", "--write", "new.yaml"
    )
    assert (code, err) == (0, "new.yaml: the recipe; check it with `samara check new.yaml`\n")
    assert "Chinchilla" in out
    assert samara("check", "new.yaml")[0] == 0
    data = json.loads(samara("design", "new.yaml", "--json")[1])
    assert data["name"] == "one-fit"
    assert data["estimate"]["device_profile"] == "box"
    assert 0 < spent(data) <= most


def test_the_written_recipe_is_the_design_shown(samara):
    arguments = ("design", "one.yaml", "--fit", "hours=0.5", "--device", "box.yaml", "--json")
    shown = json.loads(samara(*arguments, "--write", "new.yaml")[1])["candidates"][0]
    written = json.loads(samara("design", "new.yaml", "--json")[1])
    for key in ("parameters", "layers", "training", "memory", "estimate"):
        assert written[key] == shown[key]


def test_a_short_run_warms_up_and_saves_in_proportion(samara):
    samara("design", "one.yaml", "--fit", "flops=2e9", "--write", "new.yaml")
    checked = samara("check", "new.yaml")[1]
    assert "warmup_steps: null" in checked
    assert "every_steps: 5000" not in checked
    assert "batch_size: 8" not in checked


def test_settings_are_laid_over_before_the_search(samara):
    arguments = ("design", "one.yaml", "model.cola.rank=16", "--fit", "params=1M", "--json")
    first = json.loads(samara(*arguments)[1])["candidates"][0]
    assert first["family"] == "uniform, CoLA"


def test_a_chain_with_one_design_is_written_as_a_chain(samara, tmp_path):
    chain = """\
schema: 1
name: chain
stages:
  data:
    prepare:
      source: {kind: interpreter_docs}
      tokenizer: {kind: train, vocab_size: 512}
  base:
    pretrain:
      model: {hidden_size: 64, num_hidden_layers: 2, head_dim: 16}
      data: {corpus: stage:data, sequence_length: 32}
      optimizer: {kind: adamw, lr: 1e-3}
      training: {max_steps: 100, batch_size: 8}
"""
    (tmp_path / "chain.yaml").write_text(chain)
    samara("design", "chain.yaml", "--fit", "params=500k", "--write", "new.yaml")
    assert samara("check", "new.yaml")[0] == 0
    data = json.loads(samara("design", "new.yaml", "--json")[1])
    assert data["parameters"] <= 5e5
    assert data["vocab_size"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["one.yaml", "--fit", "parms=1M"],
            "--fit parms=1M: unknown limit 'parms' (did you mean 'params'?)",
        ),
        (
            ["one.yaml", "one.yaml", "--fit", "params=1M"],
            "--fit: starts from one recipe, 2 given",
        ),
        (
            ["one.yaml", "--write", "new.yaml"],
            "--write new.yaml: goes with --fit, which makes a recipe to write",
        ),
        (
            ["one.yaml", "--fit", "params=1M", "--write", "one.yaml"],
            "--write one.yaml: exists; name a new file",
        ),
        (
            ["one.yaml", "training.precision=float32", "--device", "box.yaml"],
            "device profile 'box': has no peak_flops for float32, in which one is trained; "
            "add it, or train in bfloat16",
        ),
        (
            ["two.yaml", "--fit", "params=1M"],
            "--fit: starts from one design, two.yaml has 2 (a, b)",
        ),
        (
            ["one.yaml", "training.layer_dropout.rate=0.5", "--fit", "params=1M"],
            "--fit: chooses the number of layers, and training.layer_dropout has rates for those "
            "of one design; take it out with training.layer_dropout=null",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(samara, tmp_path, arguments, message):
    stage = "{pretrain: {model: {hidden_size: 64, num_hidden_layers: 2, vocab_size: 9}}}"
    (tmp_path / "two.yaml").write_text(
        "schema: 1\nname: two\ndefaults:\n  pretrain:\n    data: {corpus: x, sequence_length: 8}\n"
        "    optimizer: {kind: adamw, lr: 1e-3}\n    training: {max_steps: 1, batch_size: 1}\n"
        f"stages:\n  a: {stage}\n  b: {stage}\n"
    )
    code, _, err = samara("design", *arguments)
    assert code == 2
    assert err == f"samara: {message}\n"


@pytest.mark.parametrize("more", [[], ["--fit", "params=1M"]], ids=["design", "fit"])
def test_the_layers_are_drawn(samara, tmp_path, more):
    code, _, err = samara("design", "one.yaml", "--plot", "plot.svg", *more)
    assert (code, err) == (0, "plot.svg: the layers' widths\n")
    assert (tmp_path / "plot.svg").read_text().startswith("<svg ")
