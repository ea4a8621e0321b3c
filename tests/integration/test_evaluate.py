"""Verb ``evaluate`` from model folders and a corpus to ``results.json``."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from samara.data.loader import training_batches
from samara.data.tokenizer import train_tokenizer
from samara.data.tokens import PackedSequences
from samara.errors import CheckpointError, ConfigError, DataError
from samara.measure.config import EvaluateConfig
from samara.measure.evaluate import evaluate
from samara.model.config import ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.model.loading import save_model
from samara.model.modeling import SamaraForCausalLM
from samara.runs import RunFolder, hash_files, read_json

DESIGN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "ffn_dim": 48,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}


def make_model(corpus, **changes):
    torch.manual_seed(0)
    design = ModelConfig(**{**DESIGN, **changes}).expand(vocab_size=corpus.vocab_size)
    return SamaraForCausalLM(SamaraConfig.from_design(design, **corpus.special_tokens))


def save(model, corpus, folder):
    model.save_pretrained(folder)
    for file in corpus.tokenizer_folder.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def folders(small_corpus, tmp_path_factory):
    """A model that knows nothing (every token is equally likely), and one that learned a little."""
    root = tmp_path_factory.mktemp("models")
    uniform, trained = make_model(small_corpus), make_model(small_corpus)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    rows = PackedSequences(small_corpus.tokens("train"), sequence_length=32)
    steps = training_batches(
        rows, batch_size=8, micro_batch_size=8, seed=0, start_step=0, num_steps=20
    )
    for (batch,) in steps:
        hidden = trained.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"]
        ).last_hidden_state
        sums = linear_cross_entropy(hidden, trained.lm_head.weight, batch["targets"])
        (sums.loss_sum / sums.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "uniform": save(uniform, small_corpus, root / "uniform"),
        "trained": save(trained, small_corpus, root / "run" / "model").parent,
    }


@pytest.fixture
def run_evaluate(small_corpus, tmp_path):
    def run(models, name="out", **changes):
        settings = {
            "models": {key: str(path) for key, path in models.items()},
            "corpus": str(small_corpus.folder),
            "sequence_length": 32,
            "device": "cpu",
            "bootstrap_samples": 200,
            "sampling": {"prompts": ["Return the"], "max_new_tokens": 8},
        }
        folder = RunFolder(tmp_path / name)
        evaluate(EvaluateConfig.model_validate({**settings, **changes}), folder)
        return read_json(folder.path / "results.json")

    return run


def test_results_have_the_agreed_form(folders, run_evaluate, small_corpus):
    results = run_evaluate(folders)
    assert list(results) == [
        "schema",
        "corpus_hash",
        "split",
        "objective",
        "num_documents",
        "num_tokens",
        "models",
        "comparisons",
        "confidence",
    ]
    tokens = small_corpus.tokens("validation")
    assert results["schema"] == 1
    assert results["corpus_hash"] == small_corpus.hash
    assert (results["split"], results["confidence"]) == ("validation", 0.95)
    assert results["objective"] == {"kind": "causal_lm"}
    assert results["num_documents"] == tokens.num_documents
    assert results["num_tokens"] == tokens.num_tokens - tokens.num_documents
    assert list(results["models"]) == ["uniform", "trained"]
    for entry in results["models"].values():
        assert set(entry) == {
            "path",
            "weights_hash",
            "loss",
            "perplexity",
            "bits_per_byte",
            "samples",
        }
        for score in ("loss", "perplexity", "bits_per_byte"):
            bounds = entry[score]
            assert bounds["low"] <= bounds["value"] <= bounds["high"]
        assert [sample["prompt"] for sample in entry["samples"]] == ["Return the"]
        assert all(isinstance(sample["text"], str) for sample in entry["samples"])


def test_a_uniform_model_has_the_loss_of_its_vocabulary(folders, run_evaluate, small_corpus):
    results = run_evaluate(folders)
    entry, vocabulary = results["models"]["uniform"], small_corpus.vocab_size
    tokens = small_corpus.tokens("validation")
    num_bytes = int(tokens.document_bytes.sum())
    assert entry["loss"]["value"] == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert entry["perplexity"]["value"] == pytest.approx(vocabulary, rel=1e-5)
    assert entry["bits_per_byte"]["value"] == pytest.approx(
        results["num_tokens"] * math.log2(vocabulary) / num_bytes, rel=1e-6
    )


def test_what_learned_is_better_than_what_did_not(folders, run_evaluate):
    results = run_evaluate(folders)
    losses = {name: entry["loss"]["value"] for name, entry in results["models"].items()}
    (comparison,) = results["comparisons"]
    assert (comparison["baseline"], comparison["model"]) == ("uniform", "trained")
    assert comparison["verdict"] == "better"
    difference = comparison["loss_difference"]
    assert difference["value"] == pytest.approx(losses["trained"] - losses["uniform"])
    assert difference["high"] < 0


def test_the_same_model_twice_is_unresolved(folders, run_evaluate):
    results = run_evaluate({"one": folders["trained"], "two": folders["trained"] / "model"})
    (comparison,) = results["comparisons"]
    assert comparison["loss_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert comparison["verdict"] == "unresolved"


def test_again_gives_the_same_file(folders, run_evaluate, tmp_path):
    run_evaluate(folders, "first")
    run_evaluate(folders, "second")
    first, second = (tmp_path / name / "results.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing_but_rounding(folders, run_evaluate, batch_size):
    reference = run_evaluate(folders, "reference", sampling=None)
    results = run_evaluate(folders, batch_size=batch_size, sampling=None)
    for name, entry in reference["models"].items():
        assert results["models"][name]["loss"] == pytest.approx(entry["loss"], rel=1e-6)


def test_a_part_of_the_split(folders, run_evaluate):
    results = run_evaluate(folders, max_tokens=160, sampling=None)
    assert results["num_tokens"] <= 160
    assert results["models"]["uniform"]["samples"] == []


def test_the_hash_is_that_of_the_weights_and_stands_in_the_lineage(
    folders, run_evaluate, small_corpus, tmp_path
):
    results = run_evaluate(folders, sampling=None)
    file = folders["uniform"] / "model.safetensors"
    expected = hash_files({file.name: file})
    assert results["models"]["uniform"]["weights_hash"] == expected
    parents = RunFolder(tmp_path / "out").lineage().parents
    assert parents["data"] == small_corpus.hash
    assert parents["models.uniform"] == expected


def test_any_causal_model_of_transformers(small_corpus, run_evaluate, folders, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=small_corpus.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=small_corpus.special_tokens["eos_token_id"],
    )
    llama = save(LlamaForCausalLM(config), small_corpus, tmp_path / "llama")
    results = run_evaluate({"uniform": folders["uniform"], "llama": llama})
    assert results["models"]["llama"]["loss"]["value"] == pytest.approx(
        math.log(small_corpus.vocab_size), abs=0.3
    )


def test_bfloat16_is_near(folders, run_evaluate):
    exact = run_evaluate(folders, "exact", sampling=None)
    rounded = run_evaluate(folders, precision="bfloat16", sampling=None)
    assert rounded["models"]["trained"]["loss"]["value"] == pytest.approx(
        exact["models"]["trained"]["loss"]["value"], rel=1e-2
    )


def test_another_vocabulary_is_refused(small_corpus, run_evaluate, folders, tmp_path):
    model = tmp_path / "other"
    train_tokenizer(["some other words entirely " * 9], model, vocab_size=270)
    save_model(make_model(small_corpus), model)
    with pytest.raises(ConfigError) as error:
        run_evaluate({"other": model})
    assert str(error.value) == (
        f"models.other: the vocabulary of {model} (270 entries) is not that of the corpus "
        f"{small_corpus.folder} (300); prepare the corpus with tokenizer: "
        f"{{kind: load, path: {model}}}"
    )


def test_a_tokenizer_that_splits_otherwise_is_refused(small_corpus, run_evaluate, tmp_path):
    folder = save(make_model(small_corpus), small_corpus, tmp_path / "lower")
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"models\.m: the tokenizer of .* splits text different"):
        run_evaluate({"m": folder})


def test_too_few_embedding_rows_are_refused(small_corpus, run_evaluate, tmp_path):
    design = ModelConfig(**DESIGN, vocab_size=200)
    model = SamaraForCausalLM(SamaraConfig.from_design(design))
    folder = save(model, small_corpus, tmp_path / "few")
    with pytest.raises(ConfigError, match=r"models\.m: .* has 200 embedding rows, .* need 300"):
        run_evaluate({"m": folder})


def test_a_longer_row_than_the_context_is_refused(folders, run_evaluate):
    with pytest.raises(ConfigError) as error:
        run_evaluate(folders, sequence_length=65)
    assert str(error.value) == (
        "sequence_length: 65 exceeds the context of models.uniform, 64 tokens; make it smaller"
    )


def test_a_missing_model_is_refused(run_evaluate, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; give a folder with a saved model"):
        run_evaluate({"m": tmp_path / "nowhere"})


def test_a_missing_corpus_is_refused(folders, run_evaluate, tmp_path):
    with pytest.raises(DataError, match="no prepared corpus there"):
        run_evaluate(folders, corpus=str(tmp_path))
