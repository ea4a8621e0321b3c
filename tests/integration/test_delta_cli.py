"""``samara delta …`` from end to end on a small model folder."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from samara import cli
from samara.runs import hash_file, write_json


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMARA_CACHE", str(tmp_path / "cache"))
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(32, 16, generator=draw).bfloat16()}
    found = []
    for number, name in enumerate(("base", "one", "two")):
        weights = {"w": base["w"].clone()}
        weights["w"].view(-1)[1 : 40 * number : 3] += 0.01 * number
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": "any"})
        save_file(weights, folder / "model.safetensors")
        found.append(folder)
    return found


@pytest.fixture
def samara(monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["samara", *map(str, arguments)])
        found = 0
        try:
            cli.main()
        except SystemExit as leave:
            found = leave.code
        output = capsys.readouterr()
        assert found == code, output.err
        return output.err if code else output.out

    return run


def test_diff_show_verify_apply_revert_export(folders, samara, tmp_path):
    base, one, _ = folders
    record = tmp_path / "record.yaml"
    record.write_text(
        "model_id: org/any\n"
        "train: {data_sha256: abc}\n"
        "selector: {score: random, density: 0.01}\n"
        "eval: [{task: qa, metric: em, value: 0.5, ci: [0.4, 0.6], n: 100, base_value: 0.4}]\n"
        "audit: [{suite: crows-pairs, before: 0.6, after: 0.61, verdict: pass}]\n"
        "license: {delta: apache-2.0, redistribution: allowed}\n"
    )
    file = tmp_path / "one.sdelta"
    assert "13 weights" in samara("delta", "diff", base, one, "--out", file, "--record", record)
    shown = samara("delta", "show", file)
    for text in (
        "org/any",
        "the bare base",
        "13 weights in 1 tensors",
        "by random, density 0.01",
        "qa em 0.5 [0.4, 0.6], base 0.4, 100 items",
        "crows-pairs: pass, 0.6 -> 0.61",
        "apache-2.0; redistribution allowed",
    ):
        assert text in shown
    assert json.loads(samara("delta", "show", file, "--json"))["train"]["data_sha256"] == "abc"
    before = hash_file(base / "model.safetensors")
    assert "is the base" in samara("delta", "verify", file, "--base", base, "--full")
    assert "13 weights changed" in samara("delta", "apply", file, base)
    assert torch.equal(
        load_file(base / "model.safetensors")["w"], load_file(one / "model.safetensors")["w"]
    )
    assert json.loads(samara("delta", "show", file, "--json"))["delta_id"] in samara(
        "delta", "show", base
    )
    assert "is applied already" in samara("delta", "apply", file, base, code=2)
    assert len(json.loads(samara("delta", "show", base, "--json"))["stack"]) == 1
    assert "is off" in samara("delta", "revert", base)
    assert "carries no delta" in samara("delta", "show", base)
    assert hash_file(base / "model.safetensors") == before
    samara("delta", "export", file, "--base", base, "--out", tmp_path / "merged")
    assert torch.equal(
        load_file(tmp_path / "merged/model.safetensors")["w"],
        load_file(one / "model.safetensors")["w"],
    )


def test_compose_says_where_deltas_meet(folders, samara, tmp_path):
    base, one, two = folders
    files = [tmp_path / "one.sdelta", tmp_path / "two.sdelta"]
    for tuned, file in zip((one, two), files, strict=True):
        samara("delta", "diff", base, tuned, "--out", file)
    out = tmp_path / "both.sdelta"
    refused = samara("delta", "compose", *files, "--base", base, "--out", out, code=2)
    assert "say which counts with the policy" in refused
    command = ("delta", "compose", *files, "--base", base, "--out", out, "--policy")
    said = samara(*command, "last")
    assert "share 13 weights, 0 moved in opposite directions" in said
    shown = samara("delta", "show", out)
    assert "policy last" in shown
    samara(*command, "priority", "--priority", 2, "--priority", 1)
    wrong = samara(*command, "priority", "--priority", 2, code=2)
    assert "--priority: 1 given for 2 deltas" in wrong


def test_mistakes_are_one_line(folders, samara, tmp_path):
    base = folders[0]
    bad = tmp_path / "bad.yaml"
    bad.write_text("licence: {}\n")
    out = tmp_path / "x.sdelta"
    message = samara("delta", "diff", base, folders[1], "--out", out, "--record", bad, code=2)
    assert "did you mean 'license'" in message
    assert "no such folder" in samara("delta", "revert", tmp_path / "none", code=2)
    samara("delta", "diff", base, folders[1], "--out", out)
    assert "name it with --base" in samara("delta", "verify", out, "--full", code=2)


def test_showing_a_delta_imports_no_torch(folders, samara, tmp_path):
    out = tmp_path / "x.sdelta"
    samara("delta", "diff", folders[0], folders[1], "--out", out)
    code = (
        "import sys, samara.cli\n"
        f"sys.argv = ['samara', 'delta', 'show', {str(out)!r}]\n"
        "samara.cli.main()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_change_is_shown_and_put_right_by_the_next(folders, samara, tmp_path):
    base, one, _ = folders
    file = tmp_path / "one.sdelta"
    samara("delta", "diff", base, one, "--out", file)
    before = hash_file(base / "model.safetensors")
    samara("delta", "apply", file, base)
    state = json.loads((base / ".sdelta/state.json").read_text())
    pending = {"action": "apply", "delta_id": state["stack"][0]}
    write_json(base / ".sdelta/state.json", {**state, "stack": [], "pending": pending})
    assert "a process was killed amid `apply` of" in samara("delta", "show", base)
    samara("delta", "revert", base, code=2)
    assert hash_file(base / "model.safetensors") == before
    assert "carries no delta" in samara("delta", "show", base)
