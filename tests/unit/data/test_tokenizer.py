"""Training, loading and saving tokenizers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from samara.data.tokenizer import TextTokenizer, train_tokenizer
from samara.errors import DataError

TEXTS = ["the seed of the elm", "the wind carries the seed", "the elm sheds the seed"] * 20


def test_first_ids_are_the_marks(tokenizer: TextTokenizer) -> None:
    assert tokenizer.special_tokens == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert tokenizer.vocab_size == 320


def test_encoding_adds_no_marks(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("the seed of the elm")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode_batch(["the seed of the elm", ""]) == [ids, []]


def test_spelled_marks_are_text(tokenizer: TextTokenizer) -> None:
    text = "a <|bos|> b <|eos|><|pad|>"
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2]) == f"<|bos|>{text}<|eos|>"


def test_training_repeats_in_another_process(tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        script = (
            "from pathlib import Path\n"
            "from samara.data.tokenizer import train_tokenizer\n"
            f"texts = {TEXTS!r}\n"
            f"print(train_tokenizer(texts, Path({str(tmp_path / name)!r}), vocab_size=270).hash)"
        )
        command = [sys.executable, "-c", script]
        hashes.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(hashes) == 1


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"^tokenizer\.vocab_size: the training text gives only \d+ entries, 5000 were asked",
    ):
        train_tokenizer(TEXTS, tmp_path / "t", vocab_size=5000)
    assert not (tmp_path / "t").exists()


def test_auto_tokenizer_loads_it(tokenizer: TextTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    text = "the seed ,  of  the elm ."
    ids = tokenizer.encode(text)
    assert loaded(text)["input_ids"] == [1, *ids]  # a prompt starts as a document does
    assert loaded.decode(ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)
    assert len(loaded) == tokenizer.vocab_size


def test_load_copy_and_hash(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    copy = TextTokenizer.load(tokenizer.folder).copy_to(tmp_path / "copy")
    assert copy.hash == tokenizer.hash
    assert copy.special_tokens == tokenizer.special_tokens
    assert copy.encode("the elm") == tokenizer.encode("the elm")


def test_load_from_a_prepared_corpus(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.copy_to(tmp_path / "tokenizer")
    assert TextTokenizer.load(tmp_path).folder == tmp_path / "tokenizer"


def test_bare_tokenizer_json(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes())
    bare = TextTokenizer.load(tmp_path)
    assert set(bare.special_tokens.values()) == {None}
    copy = bare.copy_to(tmp_path / "copy")
    loaded = transformers.AutoTokenizer.from_pretrained(copy.folder)
    assert loaded.decode(copy.encode("the elm")) == "the elm"


@pytest.mark.parametrize("bos", ["<|bos|>", {"content": "<|bos|>", "lstrip": False}])
def test_marks_in_either_spelling(tokenizer: TextTokenizer, tmp_path: Path, bos: object) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": bos}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    special = TextTokenizer.load(tmp_path).special_tokens
    assert special == {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json there; give a folder saved by"):
        TextTokenizer.load(tmp_path)


def test_damaged_files(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer.folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        TextTokenizer.load(tmp_path)
