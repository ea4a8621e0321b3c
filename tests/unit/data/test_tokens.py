"""Token shards on disk and the rows packed from them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX, PackedSequences, TokenShards, write_token_shards
from samara.errors import DataError

BOS, EOS, PAD = 1, 2, 0
Sentences = Callable[[int], list[str]]


def stream(tokenizer: TextTokenizer, texts: list[str]) -> list[int]:
    return [id_ for text in texts for id_ in (BOS, *tokenizer.encode(text), EOS)]


# --- shards -----------------------------------------------------------------------------------


def test_the_stream_is_the_documents_with_their_marks(
    shards: TokenShards, tokenizer: TextTokenizer, sentences: Sentences
) -> None:
    texts = sentences(60)
    expected = stream(tokenizer, texts)
    assert shards.num_tokens == len(expected)
    assert shards.read(0, shards.num_tokens).tolist() == expected
    assert shards.num_documents == 60
    assert shards.document_bytes.tolist() == [len(text.encode()) for text in texts]
    for number, text in enumerate(texts):
        start, stop = shards.document_offsets[number : number + 2].tolist()
        assert shards.read(start, stop).tolist() == [BOS, *tokenizer.encode(text), EOS]


def test_reads_across_shard_files(shards: TokenShards) -> None:
    whole = shards.read(0, shards.num_tokens)
    assert len(list((shards.folder / "train").glob("shard-*.bin"))) > 2
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, shards.num_tokens, (50, 2))).tolist():
        if start < stop:
            np.testing.assert_array_equal(shards.read(start, stop), whole[start:stop])


def test_shards_are_the_same_again(
    tokenizer: TextTokenizer, tmp_path: Path, sentences: Sentences
) -> None:
    for name in ("a", "b"):
        write_token_shards(iter(sentences(20)), tokenizer, tmp_path / name / "train")
    files = sorted(path.name for path in (tmp_path / "a" / "train").iterdir())
    for file in files:
        assert (tmp_path / "a/train" / file).read_bytes() == (
            tmp_path / "b/train" / file
        ).read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_width_follows_the_vocabulary(
    tokenizer: TextTokenizer, tmp_path: Path, vocab_size: int, dtype: str, sentences: Sentences
) -> None:
    wide = TextTokenizer.load(tokenizer.folder)
    wide.vocab_size = vocab_size
    write_token_shards(sentences(5), wide, tmp_path / "train")
    opened = TokenShards.open(tmp_path, "train")
    assert opened.read(0, 3).dtype == dtype
    assert opened.read(0, opened.num_tokens).tolist() == stream(tokenizer, sentences(5))
    opened.verify()


def test_tokenizer_without_marks(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    bare = TextTokenizer.load(tokenizer.folder)
    bare.special_tokens = dict.fromkeys(bare.special_tokens)
    write_token_shards(["the elm", "", "the seed"], bare, tmp_path / "train")
    opened = TokenShards.open(tmp_path, "train")
    ids = [*tokenizer.encode("the elm"), *tokenizer.encode("the seed")]
    assert opened.read(0, opened.num_tokens).tolist() == ids
    rows = PackedSequences(opened, sequence_length=len(ids) + 3)
    assert rows[0]["document_ids"].tolist() == (
        [0] * len(tokenizer.encode("the elm")) + [2] * len(tokenizer.encode("the seed")) + [-1] * 3
    )
    assert int((rows[0]["targets"] != IGNORE_INDEX).sum()) == len(ids) - 2 == rows.num_targets


def test_pickling_sends_no_tokens(shards: TokenShards) -> None:
    data = pickle.dumps(PackedSequences(shards, sequence_length=16))
    assert len(data) < 1000
    assert torch.equal(
        pickle.loads(data)[3]["input_ids"],
        PackedSequences(shards, sequence_length=16)[3]["input_ids"],
    )


def test_missing_split(shards: TokenShards) -> None:
    with pytest.raises(DataError, match=r"test: no tokens there; the corpus has no test documents"):
        TokenShards.open(shards.folder, "test")


@pytest.fixture
def own_shards(tokenizer: TextTokenizer, tmp_path: Path, sentences: Sentences) -> Path:
    write_token_shards(sentences(60), tokenizer, tmp_path / "train", shard_tokens=200)
    return tmp_path


@pytest.mark.parametrize("name", ["shard-00001.bin", "document_offsets.npy", "document_bytes.npy"])
def test_truncated_file(own_shards: Path, name: str) -> None:
    path = own_shards / "train" / name
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(
        DataError,
        match=rf"{name}: has {len(data) - 2} bytes instead of {len(data)}; remove the prepared",
    ):
        TokenShards.open(own_shards, "train")
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: is missing; remove the prepared folder"):
        TokenShards.open(own_shards, "train")


def test_altered_file(own_shards: Path) -> None:
    path = own_shards / "train" / "shard-00001.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    opened = TokenShards.open(own_shards, "train")  # sizes are right
    with pytest.raises(DataError, match=r"shard-00001\.bin: its content was altered; remove"):
        opened.verify()


# --- rows -------------------------------------------------------------------------------------


def test_a_row_by_hand(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_token_shards(["the elm", "seed"], tokenizer, tmp_path / "train")
    first, second = tokenizer.encode("the elm"), tokenizer.encode("seed")
    rows = PackedSequences(TokenShards.open(tmp_path, "train"), sequence_length=16)
    row = rows[0]
    real = len(first) + len(second) + 4
    assert len(rows) == 1
    assert row["input_ids"].tolist() == [BOS, *first, EOS, BOS, *second, EOS] + [PAD] * (16 - real)
    assert row["targets"].tolist() == (
        [*first, EOS, IGNORE_INDEX, *second, EOS, IGNORE_INDEX] + [IGNORE_INDEX] * (16 - real)
    )
    assert row["position_ids"].tolist() == (
        [*range(len(first) + 2), *range(len(second) + 2), *range(16 - real)]
    )
    assert row["document_ids"].tolist() == (
        [0] * (len(first) + 2) + [1] * (len(second) + 2) + [-1] * (16 - real)
    )
    assert all(tensor.dtype == torch.int64 for tensor in row.values())


def test_a_row_without_boundaries(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_token_shards(["the elm", "seed"], tokenizer, tmp_path / "train")
    shards = TokenShards.open(tmp_path, "train")
    rows = PackedSequences(shards, sequence_length=4, document_boundaries=False)
    whole = shards.read(0, shards.num_tokens).tolist()
    targets = [id_ for row in rows for id_ in row["targets"].tolist() if id_ != IGNORE_INDEX]
    assert targets == whole[1:]
    assert rows.num_targets == len(whole) - 1
    assert all(row["position_ids"].tolist() == [0, 1, 2, 3] for row in rows)


def test_batch_equals_rows(shards: TokenShards) -> None:
    rows = PackedSequences(shards, sequence_length=32)
    chosen = [3, 0, len(rows) - 1, 3]
    batch = rows.batch(chosen)
    for name, tensor in batch.items():
        assert tensor.shape == (4, 32)
        assert tensor.is_contiguous()
        assert torch.equal(tensor, torch.stack([rows[index][name] for index in chosen]))


def test_rows_end(shards: TokenShards) -> None:
    rows = PackedSequences(shards, sequence_length=32)
    assert torch.equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])
    with pytest.raises(IndexError, match=rf"row {len(rows)} of {len(rows)}"):
        rows[len(rows)]


def test_too_few_tokens(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    bare = TextTokenizer.load(tokenizer.folder)
    bare.special_tokens = dict.fromkeys(bare.special_tokens)
    write_token_shards(["x"], bare, tmp_path / "train")
    with pytest.raises(DataError, match=r"train: 1 tokens, too few to predict any"):
        PackedSequences(TokenShards.open(tmp_path, "train"), sequence_length=8)
