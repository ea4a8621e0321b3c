"""Small texts, tokenizers and splits to test with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from samara.data.tokenizer import TextTokenizer, train_tokenizer
from samara.data.tokens import TokenShards, write_token_shards

WORDS = [
    "the",
    "seed",
    "of",
    "elm",
    "is",
    "carried",
    "by",
    "wind",
    "and",
    "it",
    "falls",
    "where",
    "will",
    "some",
    "are",
    "eaten",
    "but",
    "many",
    "grow",
    "into",
    "tall",
    "trees",
    "whose",
    "leaves",
    "turn",
    "yellow",
    "in",
    "autumn",
    "before",
    "they",
    "return",
    "to",
    "earth",
]


def _sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 31, count)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


@pytest.fixture(scope="session")
def sentences() -> Callable[[int], list[str]]:
    """Makes that many random sentences of 0 to 30 words."""
    return _sentences


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_tokenizer(_sentences(200), folder, vocab_size=320)


@pytest.fixture(scope="session")
def shards(tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Sixty documents over several shard files; some of them are empty."""
    folder = tmp_path_factory.mktemp("tokens")
    write_token_shards(_sentences(60), tokenizer, folder / "train", shard_tokens=200)
    return TokenShards.open(folder, "train")
