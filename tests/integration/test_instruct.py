"""Instruction tuning: a tiny model learns to answer and to stop; what is wrong is said."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from samara.config import validate
from samara.data.prepare import PreparedCorpus
from samara.errors import ConfigError, DataError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import RunFolder, hash_file, read_json
from samara.train import pretrain as pretrain_module
from samara.train.config import InstructConfig
from samara.train.instruct import instruct

PLACES = {"Ada": "root", "Bo": "path", "Cy": "file", "Di": "line", "Ed": "list", "Flo": "date"}
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "answers.py"

FRAMES = (
    "Where is {}?",
    "Find {}.",
    "Tell me where {} is.",
    "{}: where?",
    "And {}?",
    "Look for {}",
)


def answer(name: str) -> str:
    return f"{name} is in the {PLACES[name]}."


def write_chats(path: Path) -> Path:
    """36 questions with their answers, in two of the forms that are read."""
    with path.open("w", encoding="utf-8") as file:
        for number, (frame, name) in enumerate(itertools.product(FRAMES, PLACES)):
            question, reply = frame.format(name), answer(name)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            plain = {"instruction": question, "output": reply}
            file.write(json.dumps({"messages": turns} if number % 2 else plain) + "\n")
    return path


@pytest.fixture(scope="module")
def base(small_corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with a tokenizer, whose configuration names no special tokens."""
    torch.manual_seed(0)
    design = ModelConfig.model_validate(
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "ffn_dim": 128,
            "vocab_size": small_corpus.vocab_size,
            "max_position_embeddings": 128,
        }
    )
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(SamaraForCausalLM(SamaraConfig.from_design(design)), folder)
    shutil.copytree(small_corpus.tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture
def settings(base: Path, chats: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives the settings of a run of six steps; ``data`` lays over the data's."""

    def make(*, data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        return {
            "init_from": str(base),
            "data": {
                "paths": [str(chats)],
                "validation_fraction": 0.2,
                "sequence_length": 128,
                **(data or {}),
            },
            "optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.0},
            "training": {
                "max_steps": 6,
                "batch_size": 4,
                "precision": "float32",
                "device": "cpu",
                "evaluate_every_steps": 3,
            },
            "checkpoint": {"every_steps": 2, "keep_last": 1},
            "logging": {"every_steps": 1, "device_profile": "cpu-2core"},
            **changes,
        }

    return make


def run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    result = RunFolder(folder)
    instruct(validate(InstructConfig, settings), result)
    return result


@pytest.fixture(scope="module")
def tuned() -> dict[str, RunFolder]:
    """Nothing yet: filled by the first test that needs the tuned model."""
    return {}


@pytest.fixture
def tuned_run(
    tuned: dict[str, RunFolder],
    settings: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """A run long enough to learn the answers, made once."""
    if not tuned:
        changed = settings()
        changed["training"] |= {"max_steps": 50, "batch_size": 8, "evaluate_every_steps": 25}
        tuned["run"] = run(tmp_path_factory.mktemp("tuned") / "run", changed)
    return tuned["run"]


def test_a_model_learns_to_answer_and_to_stop(tuned_run: RunFolder) -> None:
    result = tuned_run
    summary = read_json(result.path / "summary.json")
    assert summary["validation_loss"] < 0.3

    # Only what travels with the model folder is used: template, end mark, generation settings.
    model = AutoModelForCausalLM.from_pretrained(result.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.path / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    right = 0
    for frame, name in itertools.product(FRAMES, PLACES):
        turns = [{"role": "user", "content": frame.format(name)}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0]
        said = output[inputs["input_ids"].shape[1] :]
        assert said[-1] == tokenizer.eos_token_id, "does not stop"
        right += tokenizer.decode(said, skip_special_tokens=True) == answer(name)
    assert right >= 33  # of 36, some of them never seen


def test_the_script_compares_before_and_after(
    tuned_run: RunFolder,
    base: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [str(base), str(tuned_run.path)]
    options = ["--max-conversations", "12", "--max-new-tokens", "30", "--sequence-length", "96"]
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *models, "--data", str(chats), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")

    before, after = json.loads(capsys.readouterr().out)["models"].values()
    assert before["answers"] == after["answers"] == 12
    assert after["ended_share"] == 1.0
    assert before["ended_share"] < 0.5
    assert after["loss_on_answers"] < 0.3 < 3.0 < before["loss_on_answers"]
    assert after["shown"][0]["answer"] == answer("Ada")


def test_what_the_run_records(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = run(tmp_path / "run", settings())

    data = read_json(result.path / "data.json")
    total = data["train"]["conversations"] + data["validation"]["conversations"]
    assert total == 36
    assert 0 < data["validation"]["conversations"] < 18
    assert result.lineage().parents["data"] == data["hash"]
    assert "init_from" in result.lineage().parents
    assert [r["step"] for r in result.metrics() if "validation_loss" in r] == [3, 6]


def test_stopped_and_gone_on_with_is_the_same(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(tmp_path / "straight", settings())

    def interrupted(steps: Iterator[Any]) -> Iterator[Any]:
        yield from itertools.islice(steps, 3)
        raise KeyboardInterrupt

    batches = pretrain_module.training_batches
    with monkeypatch.context() as patch:
        patch.setattr(
            pretrain_module, "training_batches", lambda *a, **k: interrupted(batches(*a, **k))
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", settings())
    assert not (tmp_path / "run" / "model").exists()
    again = run(tmp_path / "run", settings())

    for name in ("model/model.safetensors", "model/chat_template.jinja", "data.json"):
        assert hash_file(again.path / name) == hash_file(straight.path / name)
    losses = [[r.get("loss") for r in x.metrics() if "loss" in r] for x in (straight, again)]
    assert losses[0] == losses[1]


def test_validation_files_are_held_out(
    settings: Callable[..., dict[str, Any]], chats: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(chats.read_text().splitlines(keepends=True)[:5]))
    data = {"paths": [str(chats), str(held)], "validation_paths": [str(held)]}
    result = run(tmp_path / "run", settings(data=data))

    found = read_json(result.path / "data.json")
    assert found["train"]["conversations"] == 36
    assert found["validation"]["conversations"] == 5


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"instruction": "a", "output": "b"}', '{"instruction": "a"}'], r"c\.jsonl:2: no field"),
        (['{"messages": []}'], r"c\.jsonl:1: field 'messages' holds"),
        (["{"], r"c\.jsonl:1: not valid JSON"),
        ([], r"data\.paths: gives no conversation with an answer"),
        (['{"instruction": "a", "output": " "}'], r"data\.paths: gives no conversation"),
        (
            ['{"instruction": "a", "output": "b"}'],
            r"data\.validation_fraction: gives no conversation",
        ),
        (
            ['{"instruction": "a", "output": "' + "long " * 100 + '"}'],
            r"c\.jsonl:1: the conversation has \d+ tokens, more than data\.sequence_length 128",
        ),
    ],
)
def test_records(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, lines: list[str], message: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(lines))
    data = {"paths": [str(path)], "too_long": "refuse", "validation_fraction": 1e-9}
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / "run", settings(data=data))
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("hello")
    with pytest.raises(DataError, match=r"data\.paths: '.*c\.txt' is no JSON Lines file"):
        run(tmp_path / "run", settings(data={"paths": [str(tmp_path / "c.txt")]}))


def test_a_sequence_longer_than_the_context(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 129 exceeds the 128 positions"):
        run(tmp_path / "run", settings(data={"sequence_length": 129}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "init_from: .*no tokenizer.json"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
            "init_from: .*has no eos_token",
        ),
    ],
)
def test_a_model_without_a_fitting_tokenizer(
    settings: Callable[..., dict[str, Any]],
    base: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", settings(init_from=str(copy)))


def test_a_tokenizer_with_more_entries_than_the_model(
    settings: Callable[..., dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    path = copy / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 300, "content": "<|more|>"})
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="has 301 entries, the model's embedding 300"):
        run(tmp_path / "run", settings(init_from=str(copy)))
