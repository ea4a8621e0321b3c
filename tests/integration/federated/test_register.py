"""A federation's result is a version like any other; what its clients keep stays with them."""

from __future__ import annotations

import pytest

from samara.config import validate
from samara.errors import GateError
from samara.registry.artifacts import files_of
from samara.release.artifacts import describe
from samara.release.config import ReleaseConfig
from samara.release.release import release
from samara.runs import RunFolder, hash_weights, read_json


@pytest.mark.parametrize("method", ["droppeft", "head_only"])
def test_a_federation_is_registered_without_what_clients_keep(
    bases, rows, tmp_path, settings, finished, method
):
    run = tmp_path / "run"
    finished(settings(bases["samara"], rows, method=method), run)
    (run / "clients").mkdir(exist_ok=True)
    (run / "clients" / "kept.safetensors").write_bytes(b"a client's own")
    found = describe(run)
    assert (found.kind, found.made_from) == ("run", [hash_weights(bases["samara"])])
    assert {row.metric for row in found.evidence.evaluations} == {"accuracy", "loss"}
    kept = files_of(run)
    assert not [name for name in kept if name.startswith(("clients", "checkpoints"))]
    weights = "head.safetensors" if method == "head_only" else "adapter/adapter_model.safetensors"
    assert weights in kept
    gate = {"task": "reviews", "metric": "accuracy", "bound": 0.0, "min_samples": 1}
    config = validate(
        ReleaseConfig,
        {
            "line": "reviews",
            "versions": {"base": {"source": str(bases["samara"])}, "shared": {"source": str(run)}},
            "gates": {"stable": {"kpis": [gate], "audits": []}},
            "steps": [{"do": "promote", "version": "shared", "unless_passed": "go_on"}],
            "actor": "ada",
        },
    )
    (tmp_path / "release").mkdir()
    release(config, RunFolder(tmp_path / "release"))
    summary = read_json(tmp_path / "release" / "summary.json")
    assert summary["versions"]["shared"]["made_from"] == ["reviews:1"]
    assert summary["log"][-1]["action"] == "refuse"
    assert "measured without an interval" in summary["log"][-1]["details"]["gates"]
    stopping = config.model_copy(
        update={"steps": (config.steps[0].model_copy(update={"unless_passed": "stop"}),)}
    )
    (tmp_path / "other").mkdir()
    with pytest.raises(GateError, match="measured without an interval"):
        release(stopping, RunFolder(tmp_path / "other"))
