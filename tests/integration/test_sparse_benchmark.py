"""The benchmark of sparse training measures every method at toy size and keeps what it found."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # peft's SHiRA


@pytest.fixture(scope="module")
def sparse(benchmark) -> Any:
    return benchmark("sparse")


@pytest.fixture
def here(sparse, monkeypatch) -> Any:
    """Cases run in this process."""

    class Here:
        def __init__(self, ahead: int) -> None:
            pass

        def run(self, work, case, *, seconds):
            return work(case)

        def stop(self) -> None:
            pass

    monkeypatch.setattr(sparse, "Processes", Here)
    monkeypatch.setattr("samara.train.memory._return_freed_memory", lambda: None)  # slow
    return sparse


def rows_of(path) -> dict[str, Any]:
    return {f"{r['method']} {r['variant']}": r for r in json.loads(path.read_text())["rows"]}


OPTIONS = ["--steps", "2", "--repeats", "2", "--batch", "2", "--length", "32"]


def test_every_method_trains_and_ours_keeps_and_computes_less(here, benchmark, tmp_path, capsys):
    out = tmp_path / "sparse-cpu.json"
    here.main([*OPTIONS, "--variants", "eager", "--json", str(out)])
    rows = rows_of(out)
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == len(here.METHODS)
    assert all(row["failed"] is None and row["tokens_per_second"] > 0 for row in rows.values())
    full, lora = rows["full eager"], rows["lora eager"]
    assert lora["trained"] == rows["shira eager"]["trained"]
    for method in ("element", "column", "two_level", "block4", "row"):
        row = rows[f"{method} eager"]
        assert 0.5 * lora["trained"] < row["trained"] <= lora["trained"]
        assert row["moments_bytes"] == 8 * row["trained"] < full["moments_bytes"]
        assert row["flops_per_step"] < full["flops_per_step"]
        state = row["added_bytes"] + row["moments_bytes"] + row["gradient_bytes"]
        assert 24 <= state / row["trained"] <= 28  # the formula's: some keep a second position
    for method in ("column", "two_level"):
        assert rows[f"{method} eager"]["kept_bytes"] < rows["element eager"]["kept_bytes"]
        assert rows[f"{method} eager"]["flops_per_step"] < rows["element eager"]["flops_per_step"]
    page = benchmark("results").markdown(tmp_path)
    assert "Shape toy, 2 × 32 tokens, eager, 0.50% of the linear weights." in page
    assert page.count("| two-level |") == 1


def test_a_failed_case_says_why_and_what_is_done_is_not_done_again(
    here, benchmark, tmp_path, monkeypatch
):
    out = tmp_path / "sparse-cpu.json"
    measure, asked = here.measure, []

    def fails(case):
        asked.append(case.method)
        if case.method == "lora":
            raise RuntimeError("out of memory\nand more")
        return measure(case)

    command = [*OPTIONS, "--variants", "checkpointed", "--methods", "element", "lora"]
    monkeypatch.setattr(here, "measure", fails)
    here.main([*command, "--json", str(out)])
    assert rows_of(out)["lora checkpointed"]["failed"] == "RuntimeError: out of memory"
    assert "Failed: lora: RuntimeError: out of memory." in benchmark("results").markdown(tmp_path)
    monkeypatch.setattr(here, "measure", lambda case: asked.append(case.method) or measure(case))
    here.main([*command, "--json", str(out)])
    assert asked == ["element", "lora", "lora"]
    assert rows_of(out)["lora checkpointed"]["failed"] is None
    assert json.loads(out.read_text())["complete"] is True


def test_no_time_is_no_failure(here, tmp_path):
    out = tmp_path / "sparse-cpu.json"
    here.main([*OPTIONS, "--methods", "row", "--minutes", "0", "--json", str(out)])
    assert not out.exists()


def test_a_case_has_a_process_of_its_own(benchmark):
    sparse, cases = benchmark("sparse"), benchmark("sparse_cases")
    processes = sparse.Processes(0)
    options = {"shape": "toy", "method": "full", "variant": "eager", "device": "no such device"}
    case = cases.Case(**options, batch=1, length=8, density=0.1, steps=2, repeats=1)
    with pytest.raises(RuntimeError, match="no such device"):
        processes.run(cases.measure, case, seconds=120)
    processes.stop()
