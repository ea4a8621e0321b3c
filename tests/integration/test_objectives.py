"""Masked language modelling and UL2 through the verb: they learn, resume bit for bit, and load."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

import samara  # noqa: F401 # registers the models
from samara.config import validate
from samara.data.loader import training_batches
from samara.data.objective_rows import objective_rows, objective_tokenizer
from samara.data.objectives import MaskedObjective, UL2Objective
from samara.data.prepare import PreparedCorpus
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX
from samara.errors import CheckpointError, ConfigError, Stopped
from samara.measure.loss import evaluate_loss
from samara.model.loading import load_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.runs import RunFolder, hash_file, read_json
from samara.train import pretrain as pretrain_module
from samara.train.checkpoint import TrainingState
from samara.train.config import AdamW, PretrainConfig
from samara.train.loop import Hooks, train
from samara.train.objective import MaskedLMByLogits
from samara.train.optim import Optimizer
from samara.train.pretrain import pretrain

Settings = Callable[..., dict[str, Any]]

OBJECTIVES = [{"kind": "masked_lm"}, {"kind": "ul2"}]
TIMING = {"tokens_per_second", "mfu", "memory_bytes", "seconds"}


def run(folder: Path, settings: dict[str, Any]) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    result = RunFolder(folder)
    pretrain(validate(PretrainConfig, settings, path="pretrain"), result)
    return result


def content(result: RunFolder) -> dict[str, Any]:
    last = sorted((result.path / "checkpoints").iterdir())[-1]
    files = [result.path / "model" / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    return {
        "files": {f"{f.parent.name}/{f.name}": hash_file(f) for f in files},
        "metrics": [
            {key: value for key, value in record.items() if key not in TIMING}
            for record in result.metrics()
        ],
    }


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    show_progress = pretrain_module._progress

    def progress(line: Any, start: TrainingState) -> Callable[..., None]:
        show = show_progress(line, start)

        def on_step(state: TrainingState, *arguments: Any) -> None:
            show(state, *arguments)
            if state.step == step:
                signal.raise_signal(signal.SIGTERM)

        return on_step

    monkeypatch.setattr(pretrain_module, "_progress", progress)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o["kind"])
def test_resumes_bit_for_bit_in_a_later_epoch(
    objective: dict[str, Any],
    pretrain_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch is as large as several steps to an epoch: noise differs from pass to pass."""
    settings = pretrain_settings(
        objective=objective, training__batch_size=64, training__micro_batch_size=32
    )
    straight = content(run(tmp_path / "straight", settings))
    for step in (3, 10):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped):
                run(tmp_path / "run", settings)
    assert content(run(tmp_path / "run", settings)) == straight


def test_masked_lm_makes_a_bidirectional_model(
    pretrain_settings: Settings, small_corpus: PreparedCorpus, tmp_path: Path
) -> None:
    objective = {"kind": "masked_lm", "max_predictions": 4, "mask_sets": 10}
    settings = pretrain_settings(objective=objective, training__max_steps=40)
    result = run(tmp_path / "run", settings)

    summary = read_json(result.path / "summary.json")
    assert summary["objective"] == "masked_lm"
    assert summary["validation_loss"] < math.log(small_corpus.vocab_size) - 1
    model = AutoModelForMaskedLM.from_pretrained(result.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.path / "model")
    assert model.config.vocab_size == len(tokenizer) == small_corpus.vocab_size + 1
    ids = tokenizer(f"open the {tokenizer.mask_token} and read", return_tensors="pt")
    assert (ids["input_ids"] == tokenizer.mask_token_id).sum() == 1
    assert torch.isfinite(model(**ids).logits).all()
    with pytest.raises(CheckpointError, match="a causal language model cannot be bidirectional"):
        load_model(result.path / "model")


