"""Our way of asking a model against the lm-evaluation-harness's own Hugging Face backend.

The same Llama checkpoint through both: log-likelihoods to 1e-4 per item, equal greedy answers, and
one task run by both from one file to the same scores.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from samara.data.tokenizer import train_tokenizer
from samara.errors import ConfigError
from samara.measure.harness import (
    GenerationRequest,
    evaluate_with_harness,
    generation_request,
    harness_model,
)
from samara.measure.language_model import LanguageModel
from samara.measure.language_model_folder import open_language_model
from samara.measure.task_evaluation import evaluate_tasks

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 48
TEXT = "the cat sat on mat dog ran over hill é 日本 numbers 12 x\n y\n\nz"
WORDS = TEXT.split(" ")
ENDINGS = ("", " ", "\n", "  \n")


def sentences(count: int, *, least: int, most: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(least, most))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, as a checkpoint of the kind that `samara convert --to llama` writes."""
    path = tmp_path_factory.mktemp("llama") / "llama"
    train_tokenizer(sentences(200, least=3, most=20, seed=9), path, vocab_size=290)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=290,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> LanguageModel:
    return open_language_model(folder, device="cpu", batch_size=7).language_model


def theirs(folder: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **options)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, 0) for argument in arguments]


def test_log_likelihoods_are_the_harness_s(ours: LanguageModel, folder: Path):
    draw = random.Random(1)
    contexts = [text + draw.choice(ENDINGS) for text in sentences(60, least=0, most=40, seed=2)] + [
        "",
        " ",
        "the",
    ]
    continuations = [
        draw.choice(["", " "]) + text for text in sentences(63, least=1, most=5, seed=3)
    ]
    pairs = list(zip(contexts, continuations, strict=True))
    expected = theirs(folder).loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    scores = ours.loglikelihood(contexts, continuations)
    for score, (likelihood, is_greedy) in zip(scores, expected, strict=True):
        assert score.loglikelihood == pytest.approx(likelihood, abs=1e-4)
        assert score.is_greedy == is_greedy
    assert sum(score.is_truncated for score in scores) > 5


def test_rolling_log_likelihoods_are_the_harness_s(ours: LanguageModel, folder: Path):
    texts = sentences(12, least=1, most=80, seed=4)
    expected = theirs(folder, add_bos_token=False).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    scores = ours.loglikelihood_rolling(texts)
    assert max(score.num_tokens for score in scores) > 2 * LENGTH
    # Up to three windows, each within 1e-4.
    assert [score.loglikelihood for score in scores] == pytest.approx(expected, abs=3e-4)


def test_greedy_answers_are_the_harness_s(ours: LanguageModel, folder: Path):
    settings = {"until": ["\n", "at"], "max_gen_toks": 10, "do_sample": False}
    contexts = sentences(12, least=1, most=40, seed=5)
    expected = theirs(folder).generate_until(
        requests("generate_until", [(text, dict(settings)) for text in contexts]),
        disable_tqdm=True,
    )
    written = harness_model(ours).generate_until(
        requests("generate_until", [(text, dict(settings)) for text in contexts])
    )
    assert written == expected
    assert len(set(written)) > 3


def test_one_task_scores_the_same_through_both_and_through_us(
    ours: LanguageModel, folder: Path, tmp_path: Path
):
    rows = [
        {
            "question": question,
            "choices": sentences(3, least=1, most=4, seed=100 + number),
            "answer": number % 3,
        }
        for number, question in enumerate(sentences(24, least=2, most=12, seed=6))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data), "train": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "multiple_choice",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(settings))
    adapted = evaluate_with_harness(ours, tasks=["mine"], folder=tmp_path, num_fewshot=1)

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected = simple_evaluate(
        model=theirs(folder), tasks=["mine"], task_manager=manager, num_fewshot=1
    )
    shots = tmp_path / "shots.jsonl"
    shots.write_text(data.read_text())
    (tmp_path / "task.yaml").write_text(
        json.dumps(
            {
                "name": "mine",
                "kind": "multiple_choice",
                "data": "rows.jsonl",
                "fewshot_data": "shots.jsonl",
                "num_fewshot": 1,
            }
        )
    )
    local = evaluate_tasks(folder, tasks=[str(tmp_path / "task.yaml")], out=tmp_path / "out")
    for metric in ("acc", "acc_norm"):
        value = expected["results"]["mine"][f"{metric},none"]
        assert adapted["results"]["mine"][f"{metric},none"] == value
        assert local["tasks"]["mine"]["scores"][metric]["value"] == pytest.approx(value)
    for one, other in zip(adapted["samples"]["mine"], expected["samples"]["mine"], strict=True):
        assert one["arguments"] == other["arguments"]
        found = [float(response[0][0]) for response in one["resps"]]
        wanted = [float(response[0][0]) for response in other["resps"]]
        assert found == pytest.approx(wanted, abs=1e-4)


def test_an_unknown_harness_task_is_refused(ours: LanguageModel, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(ConfigError, match=r"task 'mone': .* has none of that name \(did you mean"):
        evaluate_with_harness(ours, tasks=["mone"], folder=tmp_path)


def test_a_missing_harness_is_named_with_its_extra(ours: LanguageModel, monkeypatch):
    from samara.measure import harness

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    harness._harness_class.cache_clear()
    with pytest.raises(ConfigError, match=r"needs the package lm-eval; pip install 'samara\[eval"):
        harness_model(ours)


@pytest.mark.parametrize(
    ("settings", "stop", "count", "options"),
    [
        ({}, [], 256, {}),
        ({"until": "\n", "max_gen_toks": 5, "temperature": 0.0}, ["\n"], 5, {}),
        ({"until": ["a", ""], "max_tokens": 6, "do_sample": False, "top_p": 0.9}, ["a"], 6, {}),
        (
            {"do_sample": True, "temperature": 0.7, "max_new_tokens": 3},
            [],
            3,
            {"do_sample": True, "temperature": 0.7},
        ),
        ({"temperature": 0.7}, [], 256, {}),
    ],
)
def test_the_harness_s_generation_settings_are_read(settings, stop, count, options):
    assert generation_request(settings) == GenerationRequest(
        stop=tuple(stop), max_new_tokens=count, options=options
    )
