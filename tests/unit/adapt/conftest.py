"""Tiny models of each kind with one tokenizer of words, and a small set of templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from samara.adapt.audits.templates import TemplateSet
from samara.config import validate

WORDS = "the man woman boy girl was is hired rejected kind rude cat dog sat word a here .".split()
MARKS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + len(MARKS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 48,
    "initializer_range": 0.4,
}
EMBEDDINGS = {
    "causal": "model.embed_tokens.weight",
    "masked": "bert.embeddings.word_embeddings.weight",
    "labels": "bert.embeddings.word_embeddings.weight",
}
TEMPLATES = {
    "schema": 1,
    "language": "en",
    "sentences": [
        {"context": "the {term} was", "continuations": ["hired", "rejected"]},
        {"context": "here the {term} is", "continuations": ["kind", "rude"]},
        {"context": "the dog and the {term} is", "continuations": ["hired"]},
        {"context": "a {term} is", "continuations": ["kind here", "rude here"]},
    ],
    "attributes": {"gender": {"pairs": [["man", "woman"]]}, "young": {"pairs": [["boy", "girl"]]}},
    "paraphrases": [["the cat sat", "here the cat sat"], ["a dog was here", "here was a dog"]],
}


def number(word: str) -> int:
    return [*MARKS, *WORDS].index(word)


def save_tokenizer(folder: Path, kind: str) -> None:
    vocabulary = {word: place for place, word in enumerate([*MARKS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = "<s> $A" if kind == "causal" else "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=ends, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=None if kind == "causal" else "<mask>",
    ).save_pretrained(folder)


def make(kind: str) -> Any:
    torch.manual_seed(1)
    match kind:
        case "causal":
            model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1))
        case "masked":
            model = BertForMaskedLM(BertConfig(**SIZES))
        case _:
            model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))
            with torch.no_grad():
                model.classifier.weight *= 3
    return model


def save(kind: str, folder: Path, edit: Callable[[torch.Tensor], None] | None = None) -> Path:
    """A model to which the terms of a pair are the same word, unless ``edit`` says else."""
    model = make(kind)
    with torch.no_grad():
        embedding_vd = model.get_parameter(EMBEDDINGS[kind])
        for one, other in (("man", "woman"), ("boy", "girl")):
            embedding_vd[number(other)] = embedding_vd[number(one)]
        if edit is not None:
            edit(embedding_vd)
    model.save_pretrained(folder)
    save_tokenizer(folder, kind)
    return folder


def drive_apart(embedding_vd: torch.Tensor) -> None:
    """The injected bias: one term becomes another word."""
    embedding_vd[number("woman")] = embedding_vd[number("rejected")] * -2


@pytest.fixture(scope="session", params=["causal", "masked", "labels"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def pair(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same with an injected bias."""
    root = tmp_path_factory.mktemp(kind)
    return save(kind, root / "base"), save(kind, root / "biased", drive_apart)


@pytest.fixture(scope="session")
def templates() -> TemplateSet:
    return validate(TemplateSet, TEMPLATES)
