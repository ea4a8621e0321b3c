"""OpenELM's data path: its filters to the token, its rows, and what it costs."""

from __future__ import annotations

import json
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samara.data.loader import evaluation_batches, training_batches
from samara.data.openelm_path import (
    ChunkRows,
    ChunkRules,
    DocumentLines,
    compare_paths,
    normalised_length,
    split_words,
)
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX, PackedSequences, TokenShards, write_token_shards
from samara.errors import DataError

PAD, BOS, EOS = 0, 1, 2
SMALL = ChunkRules(words=20, min_characters=40, min_tokens=25, sequence_length=48)
Sentences = Callable[[int], list[str]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[str]], DocumentLines]:
    """Writes documents as ``prepare`` does, and opens them."""

    def write_documents(texts: list[str]) -> DocumentLines:
        path = tmp_path / "train.jsonl"
        lines = [
            json.dumps({"id": str(i), "text": t}, ensure_ascii=False) for i, t in enumerate(texts)
        ]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return DocumentLines(path)

    return write_documents


def digits(count: int) -> str:
    """A text of that many tokens: the test tokenizer has learnt no pair of digits."""
    return ("0123456789" * (count // 10 + 1))[:count]


# --- one document -----------------------------------------------------------------------------


def test_a_document_is_cut_every_2048_words():
    chunks = split_words(" ".join(map(str, range(5000))), words=2048)
    assert [len(chunk.split(" ")) for chunk in chunks] == [2048, 2048, 904]
    assert chunks[1].startswith("2048 ")
    assert " ".join(chunks) == " ".join(map(str, range(5000)))


def test_words_stand_between_single_spaces():
    assert split_words("a  b\nc d", words=2) == ["a ", "b\nc d"]  # a, "", "b\nc", d
    assert split_words("", words=2) == [""]


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("abc", 3),
        (" A\n\n\tB  c ", 5),
        ("a, b; c!", 5),
        ("...", 0),
        ("a . b", 3),  # the point goes first, then its two spaces become one
        ("naïve – no", 10),  # only ASCII punctuation goes
    ],
)
def test_normalised_length(text: str, length: int):
    assert normalised_length(text) == length


# --- the filters, to the token ----------------------------------------------------------------


@pytest.mark.parametrize(("characters", "kept"), [(199, False), (200, True)])
def test_fewer_than_200_characters_are_dropped(write, tokenizer, characters, kept):
    documents = write([digits(characters) + "." * 100])  # tokens enough either way
    assert len(tokenizer.encode(digits(characters) + "." * 100)) == characters + 100
    if kept:
        assert len(ChunkRows(documents, tokenizer)) == 1
    else:
        with pytest.raises(DataError, match="keep none of the 1 documents"):
            ChunkRows(documents, tokenizer)


@pytest.mark.parametrize(("tokens", "kept"), [(255, False), (256, True)])
def test_fewer_than_256_tokens_with_marks_are_dropped(write, tokenizer, tokens, kept):
    documents = write([digits(tokens - 2)])
    if kept:
        assert len(ChunkRows(documents, tokenizer)) == 1
    else:
        with pytest.raises(DataError, match="keep none"):
            ChunkRows(documents, tokenizer)


@pytest.mark.parametrize("tokens", [2048, 2049, 2050, 5000])
def test_rows_are_cut_to_2049_tokens(write, tokenizer, tokens):
    text = digits(tokens - 2)
    row = ChunkRows(write([text]), tokenizer)[0]
    whole = [BOS, *tokenizer.encode(text), EOS]
    assert len(whole) == tokens
    assert row["input_ids"].tolist() == whole[:2048]
    counted = row["targets"][row["targets"] != IGNORE_INDEX].tolist()
    assert counted == whole[1:2049]
    assert (counted[-1] == EOS) == (tokens <= 2049)  # the end mark goes with the tail


# --- rows -------------------------------------------------------------------------------------


def test_padding_is_not_counted_and_stands_apart(write, tokenizer):
    row = ChunkRows(write([digits(298)]), tokenizer)[0]
    assert row["input_ids"][:301].tolist() == [BOS, *tokenizer.encode(digits(298)), EOS, PAD]
    assert row["targets"][298] == EOS
    assert (row["targets"][299:] == IGNORE_INDEX).all()
    assert row["position_ids"][:300].tolist() == list(range(300))
    assert row["position_ids"][300:].tolist() == list(range(1748))
    assert row["document_ids"].tolist() == [0] * 300 + [-1] * 1748


def test_text_is_put_in_nfc(write, tokenizer):
    decomposed = "e\u0301" * 200
    assert len(unicodedata.normalize("NFC", decomposed)) == 200
    row = ChunkRows(write([decomposed]), tokenizer)[0]
    expected = tokenizer.encode("\u00e9" * 200)
    assert row["input_ids"][1 : 1 + len(expected)].tolist() == expected


