"""What is written is true: every recipe parses, every command in the README exists and works."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from samara.cli import app, main
from samara.config import dump_yaml, parse_yaml
from samara.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.startswith(("samara ", "make "))
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_resolved_form_is_the_same_recipe(path):
    recipe = load_recipe(path)
    resolved = recipe.resolved()
    again = parse_recipe(parse_yaml(dump_yaml(resolved), origin=path.name))
    assert again.resolved() == resolved
    assert again.fingerprints() == recipe.fingerprints()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_named_after_its_file_and_says_what_it_is_for(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("samara ")])
def test_every_command_of_the_readme_parses(command):
    verb, *arguments = shlex.split(command)[1:]
    known: Any = typer.main.get_command(app)
    assert verb in known.commands
    found = known.commands[verb]
    if hasattr(found, "commands"):  # of a group, the command in it
        name, *arguments = arguments
        assert name in found.commands
        found = found.commands[name]
    found.make_context(verb, arguments)
    for argument in arguments:
        if argument.startswith("recipes/"):
            assert (ROOT / argument).exists()


def test_the_recipes_in_the_examples_of_help_exist():
    text = (ROOT / "samara" / "cli.py").read_text(encoding="utf-8")
    named = re.findall(r"recipes/[\w.-]+\.yaml", text)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.M), command


def test_the_readme_shows_the_message_that_is_printed(monkeypatch, capsys):
    block = re.search(r"```console\n\$ (samara .*?)\n(.*?)\n```", README, flags=re.S)
    assert block is not None
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(block[1]))
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.strip() == block[2]


def test_links_in_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_recipes_in_the_readme_exist():
    for pattern in re.findall(r"`(recipes/[^`]+)`", README):
        stem, _, choices = pattern.partition("{")
        names = choices.rstrip("}.yaml").split(",") if choices else [""]
        for name in names:
            path = f"{stem}{name}.yaml" if choices else pattern
            assert (ROOT / path).exists(), path


def test_the_continuous_integration_runs_every_check():
    script = (ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}" in script for target in ("lint", "types", "test"))


def test_constraints_pin_every_dependency():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'^\s*"([A-Za-z][A-Za-z0-9_.-]*)(?:\[\w+\])?[><=~!]', project, flags=re.M)
    listed += re.findall(r'"([A-Za-z][A-Za-z0-9_.-]*)[><=~!]=', project)
    missing = {name.lower().replace("_", "-") for name in listed} - pinned - {"setuptools"}
    assert not missing
