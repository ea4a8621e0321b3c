"""Tokenizers: trained here (byte-level BPE) or loaded from any Hugging Face tokenizer folder.

A trained tokenizer is lossless: ``decode(encode(text)) == text`` for every text, since its smallest
entries are the 256 bytes and it normalises nothing. Its first ids are ``<|pad|>``, ``<|bos|>`` and
``<|eos|>``. Text can never contain these marks: a document that spells ``<|eos|>`` is encoded as
ordinary characters.

For training, the marks are put around each document explicitly (see :mod:`samara.data.tokens`).
The saved folder, as read by ``AutoTokenizer``, prepends ``<|bos|>`` to what it encodes, so that a
prompt starts the way a document starts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from samara.errors import DataError
from samara.runs import hash_files, write_json

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
FOLDER_FILES = (TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "chat_template.jinja")
"""What a tokenizer folder may hold that belongs to the tokenizer."""

MARKS = ("bos_token", "eos_token", "pad_token")


class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        folder: Where it is saved.
        vocab_size: Rows an embedding needs: the largest id plus one.
        special_tokens: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; None where the
            tokenizer has no such mark.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, marks: dict[str, str | None]) -> None:
        self.folder = folder
        self._tokenizer = tokenizer
        # A mark spelled out in a document is text, not a mark.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens: dict[str, int | None] = {
            f"{name}_id": tokenizer.token_to_id(mark) if mark else None
            for name, mark in marks.items()
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Open a tokenizer folder, or the tokenizer of a prepared corpus.

        Raises:
            DataError: If the folder has no readable ``tokenizer.json``.
        """
        folder = path / "tokenizer" if (path / "tokenizer" / TOKENIZER_FILE).exists() else path
        file = folder / TOKENIZER_FILE
        if not file.exists():
            raise DataError(
                f"{path}: no {TOKENIZER_FILE} there; give a folder saved by a fast Hugging Face "
                "tokenizer (tokenizer.save_pretrained), or a prepared corpus"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(f"{file}: cannot be read as a tokenizer: {error}") from error
        return cls(folder, tokenizer, _read_marks(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without marks."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without marks; uses the machine's cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; marks are written out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @property
    def hash(self) -> str:
        """Content hash of the saved files."""
        names = [name for name in FOLDER_FILES if (self.folder / name).exists()]
        return hash_files({name: self.folder / name for name in names})

    def copy_to(self, folder: Path) -> Self:
        """Copy the tokenizer's files to a new folder and open it there."""
        folder.mkdir(parents=True)
        for name in FOLDER_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)
        if not (folder / CONFIG_FILE).exists():  # a bare tokenizer.json; AutoTokenizer needs both
            write_json(folder / CONFIG_FILE, {"tokenizer_class": "PreTrainedTokenizerFast"})
        return self.load(folder)


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer folder.

    Args:
        texts: The documents to learn from; read once, never held whole.
        folder: Where it is saved; must not exist.
        vocab_size: Entries, special tokens and the 256 bytes included.

    Raises:
        DataError: If the texts are too few or too alike to give that many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise DataError(
            f"tokenizer.vocab_size: the training text gives only {reached} entries, {vocab_size} "
            f"were asked for; set it to {reached} or less, or give more text"
        )
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    write_json(
        folder / CONFIG_FILE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
        },
    )
    return TextTokenizer.load(folder)


def _read_marks(folder: Path) -> dict[str, str | None]:
    """The spelling of the special tokens, as the folder's configuration files name them."""
    marks: dict[str, str | None] = dict.fromkeys(MARKS)
    for name in ("special_tokens_map.json", CONFIG_FILE):
        path = folder / name
        if not path.exists():
            continue
        try:
            settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from error
        for mark in MARKS:
            value = settings.get(mark)
            if isinstance(value, dict):
                value = value.get("content")
            if value:
                marks[mark] = str(value)
    return marks
