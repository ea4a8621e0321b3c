"""OpenELM's way from text to rows (arXiv 2404.14619, section 2 and its released code).

Each document is split on single spaces into chunks of 2048 words. A chunk with fewer than 200
characters is dropped (counted after lower-casing, without punctuation, runs of white space as one).
The others are put in Unicode's NFC form, tokenised, and given begin and end marks; one with fewer
than 256 tokens, marks included, is dropped. A row is one chunk, cut to 2049 tokens, or padded.

Text is tokenised when a row is read, not before: another tokenizer needs no other corpus. Differs
from OpenELM: a first reading finds out which chunks are kept, so that rows have numbers, and
training can shuffle them and go on where it was interrupted.

:func:`compare_paths` measures what it costs beside :class:`~samara.data.tokens.PackedSequences`,
which drops and pads nothing but the end of the last row.
"""

from __future__ import annotations

import itertools
import json
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samara.data.rows import Batch, Rows
from samara.data.tokenizer import TextTokenizer
from samara.data.tokens import IGNORE_INDEX
from samara.errors import DataError

SCAN_DOCUMENTS = 256
"""Documents tokenised at once by the first reading."""

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class ChunkRules:
    """Which pieces of text become rows; the defaults are the paper's.

    Attributes:
        words: Words of a chunk, what stands between single spaces.
        min_characters: Chunks with fewer, after normalising, are dropped.
        min_tokens: Chunks with fewer, marks included, are dropped.
        sequence_length: Inputs of a row, t; a chunk is cut to one token more.
    """

    words: int = 2048
    min_characters: int = 200
    min_tokens: int = 256
    sequence_length: int = 2048


# --- one document -----------------------------------------------------------------------------


def split_words(text: str, *, words: int) -> list[str]:
    """Cut a text into chunks of ``words`` pieces between single spaces."""
    pieces = text.split(" ")
    return [" ".join(pieces[i : i + words]) for i in range(0, len(pieces), words)]


def normalised_length(text: str) -> int:
    """Characters that count: lower case, no ASCII punctuation, a run of white space as one."""
    bare = text.lower().translate(_WITHOUT_PUNCTUATION).strip()
    return len(re.sub(r"\s+", " ", bare))


class ChunkEncoder:
    """Chunks to token ids, marks included."""

    def __init__(self, tokenizer: TextTokenizer, rules: ChunkRules) -> None:
        self._tokenizer, self._rules = tokenizer, rules
        special = tokenizer.special_tokens
        self._before = _mark(special["bos_token_id"])
        self._after = _mark(special["eos_token_id"])
        self.num_end_marks = len(self._after)
        self.num_marks = len(self._before) + self.num_end_marks

    def encode(self, chunks: Sequence[str]) -> list[list[int]]:
        """Token ids of each chunk, neither dropped nor cut."""
        texts = [unicodedata.normalize("NFC", chunk) for chunk in chunks]
        encoded = self._tokenizer.encode_batch(texts)
        return [[*self._before, *ids, *self._after] for ids in encoded]

    def is_long_enough(self, chunk: str) -> bool:
        """Whether a chunk has characters enough."""
        return normalised_length(chunk) >= self._rules.min_characters

    def is_kept(self, tokens: Sequence[int]) -> bool:
        """Whether an encoded chunk has tokens enough."""
        return len(tokens) >= self._rules.min_tokens


def _mark(token_id: int | None) -> list[int]:
    return [] if token_id is None else [token_id]


# --- rows -------------------------------------------------------------------------------------


