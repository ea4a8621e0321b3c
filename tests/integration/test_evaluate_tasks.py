"""Saved models on suites and local tasks: results, the same again, compared, and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from samara.data.tokenizer import train_tokenizer
from samara.errors import CheckpointError, ConfigError, DataError
from samara.measure.paired import paired_report, paired_table
from samara.measure.task_evaluation import evaluate_tasks
from samara.measure.task_results import ITEMS_FILE, RESULTS_FILE, read_results, task_table
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM

pytest.importorskip("rouge_score")

TEXT = "the cat sat on mat dog ran over hill and back again number one two three"
WORDS = TEXT.split()
NUM_ROWS = 9


def text(draw: random.Random, least: int = 2, most: int = 8) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_random_model(folder: Path, *, seed: int) -> Path:
    """A layer-wise CoLA model with random weights, saved as a run saves it."""
    draw = random.Random(0)
    torch.manual_seed(seed)
    train_tokenizer([text(draw, 5, 30) for _ in range(200)], folder / "model", vocab_size=290)
    design = ModelConfig.model_validate(
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_query_heads": [2, 4],
            "num_kv_heads": [1, 2],
            "ffn_dim": [32, 48],
            "cola": {"rank": [8, 0]},
            "vocab_size": 290,
            "max_position_embeddings": 160,
        }
    )
    save_model(SamaraForCausalLM(SamaraConfig.from_design(design)), folder / "model")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_random_model(folder / "a", seed=1), save_random_model(folder / "b", seed=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of a data folder, without RACE."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(3)

    def choices(count: int, **more: str) -> list[dict[str, Any]]:
        return [
            {
                "question": text(draw),
                "choices": [text(draw, 1, 3) for _ in range(count)],
                "answer": draw.randrange(count),
                **more,
            }
            for _ in range(NUM_ROWS)
        ]

    for name in ("arc_challenge", "arc_easy"):
        write_rows(folder / name / "test.jsonl", choices(4))
        write_rows(folder / name / "train.jsonl", choices(4) * 3)
    for split in ("valid", "train"):
        rows = choices(2)
        write_rows(
            folder / "boolq" / f"{split}.jsonl",
            [{**row, "passage": text(draw), "answer": bool(row["answer"])} for row in rows],
        )
        write_rows(folder / "piqa" / f"{split}.jsonl", [{**r, "goal": text(draw)} for r in rows])
        write_rows(
            folder / "winogrande" / f"{split}.jsonl",
            [{**r, "sentence": f"{text(draw)} _ {text(draw)}"} for r in rows],
        )
    write_rows(
        folder / "hellaswag" / "valid_1000.jsonl",
        [{**row, "context": text(draw)} for row in choices(4) * 2],
    )
    write_rows(folder / "sciq" / "valid.jsonl", choices(4, support="Some support."))
    for split in ("test", "dev"):
        write_rows(folder / "mmlu" / f"{split}.jsonl", choices(4, subject="plane_geometry"))
    write_rows(
        folder / "truthfulqa" / "truthfulqa.jsonl",
        [
            {
                "question": text(draw),
                "correct_answers": [text(draw), text(draw)],
                "incorrect_answers": [text(draw)],
            }
            for _ in range(NUM_ROWS)
        ],
    )
    write_rows(
        folder / "crows_pairs" / "crows_pairs.jsonl",
        [{"sent_more": text(draw), "sent_less": text(draw)} for _ in range(30)],
    )
    return folder


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One task of each kind that suites do not have."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(4)
    labelled = [{"text": text(draw), "label": "ab"[n % 2]} for n in range(NUM_ROWS)]
    write_rows(folder / "labels.jsonl", labelled)
    (folder / "labels.yaml").write_text(
        json.dumps(
            {
                "name": "labels",
                "kind": "classification",
                "data": "labels.jsonl",
                "labels": {"a": "one", "b": "two three"},
                "num_fewshot": 2,
                "normalize": "tokens",
            }
        )
    )
    answered = [
        {"context": text(draw), "question": text(draw), "answers": [text(draw, 1, 1)]}
        for _ in range(NUM_ROWS)
    ]
    summed = [{"document": text(draw, 9, 20), "summary": text(draw)} for _ in range(NUM_ROWS)]
    files = [
        write_rows(folder / "pairs.jsonl", [{"good": text(draw), "bad": text(draw)}] * NUM_ROWS),
        write_rows(folder / "answers.jsonl", answered),
        write_rows(folder / "summaries.jsonl", summed),
        write_rows(folder / "texts.jsonl", [{"text": text(draw, 5, 400)} for _ in range(4)]),
    ]
    return [str(folder / "labels.yaml"), *map(str, files)]


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in ("seconds", "environment")}


def test_a_suite_is_run_as_the_paper_defines_it(models, data, tmp_path):
    summary = evaluate_tasks(
        models[0], suite="openelm-zero-shot", data_dir=data, out=tmp_path, device="cpu"
    )
    assert list(summary["tasks"]) == [
        "arc_challenge",
        "arc_easy",
        "boolq",
        "hellaswag",
        "piqa",
        "sciq",
        "winogrande",
    ]
    main = {name: task["metric"] for name, task in summary["tasks"].items()}
    assert main["arc_challenge"] == main["hellaswag"] == main["piqa"] == "acc_norm"
    assert main["arc_easy"] == main["boolq"] == main["sciq"] == main["winogrande"] == "acc"
    values = {name: summary["tasks"][name]["scores"][main[name]]["value"] for name in main}
    average = summary["averages"]["average"]
    assert average["value"] == pytest.approx(sum(values.values()) / 7)
    assert average["low"] <= average["value"] <= average["high"]
    del values["sciq"]
    assert summary["averages"]["average without sciq"]["value"] == pytest.approx(
        sum(values.values()) / 6
    )
    assert summary["not_run"] == {}
    assert json.loads((tmp_path / RESULTS_FILE).read_text()) == summary
    for name, task in summary["tasks"].items():
        assert task["num_items"] == task["num_rows"] == (18 if name == "hellaswag" else 9)
        assert task["num_fewshot"] == 0
        for score in task["scores"].values():
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1


def test_what_a_suite_lacks_is_listed_with_the_reason(models, data, tmp_path):
    summary = evaluate_tasks(models[0], suite="llm360", data_dir=data, out=tmp_path, limit=2)
    assert list(summary["not_run"]) == ["race"]
    assert summary["not_run"]["race"].startswith("no race/test.jsonl (nor .gz, .csv) in ")
    shots = {name: task["num_fewshot"] for name, task in summary["tasks"].items()}
    assert (shots["arc_challenge"], shots["crows_pairs_english"], shots["mmlu"]) == (25, 25, 5)
    assert (
        summary["tasks"]["crows_pairs_english"]["scores"]["pct_stereotype"]["better"] == "neither"
    )
    assert summary["averages"]["average"]["missing"] == ["race"]
    # 25 examples are longer than 160 tokens; HellaSwag has no file of examples here.
    assert summary["tasks"]["arc_challenge"]["num_truncated"] == 2
    assert summary["tasks"]["hellaswag"]["fewshot_data"] is None
    assert summary["tasks"]["mmlu"]["fewshot_data"]["path"].endswith("mmlu/dev.jsonl")
    table = task_table(summary)
    assert "not run: race: no race/test.jsonl" in table
    assert "arc_challenge: 2 of 2 prompts were longer than the model's context (160 tok" in table
    assert "hellaswag: solved examples come from the scored rows" in table
    assert "pct_stereotype (higher is not better)" in table


def test_local_tasks_of_every_kind_are_scored(models, local_tasks, tmp_path):
    summary = evaluate_tasks(models[0], tasks=local_tasks, out=tmp_path, device="cpu")
    scores = {name: set(task["scores"]) for name, task in summary["tasks"].items()}
    assert scores == {
        "labels": {"accuracy", "macro_f1", "macro_precision", "macro_recall"},
        "pairs": {"acc"},
        "answers": {"exact_match", "f1"},
        "summaries": {"rouge1", "rouge2", "rougeL"},
        "texts": {"perplexity", "word_perplexity", "bits_per_byte"},
    }
    perplexity = summary["tasks"]["texts"]["scores"]["perplexity"]
    assert 100 < perplexity["value"] < 900  # random weights, 290 tokens
    lines = [json.loads(line) for line in (tmp_path / ITEMS_FILE).read_text().splitlines()]
    assert len(lines) == sum(task["num_items"] for task in summary["tasks"].values())
    labelled = [line for line in lines if line["task"] == "labels"]
    assert {line["prediction"] for line in labelled} <= {"a", "b"}
    right = sum(line["prediction"] == line["gold"][0] for line in labelled)
    assert summary["tasks"]["labels"]["scores"]["accuracy"]["value"] == right / NUM_ROWS


def test_the_same_evaluation_gives_the_same_numbers(models, data, local_tasks, tmp_path):
    tasks = [*local_tasks, "winogrande"]
    runs = [
        evaluate_tasks(models[0], tasks=tasks, data_dir=data, out=tmp_path / name, num_fewshot=2)
        for name in ("one", "two")
    ]
    assert without_times(runs[0]) == without_times(runs[1])
    texts = [(tmp_path / name / ITEMS_FILE).read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_the_batch_size_changes_rounding_only(models, data, tmp_path):
    for size in (1, 8):
        evaluate_tasks(
            models[0], tasks=["arc_easy"], data_dir=data, out=tmp_path / str(size), batch_size=size
        )
    one, other = (read_results(tmp_path / str(size)).items["arc_easy"] for size in (1, 8))
    for left, right in zip(one, other, strict=True):
        assert left.details["loglikelihoods"] == pytest.approx(
            right.details["loglikelihoods"], abs=1e-4
        )


def test_two_models_are_compared_on_the_same_rows(models, data, local_tasks, tmp_path):
    for model, name in zip(models, ("a", "b"), strict=True):
        evaluate_tasks(
            model, tasks=[*local_tasks, "piqa"], data_dir=data, out=tmp_path / name, device="cpu"
        )
    report = paired_report(tmp_path / "a", tmp_path / "b")
    assert set(report["tasks"]) == {"labels", "pairs", "answers", "summaries", "texts", "piqa"}
    assert report["a"]["weights_hash"] != report["b"]["weights_hash"]
    allowed = {"better", "worse", "unresolved"}
    for task in report["tasks"].values():
        assert {score["verdict"] for score in task["scores"].values()} <= allowed
    same = paired_report(tmp_path / "a", tmp_path / "a")
    for task in same["tasks"].values():
        for score in task["scores"].values():
            assert score["verdict"] == "unresolved"
            assert score["difference"]["value"] == 0.0
    assert "average of 5" in paired_table(report)


def test_a_different_number_of_examples_is_not_compared(models, data, tmp_path):
    for shots in (0, 1):
        evaluate_tasks(
            models[0],
            tasks=["piqa"],
            data_dir=data,
            out=tmp_path / str(shots),
            num_fewshot=shots,
        )
    with pytest.raises(ConfigError, match=r"task 'piqa': .* \(num_fewshot differ\)"):
        paired_report(tmp_path / "0", tmp_path / "1")


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give a suite \(openelm-zero-shot, openllm, llm360\) or at least one task"),
        ({"suite": "openlm"}, r"suite 'openlm': unknown \(did you mean 'openllm'\?\)"),
        ({"tasks": ["arc_esy"]}, r"task 'arc_esy': unknown \(did you mean 'arc_easy'\?\)"),
        ({"tasks": ["arc_easy"]}, r"task 'arc_easy': give the folder with its files \(data_dir\)"),
        ({"tasks": ["race"], "data_dir": "data"}, r"task 'race': no race/test.jsonl \(nor .gz"),
        ({"tasks": ["piqa"], "data_dir": "none"}, r"data_dir: none: no such folder"),
        ({"tasks": ["piqa", "piqa"], "data_dir": "data"}, r"task 'piqa': asked for twice"),
        ({"suite": "openllm", "data_dir": "empty"}, r"data_dir: .* holds the files of none of the"),
        ({"tasks": ["piqa"], "data_dir": "data", "limit": 0}, r"limit: must be 1 or more, got 0"),
        ({"tasks": ["piqa"], "batch_size": 0}, r"batch_size: must be 1 or more, got 0"),
        ({"tasks": ["piqa"], "num_fewshot": -1}, r"num_fewshot: must be 0 or more, got -1"),
        ({"tasks": ["none.yaml"]}, r"none.yaml: no such file"),
        ({"tasks": ["none.jsonl"]}, r"none.jsonl: cannot be read: No such file"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(models, data, tmp_path, options, message):
    folders = {"data": data, "empty": tmp_path, "none": Path("none")}
    if "data_dir" in options:
        options = {**options, "data_dir": folders[options["data_dir"]]}
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        evaluate_tasks(models[0], out=tmp_path / "out", **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_answer_longer_than_the_context_is_one_clear_line(models, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"context": "a", "question": "b", "answers": ["c"]}])
    task = tmp_path / "task.yaml"
    task.write_text("{name: t, kind: question, data: rows.jsonl, max_new_tokens: 160}")
    with pytest.raises(ConfigError, match=r"max_new_tokens: 160 leaves no room for a prompt"):
        evaluate_tasks(models[0], tasks=[str(task)], out=tmp_path / "out")


def test_a_choice_longer_than_the_context_is_one_clear_line(models, tmp_path):
    row = {"question": "Q", "choices": ["a", "number " * 300], "answer": 0}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=r"the model's context holds 160, so it cannot be scored"):
        evaluate_tasks(models[0], tasks=[str(path)], out=tmp_path / "out")


def _spoil(model: Path, folder: Path, kind: str) -> Path:
    """A copy of a model with one thing wrong."""
    for file in (model / "model").iterdir():
        if not (kind == "tokenizer" and file.name.startswith("tokenizer")):
            (folder / file.name).write_bytes(file.read_bytes())
    if kind == "weights":
        (folder / "model.safetensors").unlink()
    if kind == "config":
        (folder / "config.json").unlink()
    if kind == "type":
        (folder / "config.json").write_text('{"model_type": "nonsense"}')
    if kind == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tokenizer", r"holds no tokenizer; copy the tokenizer files of the model into it"),
        ("broken tokenizer", r"its tokenizer cannot be loaded"),
        ("weights", r"model.safetensors: no such file; the checkpoint is incomplete"),
        ("config", r"holds no config.json, so it is no saved model"),
        ("type", r"cannot be loaded"),
    ],
)
def test_a_spoilt_model_is_one_clear_line(models, data, tmp_path, kind, message):
    (tmp_path / "model").mkdir()
    model = _spoil(models[0], tmp_path / "model", kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        evaluate_tasks(model, tasks=["piqa"], data_dir=data, out=tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1


def test_no_model_at_all_is_one_clear_line(data, tmp_path):
    with pytest.raises(CheckpointError, match="none: no such folder; give a folder with a saved"):
        evaluate_tasks(tmp_path / "none", tasks=["piqa"], data_dir=data, out=tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_one_clear_line(models, data, tmp_path):
    with pytest.raises(ConfigError, match="device: 'cuda' was asked for, this machine has none"):
        evaluate_tasks(models[0], tasks=["piqa"], data_dir=data, out=tmp_path, device="cuda")
