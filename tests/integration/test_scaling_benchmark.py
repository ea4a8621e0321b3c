"""The scaling benchmark counts what two processes send, and its formula says the same."""

from __future__ import annotations

import json

import pytest
from torch import distributed

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)

OPTIONS = ["--processes", "2", "--hidden-size", "32", "--layers", "2", "--vocab-size", "64"]
OPTIONS += ["--batch", "4", "--micro-batch", "1", "--length", "16", "--steps", "1"]


def test_two_processes_send_what_the_formula_says(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "scaling-cpu.json"
    benchmark("scaling").main([*OPTIONS, "--json", str(out)])
    data = json.loads(out.read_text())
    rows = {(row["design"], row["parallel"]): row for row in data["rows"]}
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 4
    for row in rows.values():
        assert row["bytes_per_step"] == pytest.approx(row["predicted_bytes"], rel=0.02)
        assert row["tokens_per_second"] > 0
    for design in ("dense", "cola"):
        ddp, fsdp = rows[design, "ddp"], rows[design, "fsdp"]
        assert ddp["loss"] == pytest.approx(fsdp["loss"], abs=1e-5)
    sent = [rows[design, "fsdp"]["bytes_per_step"] for design in ("dense", "cola")]
    parameters = [rows[design, "fsdp"]["parameters"] for design in ("dense", "cola")]
    assert sent[1] / sent[0] == pytest.approx(parameters[1] / parameters[0], rel=0.1)
    text = benchmark("scaling_page").section([data])
    assert text.count("| dense, ") == text.count("| cola, ") == 2
