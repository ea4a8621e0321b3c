"""The command line as a user meets it: help, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from samara import catalog
from samara.errors import ConfigError

RECIPE = """\
schema: 1
name: one
pretrain:
  model: {hidden_size: 64, num_hidden_layers: 2, head_dim: 16, vocab_size: 300}
  data: {corpus: nowhere, sequence_length: 32}
  optimizer: {kind: adamw, lr: 1e-3}
  training: {max_steps: 10, batch_size: 4, device: cpu}
"""

VERBS = [
    "run",
    "prepare",
    "pretrain",
    "grow",
    "instruct",
    "finetune",
    "evaluate",
    "report",
    "design",
    "convert",
    "average",
    "generate",
    "check",
]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['samara', '--help']\n"
        "from samara.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(samara, verb):
    done = samara(verb, "--help")
    assert done.returncode == 0
    assert f"Example: samara {verb}" in done.stdout


def test_check_prints_a_recipe_that_checks_again(samara, recipe, tmp_path):
    first = samara("check", str(recipe), "optimizer.lr=5e-4")
    assert first.returncode == 0, first.stderr
    assert "lr: 0.0005" in first.stdout
    assert "num_query_heads: [4, 4]" in first.stdout
    again = tmp_path / "again.yaml"
    again.write_text(first.stdout)
    assert samara("check", str(again)).stdout == first.stdout


def test_check_prints_the_json_schema_with_descriptions(samara):
    schema = json.loads(samara("check", "--schema").stdout)
    assert schema["properties"]["pretrain"]
    optimizer = schema["$defs"]["AdamW"]["properties"]["lr"]
    assert optimizer["description"] == "Peak learning rate."


def test_check_lists_the_techniques_with_papers_and_modules(samara):
    done = samara("check", "--list")
    for item in catalog.TECHNIQUES:
        assert item.module in done.stdout
    assert "2404.14619" in done.stdout
    assert "2502.10940" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nope.yaml"], "samara: nope.yaml: no such file; give the path of a recipe"),
        (["check"], "samara: check: give a recipe, --schema, or --list"),
        (["check", "{}", "optimizer.lrr=1"], "samara: pretrain.optimizer.lrr: unknown key"),
        (["check", "{}", "optimizer.lr=fast"], "samara: pretrain.optimizer.lr: input should be"),
        (["check", "{}", "name"], "samara: name: an override is written key=value"),
        (["evaluate", "{}"], "samara: {}: is a recipe of `pretrain`; use `samara pretrain {}`"),
        (["run", "{}", "--stage", "x"], "samara: --stage x: no such stage"),
        (["pretrain", "{}"], "samara: nowhere"),
        (["generate", "nowhere", "Hello"], "samara: nowhere"),
        (["convert", "nowhere", "x", "--to", "llama"], "samara: nowhere"),
        (["average", "nowhere", "here", "--out", "x"], "samara: nowhere"),
        (["evaluate", "nowhere", "--paired"], "samara: --paired: compares two models, 1 given"),
        (["evaluate", "nowhere", "--suite", "openelm"], "samara: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(samara, recipe, arguments, message):
    done = samara(*(a.format(recipe) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(message.format(recipe, recipe)), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(samara):
    with pytest.raises(ConfigError, match="no such file"):
        samara("check", "nope.yaml", "--debug")


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "samara", "check", "nope.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "samara: nope.yaml: no such file; give the path of a recipe\n"


def test_an_unknown_verb_names_the_nearest(samara):
    done = samara("pretrian", "x.yaml")
    assert done.returncode == 2
    assert "pretrain" in done.stderr


def test_design_takes_settings(samara, recipe):
    done = samara("design", str(recipe), "model.num_hidden_layers=3", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 3
    assert len(json.loads(samara("design", str(recipe), "--json").stdout)["layers"]) == 2


def test_design_of_a_setting_alone_asks_for_the_recipe(samara):
    done = samara("design", "model.hidden_size=64")
    assert done.returncode == 2
    assert done.stderr == (
        "samara: model.hidden_size=64: is a setting; give the recipe that it changes, too\n"
    )