def reference_rows(
    texts: list[str], tokenizer: TextTokenizer, rules: ChunkRules
) -> list[list[int]]:
    """The path written out, one document at a time."""
    rows = []
    for text in texts:
        words = text.split(" ")
        for start in range(0, len(words), rules.words):
            chunk = " ".join(words[start : start + rules.words])
            if normalised_length(chunk) < rules.min_characters:
                continue
            tokens = [BOS, *tokenizer.encode(unicodedata.normalize("NFC", chunk)), EOS]
            if len(tokens) >= rules.min_tokens:
                rows.append(tokens[: rules.sequence_length + 1])
    return rows


@pytest.fixture
def texts(sentences: Sentences) -> list[str]:
    pieces = sentences(400)
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(pieces, n)) for n in rng.integers(1, 8, 300)]


def test_rows_are_those_of_the_path_written_out(write, tokenizer, texts):
    rows = ChunkRows(write(texts), tokenizer, rules=SMALL)
    expected = reference_rows(texts, tokenizer, SMALL)
    assert len(rows) == len(expected)
    assert len({len(row) for row in expected}) > 5
    batches = list(evaluation_batches(rows, batch_size=7))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    targets = torch.cat([batch["targets"] for batch in batches])
    for i, row in enumerate(expected):
        assert ids[i].tolist()[: len(row)] == row[:48]
        assert targets[i][targets[i] != IGNORE_INDEX].tolist() == row[1:]


def test_another_tokenizer_needs_no_other_corpus(write, tokenizer, texts, tmp_path):
    from samara.data.tokenizer import train_tokenizer

    documents = write(texts)
    other = train_tokenizer(texts, tmp_path / "other", vocab_size=300)
    mine, theirs = (ChunkRows(documents, t, rules=SMALL)[0] for t in (tokenizer, other))
    assert not torch.equal(mine["input_ids"], theirs["input_ids"])


def test_workers_open_the_tokenizer_themselves(write, tokenizer, texts):
    rows = ChunkRows(write(texts), tokenizer, rules=SMALL)
    copy = pickle.loads(pickle.dumps(rows))
    assert torch.equal(copy[3]["input_ids"], rows[3]["input_ids"])
    (step,) = training_batches(
        rows, batch_size=4, micro_batch_size=4, seed=1, start_step=0, num_steps=1, num_workers=1
    )
    assert step[0]["input_ids"].shape == (4, 48)


def test_numbers_past_the_end_begin_again(write, tokenizer, texts):
    rows = ChunkRows(write(texts), tokenizer, rules=SMALL)
    assert torch.equal(rows.batch([len(rows) + 2])["targets"], rows.batch([2])["targets"])


def test_documents_are_found_by_number(write):
    texts = ["one", "zwei – ünïcode", "three\nlines", ""]
    documents = write(texts)
    assert len(documents) == 4
    assert list(documents) == texts
    assert [documents[i] for i in range(4)] == texts
    with pytest.raises(IndexError, match="document 4 of 4"):
        documents[4]


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no such file; give documents/train\.jsonl"):
        DocumentLines(tmp_path / "train.jsonl")


# --- what it costs ----------------------------------------------------------------------------


def test_costs_are_those_of_the_rows(write, tokenizer, texts, tmp_path):
    cost = compare_paths(iter(texts), tokenizer, rules=SMALL)
    assert cost.documents == len(texts)
    rows = ChunkRows(write(texts), tokenizer, rules=SMALL)
    batch = rows.batch(range(len(rows)))
    assert cost.openelm.rows == len(rows)
    assert cost.openelm.slots == batch["input_ids"].numel()
    assert cost.openelm.padding == (batch["document_ids"] == -1).sum()
    held = [token for row in reference_rows(texts, tokenizer, SMALL) for token in row]
    kept = sum(token not in (BOS, EOS) for token in held)
    assert cost.openelm.text_tokens - sum(cost.openelm.lost_tokens.values()) == kept
    assert min(cost.openelm.lost_tokens.values()) > 0
    assert 0 < cost.openelm.lost_share < 1

    write_token_shards(texts, tokenizer, tmp_path / "train")
    packed = PackedSequences(TokenShards.open(tmp_path, "train"), sequence_length=48)
    packed_batch = packed.batch(range(len(packed)))
    assert cost.packed.rows == len(packed)
    assert cost.packed.slots == packed_batch["input_ids"].numel()
    assert cost.packed.padding == (packed_batch["document_ids"] == -1).sum()
    assert cost.packed.text_tokens == packed.shards.num_tokens - 2 * len(texts)
    assert cost.packed.lost_share == 0
    assert cost.packed.padding_share < cost.openelm.padding_share


def test_no_text_costs_nothing(tokenizer):
    cost = compare_paths([], tokenizer)
    assert cost.openelm.padding_share == cost.packed.padding_share == cost.openelm.lost_share == 0