class DocumentLines:
    """The texts of a prepared split by number, read from its ``documents/*.jsonl`` when asked."""

    def __init__(self, path: Path) -> None:
        """Find where the lines start.

        Raises:
            DataError: If there is no such file.
        """
        if not path.exists():
            raise DataError(
                f"{path}: no such file; give documents/train.jsonl of a folder made by "
                "`samara prepare`"
            )
        self.path = path
        with path.open("rb") as file:
            lengths = [len(line) for line in file]
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        """The text of one document."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        start, stop = self._offsets[index : index + 2].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            record: dict[str, Any] = json.loads(file.read(stop - start))
        return str(record["text"])

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for line in file:
                yield str(json.loads(line)["text"])


class ChunkRows(Rows):
    """OpenELM's rows of a prepared split, tokenised when they are read."""

    def __init__(
        self,
        documents: DocumentLines,
        tokenizer: TextTokenizer,
        *,
        rules: ChunkRules = ChunkRules(),
    ) -> None:
        """Read the documents once to find the chunks that are kept.

        Args:
            documents: The split's texts.
            tokenizer: Gives the tokens and marks.
            rules: What is kept, and the size of a row.

        Raises:
            DataError: If no chunk is kept.
        """
        self.documents, self.rules = documents, rules
        self.sequence_length = rules.sequence_length
        self._folder, self._encoder = tokenizer.folder, ChunkEncoder(tokenizer, rules)
        special = tokenizer.special_tokens
        marks = (special["pad_token_id"], special["eos_token_id"])
        self._pad_token_id = next((mark for mark in marks if mark is not None), 0)
        self._rows = np.array(list(self._scan()), dtype=np.int64).reshape(-1, 2)
        if not len(self._rows):
            raise DataError(
                f"{documents.path}: OpenELM's rules keep none of the {len(documents)} documents "
                f"(at least {rules.min_characters} characters and {rules.min_tokens} tokens in "
                f"{rules.words} words); lower them or use packed rows"
            )

    def _scan(self) -> Iterator[tuple[int, int]]:
        """Document, and number of the chunk in it, of each row."""
        numbered = enumerate(self.documents)
        while group := list(itertools.islice(numbered, SCAN_DOCUMENTS)):
            found = {
                (document, number): chunk
                for document, text in group
                for number, chunk in enumerate(split_words(text, words=self.rules.words))
                if self._encoder.is_long_enough(chunk)
            }
            encoded = self._encoder.encode(list(found.values()))
            for place, tokens in zip(found, encoded, strict=True):
                if self._encoder.is_kept(tokens):
                    yield place

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the tokenizer itself.
        return {name: value for name, value in vars(self).items() if name != "_encoder"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._encoder = ChunkEncoder(TextTokenizer.load(self._folder), self.rules)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows at once, in the form of ``PackedSequences.batch``.

        Args:
            rows: Row numbers, b of them; numbers past the end begin again.
        """
        length = self.sequence_length
        places = self._rows[np.asarray(rows, dtype=np.int64) % len(self)]
        words = self.rules.words
        chunks = [split_words(self.documents[d], words=words)[c] for d, c in places.tolist()]
        tokens_bs = np.full((len(rows), length + 1), self._pad_token_id, dtype=np.int64)
        sizes_b1 = np.empty((len(rows), 1), dtype=np.int64)
        for i, tokens in enumerate(self._encoder.encode(chunks)):
            cut = tokens[: length + 1]
            tokens_bs[i, : len(cut)] = cut
            sizes_b1[i] = len(cut)
        positions_bt = np.broadcast_to(np.arange(length), (len(rows), length))
        is_text = positions_bt < sizes_b1
        counted = positions_bt + 1 < sizes_b1
        arrays = {
            "input_ids": np.ascontiguousarray(tokens_bs[:, :-1]),
            "targets": np.where(counted, tokens_bs[:, 1:], IGNORE_INDEX),
            # Padding is a document of its own, so that it attends to no text.
            "position_ids": np.where(is_text, positions_bt, positions_bt - sizes_b1),
            "document_ids": np.where(is_text, places[:, :1], -1),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# --- what it costs ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PathCost:
    """What becomes of a corpus on one path.

    Attributes:
        rows: Rows of one pass.
        slots: Input positions of all rows.
        padding: Slots that hold no token.
        text_tokens: Tokens of all text, without marks, as this path would cut it.
        lost_tokens: Text tokens that no row holds, by reason.
    """

    rows: int
    slots: int
    padding: int
    text_tokens: int
    lost_tokens: dict[str, int]

    @property
    def padding_share(self) -> float:
        """Share of the computed positions that is padding."""
        return self.padding / self.slots if self.slots else 0.0

    @property
    def lost_share(self) -> float:
        """Share of the text that is never trained on."""
        return sum(self.lost_tokens.values()) / self.text_tokens if self.text_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class PathComparison:
    """OpenELM's path beside packing, over the same documents."""

    documents: int
    openelm: PathCost
    packed: PathCost


def compare_paths(
    texts: Iterable[str], tokenizer: TextTokenizer, *, rules: ChunkRules = ChunkRules()
) -> PathComparison:
    """Measure padding and lost text of both paths.

    Args:
        texts: The documents; read once.
        tokenizer: Of both paths.
        rules: OpenELM's; packed rows have the same length.
    """
    encoder = ChunkEncoder(tokenizer, rules)
    lost = {"short_characters": 0, "short_tokens": 0, "cut": 0}
    documents = rows = used = text_tokens = stream_tokens = packed_text = 0
    iterator = iter(texts)
    while group := list(itertools.islice(iterator, SCAN_DOCUMENTS)):
        documents += len(group)
        whole = [len(ids) for ids in tokenizer.encode_batch(group)]
        packed_text += sum(whole)
        stream_tokens += sum(whole) + encoder.num_marks * len(group)
        chunks = [chunk for text in group for chunk in split_words(text, words=rules.words)]
        for chunk, tokens in zip(chunks, encoder.encode(chunks), strict=True):
            text_size = len(tokens) - encoder.num_marks
            text_tokens += text_size
            if not encoder.is_long_enough(chunk):
                lost["short_characters"] += text_size
            elif not encoder.is_kept(tokens):
                lost["short_tokens"] += text_size
            else:
                rows += 1
                used += min(len(tokens), rules.sequence_length)
                lost["cut"] += _cut_off(tokens, encoder, rules)
    packed_rows = -(-max(0, stream_tokens - 1) // rules.sequence_length)
    packed_slots = packed_rows * rules.sequence_length
    return PathComparison(
        documents=documents,
        openelm=PathCost(
            rows=rows,
            slots=rows * rules.sequence_length,
            padding=rows * rules.sequence_length - used,
            text_tokens=text_tokens,
            lost_tokens=lost,
        ),
        packed=PathCost(
            rows=packed_rows,
            slots=packed_slots,
            padding=packed_slots - min(stream_tokens, packed_slots),
            text_tokens=packed_text,
            lost_tokens={},
        ),
    )


def _cut_off(tokens: Sequence[int], encoder: ChunkEncoder, rules: ChunkRules) -> int:
    """Text tokens behind the cut; the end mark is no text."""
    behind = len(tokens) - (rules.sequence_length + 1)
    return max(0, behind - encoder.num_end_marks)
