"""Candidates have stable names, read from YAML, and mistakes in them are explained."""

from __future__ import annotations

import subprocess
import sys

import pytest

from samara.config import parse_yaml, validate
from samara.errors import ConfigError
from samara.growth.operator_config import OperatorConfig


def read(text: str) -> OperatorConfig:
    return validate(OperatorConfig, parse_yaml(text, origin="test"), path="operator")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("{}", "stack"),
        ("{depth: {kind: middle}}", "middle"),
        ("{depth: {kind: block, start: 1, length: 2}, new_layers: zero}", "block-1-2.zero"),
        ("{depth: {kind: last, length: 1}, moments: reset}", "last-1.moments-reset"),
        ("{depth: {kind: solar, overlap: 16}, width: zero_pad}", "solar-16.zero_pad"),
        ("{depth: {kind: llama_pro}, noise: 0.01}", "llama_pro.noise-0.01"),
        ("{depth: {kind: map, layers: [0, 1, 1*, new, 0+1]}}", "map-d7a9dffd"),
    ],
)
def test_a_candidate_has_a_short_name(text, label):
    assert read(text).label == label


def test_maps_written_alike_have_one_name():
    first = read("{depth: {kind: map, layers: [0, 1, '1 *']}}")
    again = read("{depth: {kind: map, layers: ['0', 1, 1*]}}")
    other = read("{depth: {kind: map, layers: [0, 1, 1]}}")
    assert first.label == again.label != other.label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{depth: {kind: stakc}}", r"operator.depth.kind: unknown value 'stakc'.*'stack'"),
        ("{depth: {kind: block}}", "operator.depth.start: is required and not given"),
        ("{depth: {kind: first, length: 0}}", "operator.depth.length: input should be greater"),
        ("{depth: {kind: map, layers: [0, nw]}}", "operator.depth: layer map: 'nw' is no entry"),
        ("{width: zero_pad, noise: 0.1}", "noise 0.1 is for the copies of width duplicate"),
        ("{moments: keep}", "operator.moments: unknown value 'keep'"),
    ],
)
def test_a_mistake_is_explained(text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_settings_and_plans_need_no_torch():
    code = (
        "import sys, samara.growth.plan, samara.growth.operator_config, samara.growth.layer_map;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
