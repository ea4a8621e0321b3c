"""Special tokens appended to a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from samara.data.special_tokens import MASK, extend_tokenizer, read_special_tokens
from samara.data.tokenizer import TextTokenizer
from samara.errors import DataError

NEW = (MASK, "[NLU]", "<extra_id_0>", "<extra_id_1>")
TEXTS = ["the seed of elm", "", "[NLU] and <extra_id_0> spelled out", "Ünïcode <|eos|>"]


@pytest.fixture
def extended(tokenizer: TextTokenizer, tmp_path: Path) -> TextTokenizer:
    return extend_tokenizer(tokenizer.folder, tmp_path / "extended", tokens=NEW)


def test_new_ids_follow_the_old_in_order(tokenizer: TextTokenizer, extended: TextTokenizer):
    ids = read_special_tokens(extended.folder).ids_of(NEW, needed_by="the test")
    assert ids == list(range(tokenizer.vocab_size, tokenizer.vocab_size + len(NEW)))
    assert extended.vocab_size == tokenizer.vocab_size + len(NEW)
    assert extended.special_tokens == tokenizer.special_tokens


def test_texts_keep_their_ids_even_those_that_spell_a_token(
    tokenizer: TextTokenizer, extended: TextTokenizer
):
    assert extended.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_transformers_reads_the_same_tokens(extended: TextTokenizer):
    auto = AutoTokenizer.from_pretrained(extended.folder)
    assert auto.convert_tokens_to_ids(list(NEW)) == list(
        range(extended.vocab_size - len(NEW), extended.vocab_size)
    )
    assert auto.mask_token == MASK
    assert len(auto) == extended.vocab_size


def test_nothing_is_appended_twice(extended: TextTokenizer, tmp_path: Path):
    again = extend_tokenizer(extended.folder, tmp_path / "again", tokens=(*NEW, NEW[0]))
    assert again.hash == extended.hash


def test_without_tokens_it_is_a_copy(tokenizer: TextTokenizer, tmp_path: Path):
    assert extend_tokenizer(tokenizer.folder, tmp_path / "copy", tokens=()).hash == tokenizer.hash


def test_a_tokenizer_keeps_its_own_mask_token(extended: TextTokenizer):
    path = extended.folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "mask_token": {"content": "[NLU]"}}))
    special = read_special_tokens(extended.folder)
    assert special.mask == "[NLU]"
    assert special.id_of("cls_token", "mask_token") == special.ids["[NLU]"]
    assert special.id_of("cls_token") is None


def test_a_role_may_name_an_ordinary_token(tokenizer: TextTokenizer, extended: TextTokenizer):
    """BERT's [SEP] often is one: it is never masked either."""
    path = extended.folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "sep_token": "e", "cls_token": "not there"}))
    special = read_special_tokens(extended.folder)
    assert special.ids["e"] == tokenizer.encode("e")[0]
    assert "cls_token" not in special.by_role


def test_a_missing_token_is_named(tokenizer: TextTokenizer):
    special = read_special_tokens(tokenizer.folder)
    with pytest.raises(DataError, match=r"no special token \[NLG\], which UL2 needs"):
        special.ids_of(["[NLG]"], needed_by="UL2")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        extend_tokenizer(tmp_path, tmp_path / "copy", tokens=NEW)
