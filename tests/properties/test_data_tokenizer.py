"""Tokenizers lose nothing: any text comes back from its tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samara.data.documents import readable
from samara.data.tokenizer import BOS, EOS, PAD, TextTokenizer, train_tokenizer

TEXTS = ["the seed of the elm", "the wind carries the seed", "the elm sheds the seed"] * 20

# Any code point but lone surrogates, which UTF-8 cannot hold; marks spelled out now and then.
ANY_TEXT = st.lists(st.one_of(st.text(), st.sampled_from([PAD, BOS, EOS, " the seed"]))).map(
    "".join
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return train_tokenizer(TEXTS, folder, vocab_size=280)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_decode_undoes_encode(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    assert all(id_ < tokenizer.vocab_size for id_ in ids)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_batches_encode_the_same(tokenizer: TextTokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=30))
def test_readable_text_can_be_written(text: str) -> None:
    clean = readable(text)
    assert clean.encode("utf-8").decode("utf-8") == clean
    assert readable(clean) == clean
    assert "\r" not in clean
