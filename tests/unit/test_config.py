"""Settings: every mistake gets one clear line with the full path of its key."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from samara.config import Config, apply_overrides, dump_yaml, load_yaml, merge, parse_yaml, validate
from samara.errors import ConfigError


class AdamW(Config):
    kind: Literal["adamw"] = "adamw"
    lr: float


class Muon(Config):
    kind: Literal["muon"] = "muon"
    lr: float
    momentum: float = 0.95


class Settings(Config):
    optimizer: Annotated[AdamW | Muon, Field(discriminator="kind")]
    widths: int | tuple[int, ...] = 3
    corpus: str | AdamW = "folder"
    named: dict[str, AdamW] = Field(default_factory=dict)
    listed: tuple[AdamW, ...] = ()
    mode: Literal["fast", "slow"] = "fast"


class Recipe(Config):
    pretrain: Settings


GOOD = {"kind": "muon", "lr": 1e-3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"kind": "muon", "lr": "fast"}}, "pretrain.optimizer.lr: input should be"),
        (
            {"optimizer": {"kind": "muon", "lr": 1, "momentun": 2}},
            "pretrain.optimizer.momentun: unknown key (did you mean 'momentum'?)",
        ),
        (
            {"optimizer": {"kind": "adamv", "lr": 1}},
            "pretrain.optimizer.kind: unknown value 'adamv' (did you mean 'adamw'?)",
        ),
        ({"optimizer": {"lr": 1}}, "pretrain.optimizer.kind: is required and not given"),
        ({"optimizer": {"kind": "adamw"}}, "pretrain.optimizer.lr: is required and not given"),
        (
            {"optimizer": GOOD, "moode": "fast"},
            "pretrain.moode: unknown key (did you mean 'mode'?)",
        ),
        (
            {"optimizer": GOOD, "mode": "fastt"},
            "pretrain.mode: unknown value 'fastt' (did you mean 'fast'?)",
        ),
        (
            {"optimizer": GOOD, "corpus": {"lr": 1, "learning": 2}},
            "pretrain.corpus.learning: unknown key (known: kind, lr)",
        ),
        (
            {"optimizer": GOOD, "named": {"x": {"lr": 1, "kid": 2}}},
            "pretrain.named.x.kid: unknown key (did you mean 'kind'?)",
        ),
        (
            {"optimizer": GOOD, "listed": [{"lr": 1}, {"lr": "x"}]},
            "pretrain.listed.1.lr: input should be a valid number",
        ),
    ],
)
def test_an_error_names_the_full_path_and_the_fix(settings, message):
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"pretrain": settings})
    assert str(caught.value).startswith(message)


def test_a_union_reports_only_the_branch_that_was_meant():
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"pretrain": {"optimizer": GOOD, "corpus": {"lr": 1, "kid": 2}}})
    assert str(caught.value).splitlines() == [
        "pretrain.corpus.kid: unknown key (did you mean 'kind'?)"
    ]


def test_several_mistakes_are_all_reported():
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"pretrain": {"optimizer": {"kind": "adamw", "x": 1}, "y": 2}})
    assert len(str(caught.value).splitlines()) == 3


def test_settings_are_frozen():
    settings = validate(Recipe, {"pretrain": {"optimizer": GOOD}})
    with pytest.raises(ValueError, match="frozen"):
        settings.pretrain = settings.pretrain


def test_yaml_reads_exponents_without_a_dot_as_numbers():
    assert parse_yaml("a: 3e-4\nb: 1E6\nc: -2e+3", origin="x") == {"a": 3e-4, "b": 1e6, "c": -2e3}


def test_yaml_refuses_a_key_written_twice():
    with pytest.raises(ConfigError, match=r"a: written twice \(line 3\)"):
        parse_yaml("a: 1\nb: 2\na: 3", origin="x")


def test_yaml_merge_keys_of_one_file_work():
    data = parse_yaml("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", origin="x")
    assert data["y"] == {"a": 1, "b": 3}


def test_yaml_builds_no_python_objects():
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.getcwd []", origin="x")


def test_a_missing_or_broken_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "nope.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_yaml(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ConfigError, match="not valid YAML at line"):
        load_yaml(tmp_path / "bad.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "binary.yaml")


def test_overrides_follow_yaml_rules_and_leave_the_input_alone():
    data = {"a": {"b": [1, 2]}, "n": None}
    result = apply_overrides(data, ["a.b.1=5", "c.d=3e-4", "a.x=[1, 2]", "n.k=true", "s=a=b"])
    assert result == {
        "a": {"b": [1, 5], "x": [1, 2]},
        "n": {"k": True},
        "c": {"d": 3e-4},
        "s": "a=b",
    }
    assert data == {"a": {"b": [1, 2]}, "n": None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("novalue", "novalue: an override is written key=value"),
        ("a.b.7=1", "a.b.7: '7' is no position in a list of 2"),
        ("a.b.0.c=1", "a.b.0.c: cannot be set, its parent holds 1"),
    ],
)
def test_a_wrong_override_is_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": {"b": [1, 2]}}, [override])
    assert str(caught.value).startswith(message)


def test_merge_lays_mappings_over_each_other_and_replaces_the_rest():
    assert merge({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "e": 2}) == {
        "a": {"b": 1, "c": [2]},
        "d": 1,
        "e": 2,
    }


def test_yaml_round_trip_and_short_lists_on_one_line():
    data = {"widths": [1, 2, 3], "nested": [{"a": 1}], "text": "é: x", "none": None, "f": 3e-4}
    text = dump_yaml(data)
    assert parse_yaml(text, origin="x") == data
    assert "widths: [1, 2, 3]" in text