def test_ul2_makes_a_decoder_with_modes_and_sentinels(
    pretrain_settings: Settings, small_corpus: PreparedCorpus, tmp_path: Path
) -> None:
    settings = pretrain_settings(objective={"kind": "ul2"}, training__max_steps=40)
    result = run(tmp_path / "run", settings)

    summary = read_json(result.path / "summary.json")
    assert summary["objective"] == "ul2"
    assert summary["validation_loss"] < math.log(small_corpus.vocab_size) - 1
    model = AutoModelForCausalLM.from_pretrained(result.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.path / "model")
    assert model.config.vocab_size == len(tokenizer)
    prompt = tokenizer("[S2S]open the file<extra_id_0>", return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    text = model.generate(**prompt, prefix_length=torch.tensor([length]), max_new_tokens=4)
    assert text.shape[1] > length


@pytest.mark.parametrize("objective", [MaskedObjective(), UL2Objective()])
def test_validation_rows_are_the_same_for_every_seed_and_are_the_unit(
    objective: MaskedObjective | UL2Objective,
    pretrain_settings: Settings,
    small_corpus: PreparedCorpus,
    tmp_path: Path,
) -> None:
    settings = pretrain_settings(objective=objective.model_dump(), training__max_steps=1)
    folder = run(tmp_path / "run", settings).path
    saved = AutoModelForMaskedLM if isinstance(objective, MaskedObjective) else AutoModelForCausalLM
    model = saved.from_pretrained(folder / "model")
    rows = objective_rows(
        objective,
        small_corpus.tokens("validation"),
        TextTokenizer.load(folder / "model"),
        sequence_length=32,
    )
    options = {"device": torch.device("cpu"), "precision": "float32"}
    result = evaluate_loss(model, rows, batch_size=3, **options)
    assert result.loss == pytest.approx(read_json(folder / "summary.json")["validation_loss"])
    assert len(result.nll_sum) == len(rows)
    counted = rows.batch(range(len(rows)))["targets"] != IGNORE_INDEX
    assert result.num_targets.tolist() == counted.sum(1).tolist()
    assert math.isnan(result.bits_per_byte)
    part = evaluate_loss(model, rows, batch_size=3, max_tokens=64, **options)
    assert part.nll_sum == pytest.approx(result.nll_sum[:2], rel=1e-5)


def test_goes_on_from_a_masked_model(
    pretrain_settings: Settings, small_corpus: PreparedCorpus, tmp_path: Path
) -> None:
    objective = {"kind": "masked_lm"}
    first = run(tmp_path / "first", pretrain_settings(objective=objective, training__max_steps=2))
    settings = pretrain_settings(objective=objective, model=None, training__max_steps=2)
    settings["init_from"] = str(first.path)
    model = load_model(run(tmp_path / "b", settings).path / "model", model_class=SamaraForMaskedLM)
    assert model.config.attention == "bidirectional"
    settings["objective"] = {"kind": "causal_lm"}
    with pytest.raises(ConfigError, match=r"init_from: the tokenizer of .* is not that of"):
        run(tmp_path / "c", settings)


def test_causal_runs_need_no_tokenizer_of_their_own(
    pretrain_settings: Settings, tmp_path: Path
) -> None:
    result = run(tmp_path / "run", pretrain_settings(training__max_steps=1))
    assert not (result.path / "tokenizer").exists()
    assert read_json(result.path / "summary.json")["objective"] == "causal_lm"


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "masked"}, r"pretrain\.objective\.kind: unknown value 'masked' .*masked_lm"),
        ({"kind": "ul2", "weights": {"S": 1}}, r"pretrain\.objective\.*: .*no denoiser 'S'"),
        ({"kind": "ul2", "wieghts": {}}, r"pretrain\.objective\.wieghts: unknown key.*weights"),
    ],
)
def test_wrong_settings_are_refused(
    objective: dict[str, Any], message: str, pretrain_settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", pretrain_settings(objective=objective))


def test_bert_of_hugging_face_learns_in_the_same_loop(
    small_corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """Post-norm, with its own head, on one document a row; the loss is that of its labels."""
    objective = MaskedObjective(rows="documents")
    tokenizer = objective_tokenizer(
        objective, small_corpus.tokenizer_folder, tmp_path / "t", sequence_length=32
    )
    rows = objective_rows(
        objective, small_corpus.tokens("train"), tokenizer, sequence_length=32, seed=1
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    steps = list(
        training_batches(
            rows, batch_size=16, micro_batch_size=16, seed=0, start_step=0, num_steps=50
        )
    )
    whole = {name: torch.cat([batch[name] for batch in steps[0]]) for name in steps[0][0]}
    expected = model(
        whole["input_ids"], attention_mask=whole["attention_mask"], labels=whole["targets"]
    ).loss.item()
    records: list[dict[str, Any]] = []
    train(
        model,
        objective=MaskedLMByLogits(),
        optimizer=Optimizer(model, AdamW(lr=0.005)),
        learning_rate=lambda _: 0.005,
        batches=steps,
        state=TrainingState(),
        num_steps=len(steps),
        clip_grad_norm=1.0,
        hooks=Hooks(log=records.append),
    )
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"] - 1
