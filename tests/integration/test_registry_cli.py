"""``samara registry …`` from end to end: a model, deltas on it, gates, rollback, upkeep."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from samara import cli
from samara.registry.records import Audit, Evaluation, License
from samara.runs import write_json
from samara.sparse.delta import make_delta
from samara.sparse.delta_records import Provenance

GATES = """
kpis:
  - {task: qa, metric: accuracy, bound: 0.5, max_loss: 0.02, min_samples: 200}
audits: [bias, stability]
"""


@pytest.fixture
def samara(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SAMARA_REGISTRY", str(tmp_path / "registry"))

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


@pytest.fixture
def artefacts(tmp_path):
    """A model folder, and two deltas on it, one on the other."""
    base = {"w": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "any"})
    save_file(base, folder / "model.safetensors")
    records = Provenance(
        eval=[Evaluation(task="qa", metric="accuracy", value=0.8, ci=(0.79, 0.81), n=500)],
        audit=[Audit(suite=suite, verdict="pass") for suite in ("bias", "stability")],
        license=License(delta="mit", redistribution="allowed"),
    )
    first = make_delta(base, {"w": base["w"] + 1}, records=records)
    second = make_delta({"w": base["w"] + 1}, {"w": base["w"] + 2}, parent=first)
    closed = Provenance(license=License(redistribution="forbidden"))
    for name, delta in (
        ("first", first),
        ("second", second),
        ("closed", make_delta(base, {"w": base["w"] - 1}, records=closed)),
    ):
        delta.save(tmp_path / f"{name}.sdelta")
    (tmp_path / "gates.yaml").write_text(GATES)
    return tmp_path


def test_from_model_to_stable_and_back(samara, artefacts):
    assert "line:1: model" in samara("registry", "add", "line", artefacts / "model", "--by", "ada")
    samara("registry", "add", "line", artefacts / "first.sdelta", "--parent", 1, "--by", "ada")
    samara(
        "registry", "add", "line", artefacts / "second.sdelta", "--note", "tuned on", "--by", "ada"
    )
    shown = samara("registry", "show", "line:2")
    for said in (
        "line:2, delta",
        "by ada",
        "made from   line:1",
        "mit; allowed",
        "qa accuracy 0.8",
        "bias: pass",
    ):
        assert said in shown
    assert "made from   line:2" in samara("registry", "show", "line:3")
    assert "tuned on" in samara("registry", "show", "line:3")

    gates = ("--gates", artefacts / "gates.yaml")
    moved = samara("registry", "promote", "line:2", *gates, "--by", "ada")
    assert "line: stable is version 2" in moved
    assert "gates: promote" in moved
    refused = samara("registry", "promote", "line:3", "--by", "ada", code=2)
    assert "say refuse (qa accuracy: not measured; audit bias: not audited" in refused
    overridden = ("--override-by", "Grace", "--reason", "demo")
    moved = samara("registry", "promote", "line:3", *overridden, "--by", "ada")
    assert "stable is version 3 (was 2)" in moved
    assert "stable" in samara("registry", "list", "line").splitlines()[2]
    back = samara("registry", "rollback", "line", "--reason", "wrong language", "--by", "ada")
    assert "line: stable is version 2 (was 3)" in back

    log = samara("registry", "log", "line")
    assert "overridden by Grace: demo" in log
    assert "because wrong language" in log
    assert "whole; 8 log entries, 3 versions" in samara("registry", "verify", "--full")
    assert "0 objects removed" in samara("registry", "gc", "--drop-older-than-days", 0.5)
    samara("registry", "fetch", "line:stable", artefacts / "out")
    samara("delta", "verify", artefacts / "out" / "first.sdelta", "--base", artefacts / "model")


def test_evidence_files_count(samara, artefacts):
    samara("registry", "add", "line", artefacts / "model", "--by", "ada")
    evidence = artefacts / "evidence.yaml"
    evidence.write_text(
        "evaluations: [{task: qa, metric: accuracy, value: 0.7, ci: [0.68, 0.72], n: 900}]\n"
        "audits: [{suite: bias, verdict: pass}, {suite: stability, verdict: inconclusive}]\n"
    )
    command = ("registry", "promote", "line:1", "--gates", artefacts / "gates.yaml", "--by", "ada")
    held = samara(*command, "--evidence", evidence, code=2)
    assert "say hold (audit stability: verdict inconclusive); measure more" in held
    evidence.write_text("audits: [{suite: stability, verdict: pass}]\n")
    assert "stable is version 1" in samara(*command, "--evidence", evidence)


def test_mistakes_are_one_line(samara, artefacts, tmp_path):
    forbidden = samara("registry", "add", "line", artefacts / "closed.sdelta", code=2)
    assert "redistribution: forbidden; it may not be published" in forbidden
    samara("registry", "add", "line", artefacts / "model", "--by", "ada")
    assert "give LINE:VERSION" in samara("registry", "show", "line", code=2)
    assert "takes both --override-by NAME and --reason" in samara(
        "registry", "promote", "line:1", "--override-by", "Grace", code=2
    )
    assert "no gates yet" in samara("registry", "promote", "line:1", "--by", "ada", code=2)
    (artefacts / "first.sdelta").write_bytes(b"x")
    assert "is no delta file" in samara("registry", "add", "l", artefacts / "first.sdelta", code=2)
    path = next((tmp_path / "registry/objects").iterdir())
    path.unlink()
    assert samara("registry", "verify", code=2).startswith("samara: line:1: ")


def test_without_sqlalchemy_the_message_says_what_to_install(tmp_path):
    code = (
        "import sys\nsys.modules['sqlalchemy'] = None\nimport samara.cli\n"
        f"sys.argv = ['samara', 'registry', 'list', '--registry', {str(tmp_path)!r}]\n"
        "samara.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs sqlalchemy; install it with `pip install 'samara[registry]'`" in done.stderr


def test_the_registry_imports_no_torch(artefacts, tmp_path):
    code = (
        "import sys, samara.cli\n"
        f"sys.argv = ['samara', 'registry', 'add', 'line', {str(artefacts / 'first.sdelta')!r}, "
        f"'--registry', {str(tmp_path / 'other')!r}, '--by', 'ada']\n"
        "samara.cli.main()\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
