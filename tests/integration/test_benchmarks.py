"""Benchmarks run at toy size and keep every case; the results page is made of what is kept.

The inference benchmark's switch changes the kernel, not the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inference(benchmark) -> Any:
    return benchmark("inference")


def test_the_smoke_run_measures_every_design(inference, tmp_path, capsys):
    inference.main(["--smoke", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    table = capsys.readouterr().out.splitlines()
    # three designs with two norms and llama, two caches, two batch sizes
    assert len(written["rows"]) == len(table) - 1 == 7 * 2 * 2
    assert {row["design"] for row in written["rows"]} == set(inference.DESIGNS)
    assert written["command"] == "python benchmarks/inference.py --smoke"
    assert written["complete"] is True
    assert written["environment"]["commit"]
    assert written["environment"]["device"]
    for row in written["rows"]:
        assert row["decode_tokens_per_second"] > 0
        assert row["prefill_tokens_per_second"] > 0
        assert row["cache_bytes"] > 0


def test_the_smoke_run_on_cpu_measures_every_format_and_layout(benchmark, tmp_path, capsys):
    pytest.importorskip("torchao")
    before = torch.get_num_threads()
    benchmark("inference_cpu").main(["--smoke", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    # three designs in two layouts of two formats, and int8
    assert len(written["rows"]) == len(capsys.readouterr().out.splitlines()) - 1 == 3 * 5
    assert written["complete"] is True
    assert torch.get_num_threads() == before
    for row in written["rows"]:
        assert row["decode_seconds_per_token"] > 0
        assert row["slowest_round"] >= 1
        assert (row["error"] < 1e-5) == (row["format"] == "float32")
    bytes_of = {(row["design"], row["format"]): row["weights_bytes"] for row in written["rows"]}
    for design in ("uniform", "cola", "layer-wise"):
        assert bytes_of[design, "int8"] < bytes_of[design, "bfloat16"]
        assert bytes_of[design, "bfloat16"] < bytes_of[design, "float32"]


def test_the_uniform_design_has_the_parameters_of_the_layer_wise_one(inference):
    sizes = {}
    for design in ("layer-wise", "uniform", "llama"):
        model = inference.make_model(
            inference.SIZES["small"], design, device=torch.device("meta"), dtype=torch.float32
        )
        sizes[design] = model.num_parameters()
    assert max(sizes.values()) / min(sizes.values()) < 1.01


def test_the_naive_norm_gives_the_same_numbers_and_is_taken_back(inference):
    model = inference.make_model(
        inference.SIZES["toy"], "layer-wise", device=torch.device("cpu"), dtype=torch.float32
    )
    ids, own = torch.arange(12)[None], inference.RMSNorm.forward
    with torch.no_grad():
        expected = model(ids).logits
        with inference.norm_kernel("naive"):
            assert inference.RMSNorm.forward is inference.naive_norm
            torch.testing.assert_close(model(ids).logits, expected)
    assert inference.RMSNorm.forward is own


def test_operators_are_counted_inside_composed_ones_and_views_are_not(inference):
    linear = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad(), inference.CountOperators() as counter:
        torch.nn.functional.silu(linear(torch.ones(1, 4)).view(2, 2)) + 1
    assert counter.count == 4  # ones, product, silu, sum


def test_what_was_measured_is_kept_when_the_machine_goes(benchmark, tmp_path):
    path = tmp_path / "out.json"
    record = benchmark("record").Record(
        path,
        script="benchmarks/some.py",
        arguments=["--a", "1", "--json", str(path), "b", f"--json={path}"],
        device="cpu",
        settings={"a": 1, "json": path},
    )
    for number in (1, 2):
        record.add({"case": number})
        written = json.loads(path.read_text())
        assert written["rows"] == record.rows == [{"case": k + 1} for k in range(number)]
        assert written["complete"] is False
    assert written["command"] == "python benchmarks/some.py --a 1 b"
    assert written["settings"] == {"a": 1}
    record.finish()
    assert json.loads(path.read_text()) == {**written, "complete": True}


def test_flops_of_a_recipe_are_counted_without_computing_any(benchmark, tmp_path, capsys):
    out = tmp_path / "flops.json"
    recipe = str(ROOT / "recipes" / "cola-60m.yaml")
    benchmark("flops").main([recipe, "--length", "64", "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["parameters"]["predicted"] == row["parameters"]["measured"]
    flops = row["training_flops_per_token"]
    assert flops["predicted"] == flops["measured"]
    assert "cola-60m" in capsys.readouterr().out


def test_the_memory_benchmark_measures_a_case_in_a_process_of_its_own(
    benchmark, tmp_path, monkeypatch, capsys
):
    memory = benchmark("memory")
    out = tmp_path / "memory.json"
    peaks = []
    monkeypatch.setattr(memory, "in_fresh_process", lambda *a, **k: peaks.append(a) or 10**8)
    memory.main(["--only", "uniform", "cola", "--json", str(out)])
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["rows"]] == ["uniform", "cola"]
    assert {row["measured"] for row in written["rows"]} == {10**8}
    assert len(peaks) == 4  # two heaps each
    with pytest.raises(SystemExit):
        memory.main(["--only", "uniforn"])
    assert "--only uniforn: no such case; there are uniform," in capsys.readouterr().err


@pytest.mark.parametrize("model", ["llama-lora", "samara"])
def test_the_layer_dropout_benchmark_trains_every_model(benchmark, model):
    dropout = benchmark("layer_dropout")
    for method in (dropout.METHODS[0], dropout.METHODS[2]):
        found = dropout.train_case(
            model, method, dropout.SIZES["toy"], "cpu", steps=1, saved=not method.checkpointing
        )
        assert found["mean_active_layers"] == (4 if method.layer_dropout is None else 2)
        assert found["saved_bytes"] > 0


def test_the_layer_dropout_benchmark_measures_every_way_to_train(
    benchmark, tmp_path, monkeypatch, capsys
):
    dropout, results = benchmark("layer_dropout"), benchmark("results")

    def in_this_process(name: str, method: Any, *, size: str, device: str, steps: int) -> Any:
        return dropout.measure(name, method, dropout.SIZES[size], device, steps)

    monkeypatch.setattr(dropout, "in_fresh_process", in_this_process)
    monkeypatch.setattr("samara.train.memory._return_freed_memory", lambda: None)  # slow
    out = tmp_path / "layer_dropout-cpu.json"
    dropout.main(["--size", "toy", "--steps", "2", "--models", "bert-lora", "--json", str(out)])
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    kept = [
        rows[name]["saved_bytes"]
        for name in ("all layers", *(f"dropout {r}, budgeted" for r in (0.25, 0.5, 0.75)))
    ]
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == len(dropout.METHODS)
    assert kept[0] - kept[1] == pytest.approx(kept[2] - kept[3], rel=0.1)
    assert rows["dropout 0.5, budgeted"]["mean_active_layers"] == 2
    assert rows["checkpointing"]["saved_bytes"] is None
    assert all(row["step_seconds"] > 0 for row in rows.values())
    assert "| bert-lora, dropout 0.5, budgeted | 2.0 |" in results.markdown(tmp_path)


def test_the_results_page_is_made_of_the_committed_figures(benchmark):
    results = benchmark("results")
    assert results.PAGE.read_text(encoding="utf-8") == results.markdown()
    results.main(["--check"])


def test_a_file_goes_to_the_section_of_its_name(benchmark, inference, tmp_path):
    results, folder = benchmark("results"), tmp_path / "figures"
    inference.main(["--smoke", "--designs", "cola", "--json", str(folder / "inference-toy.json")])
    page = results.markdown(folder)
    assert "`python benchmarks/inference.py --smoke --designs cola`" in page
    assert page.count("| cola | naive | static | 2 |") == 1
    assert "cut short" not in page
    cut = json.loads((folder / "inference-toy.json").read_text())
    cut["complete"], cut["environment"]["commit"] = False, None
    (folder / "inference-toy.json").write_text(json.dumps(cut))
    assert "commit not recorded; cut short: not all cases ran.*" in results.markdown(folder)
    (folder / "speed-toy.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"speed-toy\.json: its name begins with none of flops"):
        results.markdown(folder)


def test_a_page_that_is_not_up_to_date_is_told(benchmark, tmp_path, monkeypatch):
    results = benchmark("results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    with pytest.raises(SystemExit, match=r"results\.md: is not what .* run `python"):
        results.main(["--check"])
    results.main([])
    results.main(["--check"])


def test_a_picture_that_is_not_up_to_date_is_told(benchmark, tmp_path, monkeypatch):
    results = benchmark("results")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    results.main([])
    (tmp_path / "growth-lag.svg").write_text("<svg/>")
    with pytest.raises(SystemExit, match=r"growth-lag\.svg: is not what .* run `python"):
        results.main(["--check"])


def test_memory_of_one_device_in_two_files_is_one_table(benchmark, tmp_path):
    results = benchmark("results")
    cut, rest, other = (
        json.loads((results.FOLDER / f"memory-{name}.json").read_text())
        for name in ("cuda", "cuda-more", "cpu")
    )
    for name, data in (("cuda", cut), ("cuda-more", rest), ("cpu", other)):
        (tmp_path / f"memory-{name}.json").write_text(json.dumps(data))
    page = results.markdown(tmp_path)
    assert page.count("| case |") == page.count("The largest error is") == 2
    assert page.index("| cola | 8 × 256 | 983 |") > page.index("| llama | 8 × 256 | 1,033 |")
    assert "`python benchmarks/memory.py --device cuda` (cut short), `python" in page
    assert page.count("Not measured on this device: uniform bf16; llama checkpointed; ") == 1
    (tmp_path / "memory-cuda-more.json").unlink()
    assert "; cut short: not all cases ran.*" in results.markdown(tmp_path)


def test_where_the_figures_were_written_to_is_not_part_of_the_command(benchmark):
    data = {
        "command": "python benchmarks/some.py --size a --json /there/out.json --repeats 3",
        "environment": {"cpu": "a CPU", "packages": {"torch": "2"}, "commit": "c"},
    }
    line = benchmark("markdown_parts").origin(data)
    assert line == "*`python benchmarks/some.py --size a --repeats 3`; a CPU; torch 2; commit c.*"


def test_the_demo_is_collected_from_what_its_stages_wrote(benchmark, tmp_path):
    run, out = tmp_path / "run", tmp_path / "evaluation-demo.json"
    bounds = {"value": 2.0, "low": 1.5, "high": 2.5}
    scores = {"weights_hash": "w", "loss": bounds, "perplexity": bounds, "bits_per_byte": bounds}
    difference = {"baseline": "a", "model": "b", "loss_difference": bounds, "verdict": "worse"}
    files = {
        "recipe.yaml": {"name": "quickstart"},
        "a/summary.json": {"weights_hash": "w", "parameters": 3_000_000, "tokens": 5000},
        "data/summary.json": {"documents": 1},
        "evaluation/environment.json": {
            "cpu": "a CPU",
            "cpu_count": 2,
            "commit": "c",
            "packages": {"torch": "2"},
        },
        "evaluation/results.json": {
            "corpus_hash": "h",
            "split": "validation",
            "confidence": 0.95,
            "num_documents": 7,
            "num_tokens": 900,
            "models": {"a": scores, "b": {**scores, "weights_hash": "other"}},
            "comparisons": [difference],
        },
    }
    demo = benchmark("demo")
    with pytest.raises(SystemExit):
        demo.main([str(tmp_path), "--json", str(out)])
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps(content))
    demo.main([str(run), "--json", str(out)])
    page = benchmark("results").markdown(tmp_path)
    assert "7 validation documents, 900 tokens; 95% intervals" in page
    assert "| a | 3.00 | – | 5.00 | 2.000 [1.500, 2.500] |" in page
    assert "| b | – | – | – | 2.000 [1.500, 2.500] |" in page
    assert "| 2.000 [1.500, 2.500] worse |" in page
    assert "*`samara run recipes/quickstart.yaml`; a CPU, 2 cores; torch 2; commit c.*" in page


def test_a_part_of_nothing_is_a_dash(benchmark):
    parts = benchmark("markdown_parts")
    assert (parts.error(2.0, 0), parts.ratio(2.0, 0)) == ("–", "–")
    assert (parts.error(2.2, 2.0), parts.ratio(1.0, 2.0)) == ("+10.0%", "0.50")
