"""Verb finetune: every method on every kind of task, resumed as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from samara.adapt import finetune as module
from samara.adapt.config import FinetuneConfig
from samara.adapt.data import EncodedAnswer, _cut, read_task_rows
from samara.adapt.finetune import finetune
from samara.adapt.load import load_finetuned
from samara.adapt.models import load_task_model
from samara.adapt.tasks import AnswerLossByLogits, Task, causal_objective, task_labels
from samara.config import validate
from samara.errors import CheckpointError, ConfigError, DataError
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import RunFolder, read_json
from samara.sparse.delta import Delta

WORDS = (
    "red blue green sky grass rose is the what colour a of good bad great awful film book".split()
)
VOCABULARY = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", "?", ":", *WORDS])}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
}


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def save_byte_level_tokenizer(folder: Path) -> None:
    """As Qwen2's own: transformers makes that class whatever the folder says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 8, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def build(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    match kind:
        case "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))
        case "llama_bf16":
            model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).bfloat16()
        case "qwen2":
            model = Qwen2ForCausalLM(
                Qwen2Config(**SIZES | {"vocab_size": 400}, num_key_value_heads=1)
            )
            model.save_pretrained(folder)
            save_byte_level_tokenizer(folder)
            return folder
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=32, n_positions=48, n_embd=16, n_layer=2, n_head=2)
            )
        case "roberta":
            model = RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=0))
        case "deberta":
            model = DebertaV2ForMaskedLM(
                DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
            )
        case "bert":
            model = BertForMaskedLM(BertConfig(**SIZES))
        case _:
            design = ModelConfig.model_validate(
                {
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "head_dim": 8,
                    "ffn_dim": 24,
                    "vocab_size": 32,
                    "max_position_embeddings": 48,
                    "cola": {"rank": 4} if kind == "samara_cola" else None,
                }
            )
            model = SamaraForCausalLM(SamaraConfig.from_design(design))
    if kind.startswith("samara"):
        save_model(model, folder)
    else:
        model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    encoders = ("bert", "roberta", "deberta")
    kinds = ("llama", "llama_bf16", "qwen2", "gpt2", *encoders, "samara", "samara_cola")
    return {kind: build(kind, root / kind) for kind in kinds}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind of task, in one file: each task reads its own fields."""
    folder = tmp_path_factory.mktemp("rows")
    colours = {"sky": "blue", "grass": "green", "rose": "red"}
    for split, number in (("train", 30), ("test", 9)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for i in range(number):
                thing = list(colours)[i % 3]
                word = ("good", "bad", "great", "awful")[i % 4]
                row = {
                    "id": f"{split}{i}",
                    "question": f"what is the colour of the {thing} ?",
                    "answers": [colours[thing]],
                    "document": f"the {thing} is {colours[thing]} .",
                    "summary": colours[thing],
                    "text": f"the {'film' if i % 2 else 'book'} is {word} .",
                    "label": "positive" if word in ("good", "great") else "negative",
                }
                file.write(json.dumps(row) + "\n")
    return folder


TASKS: dict[str, dict[str, Any]] = {
    "labels": {},
    "classification": {"labels": {"positive": "good", "negative": "bad"}, "prompt": "{text} :"},
    "question": {"prompt": "{question}", "max_new_tokens": 3},
    "summarization": {"summaries": "summary", "max_new_tokens": 3},
    "perplexity": {},
}
SPARSE = {
    "kind": "sparse",
    "selection": {"density": 0.05, "num_samples": 6},
    "optimizer": {"lr": 5e-3},
}
METHODS: dict[str, dict[str, Any]] = {
    "sparse": SPARSE,
    "sparse_columns": {
        **SPARSE,
        "selection": {"density": 0.1, "granularity": "column", "num_samples": 4},
    },
    "full": {"kind": "full", "optimizer": {"lr": 5e-3}},
    "lora": {"kind": "lora", "rank": 2, "optimizer": {"lr": 5e-3}},
    "dora": {"kind": "dora", "rank": 2, "optimizer": {"lr": 5e-3}},
    "shira": {"kind": "shira", "rank": 2, "optimizer": {"lr": 5e-3}},
}


def settings(base: Path, rows: Path, task: str, method: Any, **more: Any) -> FinetuneConfig:
    data = {
        "seed": 3,
        "init_from": str(base),
        "task": {"kind": task, "name": task, "data": str(rows / "test.jsonl"), **TASKS[task]},
        "data": {"train": str(rows / "train.jsonl"), "sequence_length": 24},
        "method": method,
        "training": {
            "max_steps": 6,
            "batch_size": 6,
            "micro_batch_size": 3,
            "precision": "float32",
            "evaluate_every_steps": 2,
            **more.pop("training", {}),
        },
        "schedule": {"kind": "cosine", "warmup_steps": 0},
        "logging": {"every_steps": 1},
        **more,
    }
    return validate(FinetuneConfig, data)


def run_one(config: FinetuneConfig, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    finetune(config, RunFolder(folder))
    results: dict[str, Any] = read_json(folder / "results.json")
    return results


def weights(loaded: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


CASES = [
    *(("llama", task, method) for task in ("labels", "question") for method in METHODS),
    *(("bert", "labels", method) for method in ("sparse", "full", "lora")),
    *(("llama", task, "sparse") for task in ("classification", "summarization", "perplexity")),
    *((base, "question", "sparse") for base in ("gpt2", "samara", "samara_cola", "llama_bf16")),
    *(("qwen2", "question", method) for method in ("sparse", "lora")),
    *((base, "labels", "sparse") for base in ("samara", "roberta", "deberta")),
    ("deberta", "labels", "lora"),
    ("gpt2", "question", "lora"),
    ("samara", "question", "lora"),
]


@pytest.mark.parametrize(("base", "task", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_what_is_saved_is_what_was_trained(
    bases: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    task: str,
    method: str,
) -> None:
    trained: dict[str, Any] = {}

    def remember(job: module.Job, folds: None) -> None:
        trained.update(model=job.model, task=job.task, adaptation=job.adaptation)
        finish(job, folds)

    finish = module.Job.finish
    monkeypatch.setattr(module.Job, "finish", remember)
    config = settings(bases[base], rows, task, METHODS[method])
    results = run_one(config, tmp_path / "run")
    loaded = load_finetuned(tmp_path / "run")
    rows_ = trained["task"].validation
    batch = rows_.batch(range(min(3, len(rows_))))
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
    models_ = [trained["model"], loaded.model]
    if method in ("sparse", "sparse_columns"):
        for name, tensor in weights(loaded).items():
            assert torch.equal(tensor, trained["model"].state_dict()[name]), name
        if task != "labels":
            delta = Delta.load(tmp_path / "run" / "delta.safetensors")
            assert sum(t.nnz for t in delta.tensors) <= results["trained_parameters"]
            assert {row.metric for row in delta.record.eval} == set(results["scores"])
    with torch.no_grad():
        ours, theirs = (model.eval()(**inputs).logits for model in models_)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert results["method"] == METHODS[method]["kind"]
    assert results["num_items"] == 9
    assert results["steps"] == 6
    assert results["storage_bytes"] == sum(results["artefacts"].values()) > 0
    assert results["optimizer_bytes"] > 0
    assert results["peak_memory_bytes"] >= 0
    assert results["flops"] > 0
    assert results["trained_parameters"] == trained["adaptation"].num_trained
    for score in results["scores"].values():
        assert score["low"] <= score["value"] <= score["high"]
    assert len((tmp_path / "run" / "task_items.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize("method", ["sparse", "full", "lora"])
def test_training_learns_the_labels(
    bases: dict[str, Path], rows: Path, tmp_path: Path, method: str
) -> None:
    chosen = {**METHODS[method], "optimizer": {"lr": 2e-2}}
    config = settings(
        bases["llama"], rows, "labels", chosen, training={"max_steps": 40}, score_base=True
    )
    results = run_one(config, tmp_path / "run")
    assert results["scores"]["accuracy"]["value"] == 1.0
    assert results["scores"]["macro_f1"]["value"] == 1.0
    assert results["base_scores"]["accuracy"]["value"] < 1.0
    assert results["validation_loss"] < 0.4


GROWING = {
    "kind": "sparse",
    "selection": {"density": 0.02, "granularity": "block4", "num_samples": 4},
    "expansion": {"densities": [0.1], "patience": 1, "min_gain": 0.9},
    "optimizer": {"lr": 5e-3},
}


@pytest.mark.parametrize("name", ["sparse", "growing", "full", "lora"])
def test_resuming_is_going_on_bit_for_bit(
    bases: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    method = GROWING if name == "growing" else METHODS[name]
    config = settings(
        bases["llama"],
        rows,
        "question",
        method,
        training={"max_steps": 8},
        checkpoint={"every_steps": 2},
    )
    straight = run_one(config, tmp_path / "straight")
    evaluate = module.Job._evaluate

    def interrupted(job: module.Job) -> float:
        if job.state.step == 6:
            raise KeyboardInterrupt
        return evaluate(job)

    monkeypatch.setattr(module.Job, "_evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_one(config, tmp_path / "resumed")
    monkeypatch.setattr(module.Job, "_evaluate", evaluate)
    resumed = run_one(config, tmp_path / "resumed")
    for key in ("scores", "validation_loss", "train_loss", "trained_parameters", "flops", "tokens"):
        assert straight[key] == resumed[key], key
    expected = weights(load_finetuned(tmp_path / "straight"))
    for tensor_name, tensor in weights(load_finetuned(tmp_path / "resumed")).items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name
    logs = [RunFolder(tmp_path / f).metrics() for f in ("straight", "resumed")]
    for ours, theirs in zip(*logs, strict=True):
        timed = ("seconds", "tokens_per_second", "mfu", "memory_bytes")
        assert {k: v for k, v in ours.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }
    if name == "growing":
        selection = read_json(tmp_path / "straight" / "selection.json")["selection"]
        assert straight["trained_parameters"] > 3 * selection["entries"]
    if name != "full":  # a checkpoint does not hold the base model
        newest = max((tmp_path / "straight" / "checkpoints").iterdir())
        base_names = load_file(bases["llama"] / "model.safetensors")
        assert not set(load_file(newest / "model.safetensors")) & set(base_names)


def test_auto_chooses_and_says_what_it_tried(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    auto = {"scores": ["random", "grad"], "steps": 2, "lr_factors": [1.0, 2.0]}
    config = settings(bases["llama"], rows, "question", {**SPARSE, "auto": auto})
    run_one(config, tmp_path / "run")
    choice = read_json(tmp_path / "run" / "selection.json")
    best = min(choice["auto"], key=lambda trial: trial["loss"])
    assert choice["selection"]["score"] == best["score"]
    assert len(choice["auto"]) == 4
    selector = Delta.load(tmp_path / "run" / "delta.safetensors").record.selector
    assert selector is not None
    assert selector.score == best["score"]
    assert selector.auto_table == choice["auto"]


def test_the_same_run_twice_is_the_same_delta(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    config = settings(bases["llama_bf16"], rows, "question", SPARSE)
    ids = []
    for name in ("one", "two"):
        run_one(config, tmp_path / name)
        ids.append(Delta.load(tmp_path / name / "delta.safetensors").id)
    assert ids[0] == ids[1]


def test_checkpointing_of_activations_changes_nothing(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    found = []
    for base in ("llama", "samara"):
        for mode in ("none", "layer"):
            training = {"activation_checkpointing": mode, "max_steps": 3}
            config = settings(bases[base], rows, "question", SPARSE, training=training)
            found.append(run_one(config, tmp_path / f"{base}-{mode}")["validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[2] == pytest.approx(found[3], rel=1e-6)


def test_rows_of_other_labels_are_left_out_and_counted(bases, rows, tmp_path) -> None:
    config = settings(bases["samara"], rows, "labels", SPARSE)
    chosen = {"labels": ("negative", "neutral"), "other_labels": "leave_out", "limit": 2}
    only = config.task.model_copy(update=chosen)
    results = run_one(config.model_copy(update={"task": only}), tmp_path / "run")
    assert (results["num_items"], results["left_out"]) == (2, 5)
    left_out = read_json(tmp_path / "run" / "data.json")["left_out"]
    assert (left_out["train"] + left_out["validation"], left_out["scored"]) == (15, 5)


def test_what_does_not_fit_is_said_in_a_line(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    def fails(error: type[Exception], match: str, config: FinetuneConfig) -> None:
        with pytest.raises(error, match=match):
            run_one(config, tmp_path / "failing")

    llama = bases["llama"]
    with pytest.raises(ConfigError, match="give one of max_steps and epochs"):
        settings(llama, rows, "question", SPARSE, training={"epochs": 1})
    with pytest.raises(ConfigError, match="batch_size 6 is not divisible by micro_batch_size 4"):
        settings(llama, rows, "question", SPARSE, training={"micro_batch_size": 4})
    with pytest.raises(ConfigError, match=r"needs training\.evaluate_every_steps"):
        settings(llama, rows, "question", GROWING, training={"evaluate_every_steps": None})
    config = settings(llama, rows, "question", SPARSE)
    (tmp_path / "one.jsonl").write_text((rows / "train.jsonl").read_text().splitlines()[0] + "\n")
    alone = config.data.model_copy(update={"train": str(tmp_path / "one.jsonl")})
    fails(DataError, "holds one row 1 times", config.model_copy(update={"data": alone}))
    missing = config.data.model_copy(update={"train": str(rows / "none.jsonl")})
    fails(DataError, "(?i)no such file", config.model_copy(update={"data": missing}))
    labels = settings(llama, rows, "labels", SPARSE)
    one = labels.task.model_copy(update={"labels": ("positive",)})
    fails(ConfigError, r"task\.labels: .*two different", labels.model_copy(update={"task": one}))
    other = labels.task.model_copy(update={"labels": ("positive", "neutral")})
    fails(
        DataError,
        "label 'negative' is none of .*task.other_labels: leave_out",
        labels.model_copy(update={"task": other}),
    )
    fails(
        ConfigError,
        "shira adapts nn.Linear, and the trunk of this model has none",
        settings(bases["gpt2"], rows, "question", METHODS["shira"]),
    )
    fails(
        ConfigError,
        r"task\.kind: needs a causal language model, and .*bert is an encoder; use labels",
        settings(bases["bert"], rows, "question", SPARSE),
    )
    with pytest.raises(
        CheckpointError, match=r"holds no results\.json, so no fine-tuning finished"
    ):
        load_finetuned(tmp_path)
    (tmp_path / "other_type").mkdir()
    for file in llama.iterdir():
        (tmp_path / "other_type" / file.name).write_bytes(file.read_bytes())
    fields = read_json(llama / "config.json")
    fields["dtype"] = "bfloat16"
    (tmp_path / "other_type" / "config.json").write_text(json.dumps(fields))
    fails(
        CheckpointError,
        "stores .* as F32, transformers loads BF16",
        settings(tmp_path / "other_type", rows, "question", SPARSE),
    )


def test_logits_that_are_scaled_are_not_taken_for_plain_products() -> None:
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert type(causal_objective(plain)).__name__ == "AnswerLoss"
    plain.config.final_logit_softcapping = 30.0
    assert type(causal_objective(plain)).__name__ == "AnswerLossByLogits"


def test_folds_score_every_row_by_a_model_that_did_not_see_it(
    bases: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(bases["llama"], rows, "labels", SPARSE, training={"max_steps": 2}, folds=3)
    results = run_one(config, tmp_path / "run")
    found = results["cross_validation"]
    assert found["num_items"] == 30
    assert len(found["scores_by_fold"]) == 3
    seen = []
    for fold in range(3):
        folder = tmp_path / "run" / "folds" / str(fold)
        train, scored = (
            {json.loads(line)["id"] for line in (folder / name).read_text().splitlines()}
            for name in ("train.jsonl", "scored.jsonl")
        )
        assert not train & scored
        assert len(train | scored) == 30
        seen += sorted(scored)
        assert read_json(folder / "results.json")["cross_validation"] is None
    assert len(set(seen)) == len(seen) == 30
    pooled = found["scores"]["accuracy"]
    assert pooled["low"] <= pooled["value"] <= pooled["high"]
    # A finished fold is not run again.
    finished = (tmp_path / "run" / "folds" / "0" / "results.json").stat().st_mtime_ns
    assert run_one(config, tmp_path / "run")["cross_validation"] == found
    assert (tmp_path / "run" / "folds" / "0" / "results.json").stat().st_mtime_ns == finished
    many = config.model_copy(update={"folds": 31})
    with pytest.raises(DataError, match="holds 30 different rows, fewer than 31 folds"):
        run_one(many, tmp_path / "many")


def test_a_row_that_is_too_long_loses_the_beginning_of_its_prompt() -> None:
    assert _cut([1, 2, 3, 4], [5, 6], limit=4) == EncodedAnswer(
        prompt=(3, 4), answer=(5, 6), is_cut=True
    )
    assert _cut([1, 2], [3, 4, 5, 6], limit=3) == EncodedAnswer(
        prompt=(2,), answer=(3, 4), is_cut=True
    )
    assert _cut([1, 2], [3], limit=3) == EncodedAnswer(prompt=(1, 2), answer=(3,), is_cut=False)


def test_only_the_answer_and_its_end_mark_are_targets(bases: dict[str, Path], rows: Path) -> None:
    config = settings(bases["llama"], rows, "question", SPARSE)
    loaded = load_task_model(bases["llama"], labels=None, dtype=None, seed=0)
    task = Task(config, read_task_rows(config), loaded.model, loaded.tokenizer)
    batch = task.train.batch([0, 1])
    counted = batch["targets"][0][batch["targets"][0] >= 0]
    assert loaded.tokenizer.convert_ids_to_tokens(counted.tolist())[1:] == ["</s>"]
    last = int((batch["targets"][0] >= 0).nonzero()[0])
    assert loaded.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())[:3] == [
        "<s>",
        "what",
        "is",
    ]
    assert batch["input_ids"][0, last] == VOCABULARY["?"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "samara", "bert"])
def test_losses_are_the_mean_over_targets_whatever_the_padding(
    bases: dict[str, Path], rows: Path, kind: str
) -> None:
    name = "labels" if kind == "bert" else "perplexity"
    config = settings(bases[kind], rows, name, SPARSE)
    read = read_task_rows(config)
    loaded = load_task_model(bases[kind], labels=task_labels(config, read), dtype=None, seed=0)
    loaded.model.eval()
    task = Task(config, read, loaded.model, loaded.tokenizer)
    total, count = 0.0, 0
    for row in range(len(task.validation)):
        batch = task.validation.batch([row])
        inputs = {key: tensor for key, tensor in batch.items() if key != "targets"}
        logits = loaded.model(**inputs).logits.flatten(0, -2).detach()
        targets = batch["targets"].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != -100).sum())
    for batch_size in (1, 3):
        found = task.validation_loss(loaded.model, batch_size=batch_size)
        assert found == pytest.approx(total / count, rel=1e-5)
    if name == "perplexity":
        by_logits = AnswerLossByLogits()(loaded.model, task.validation.batch([0, 1]))
        fused = task.objective(loaded.model, task.validation.batch([0, 1]))
        torch.testing.assert_close(by_logits.nll, fused.nll, rtol=1e-5, atol=1e-5)
