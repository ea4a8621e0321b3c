"""Token shards on disk, and the packed sequences that training and evaluation read from them.

A split is one long stream of tokens, ``[bos] document [eos]`` after ``[bos] document [eos]`` (each
mark where the tokenizer has it). On disk the stream is cut into shard files that memory-map;
beside them stand where every document starts in it and the document's length in UTF-8 bytes, which
bits per byte need.

Tensors: b batch, t sequence; ``x_bs`` has s = t + 1 positions, the inputs and the last target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import torch

from samara.data.batching import batches
from samara.data.rows import Batch, Rows
from samara.data.stored_files import check_contents, check_sizes, describe
from samara.data.tokenizer import TextTokenizer
from samara.errors import DataError
from samara.runs import read_json, write_json

IGNORE_INDEX = -100
"""A target that is not counted (the value that cross-entropy ignores)."""

SHARD_TOKENS = 2**26
"""A shard is closed after the document that reaches this many tokens."""

ENCODE_DOCUMENTS = 1024
ENCODE_CHARACTERS = 4_000_000
"""Documents tokenised at once, and their length: bounds the memory, keeps the threads busy."""

INDEX_FILE = "index.json"
OFFSETS_FILE = "document_offsets.npy"
BYTES_FILE = "document_bytes.npy"

IntArray = npt.NDArray[np.int64]


# --- writing ----------------------------------------------------------------------------------


class _ShardWriter:
    """Appends documents to shard files, hashes as it goes, and remembers what it wrote."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.lengths: list[int] = []
        self.shards: list[dict[str, Any]] = []
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._written = 0
        self._digest = hashlib.sha256()

    def add(self, tokens: Sequence[int]) -> None:
        """Append one document; documents never span two shards."""
        if self._file is None:
            self._file = (self._folder / self._name()).open("wb")
        data = np.asarray(tokens, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._written += len(tokens)
        self.lengths.append(len(tokens))
        if self._written >= self._shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        """Finish the file being written, if there is one."""
        if self._file is None:
            return
        self._file.close()
        if self._written:  # an empty file cannot be mapped
            self.shards.append(
                {
                    "name": self._name(),
                    "tokens": self._written,
                    "bytes": self._written * self._dtype.itemsize,
                    "sha256": self._digest.hexdigest(),
                }
            )
        self._file, self._written, self._digest = None, 0, hashlib.sha256()

    def _name(self) -> str:
        return f"shard-{len(self.shards):05d}.bin"


def write_token_shards(
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenise documents once into ``folder``, which must not hold shards yet.

    Args:
        texts: The documents, in the order they get in the stream; read once, never held whole.
        tokenizer: Gives the tokens, and the marks put around each document.
        folder: Where the split goes; :meth:`TokenShards.open` reads it.
        shard_tokens: Size of a shard file in tokens.
    """
    folder.mkdir(parents=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    special = tokenizer.special_tokens
    before = [special["bos_token_id"]] if special["bos_token_id"] is not None else []
    after = [special["eos_token_id"]] if special["eos_token_id"] is not None else []
    writer = _ShardWriter(folder, dtype, shard_tokens)
    sizes: list[int] = []
    try:
        for batch in batches(
            texts, size=len, max_items=ENCODE_DOCUMENTS, max_size=ENCODE_CHARACTERS
        ):
            for tokens in tokenizer.encode_batch(batch):
                writer.add([*before, *tokens, *after])
            sizes += [len(text.encode("utf-8")) for text in batch]
    finally:
        writer.close_shard()
    offsets = np.zeros(len(sizes) + 1, dtype="<i8")
    np.cumsum(writer.lengths, out=offsets[1:])
    tables = [
        _write_table(folder / OFFSETS_FILE, offsets),
        _write_table(folder / BYTES_FILE, np.asarray(sizes, dtype="<i8")),
    ]
    write_json(
        folder / INDEX_FILE,
        {
            "schema": 1,
            "dtype": dtype.name,
            "num_tokens": int(offsets[-1]),
            "num_documents": len(sizes),
            "special_tokens": special,
            "shards": writer.shards,
            "tables": tables,
        },
    )


def _write_table(path: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
    np.save(path, array)
    return describe(path, name=path.name)


# --- reading ----------------------------------------------------------------------------------


class TokenShards:
    """One split's token stream, memory-mapped: opening it reads no tokens.

    Attributes:
        folder: The prepared corpus' ``tokens`` folder.
        split: ``train``, ``validation`` or ``test``.
        num_tokens: Length of the stream, marks included.
        num_documents: Documents in it.
        document_offsets: (num_documents + 1,) int64; document i is
            ``stream[document_offsets[i] : document_offsets[i + 1]]``.
        document_bytes: (num_documents,) int64; UTF-8 bytes of each document's text.
        pad_token_id: What stands in padded positions: the tokenizer's padding, else its
            end-of-text mark, else 0. Padded positions are never counted.
    """

    def __init__(self, folder: Path, split: str, index: dict[str, Any]) -> None:
        self.folder = folder
        self.split = split
        self.num_tokens = int(index["num_tokens"])
        self.num_documents = int(index["num_documents"])
        special = index["special_tokens"]
        self.pad_token_id = next(
            (id_ for id_ in (special["pad_token_id"], special["eos_token_id"]) if id_ is not None),
            0,
        )
        self._files: list[dict[str, Any]] = [*index["shards"], *index["tables"]]
        path = folder / split
        check_sizes(path, self._files)
        self.document_offsets: IntArray = np.load(path / OFFSETS_FILE, mmap_mode="r")
        self.document_bytes: IntArray = np.load(path / BYTES_FILE, mmap_mode="r")
        self._shards = [
            np.memmap(path / shard["name"], dtype=index["dtype"], mode="r")
            for shard in index["shards"]
        ]
        lengths = [shard["tokens"] for shard in index["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        """Open a split.

        Args:
            folder: The ``tokens`` folder of a prepared corpus.
            split: ``train``, ``validation`` or ``test``.

        Raises:
            DataError: If the split has no documents, or a file is missing or of the wrong size.
        """
        path = folder / split / INDEX_FILE
        if not path.exists():
            raise DataError(
                f"{folder / split}: no tokens there; the corpus has no {split} documents, or was "
                "not prepared to the end (run `samara prepare` again)"
            )
        return cls(folder, split, read_json(path))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again instead of receiving their content.
        return (type(self).open, (self.folder, self.split))

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens ``start`` to ``stop`` (excluded) of the stream, across shard files."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[npt.NDArray[Any]] = []
        while start < stop:
            shard, origin = self._shards[first], int(self._starts[first])
            end = min(stop, int(self._starts[first + 1]))
            parts.append(shard[start - origin : end - origin])
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def verify(self) -> None:
        """Read every file and compare its content with the recorded hash.

        Raises:
            DataError: If a file was altered.
        """
        check_sizes(self.folder / self.split, self._files)
        check_contents(self.folder / self.split, self._files)


# --- packing ----------------------------------------------------------------------------------


class PackedSequences(Rows):
    """Rows of ``sequence_length`` tokens cut from the stream, for training and evaluation.

    Row i holds the inputs ``stream[i*t : i*t + t]`` and the targets one further on, so each token
    of the stream but the first is a target exactly once. The last row is padded. Documents are
    packed back to back: nothing is thrown away.

    With ``document_boundaries`` a document sees nothing of the one before it: positions start anew
    at each document (attention follows them), and the step from the last token of a document to
    the first of the next is not counted.
    """

    def __init__(
        self, shards: TokenShards, *, sequence_length: int, document_boundaries: bool = True
    ) -> None:
        """Pack a split.

        Args:
            shards: The split.
            sequence_length: Inputs per row, t.
            document_boundaries: Whether packed documents are kept apart.

        Raises:
            DataError: If the split holds fewer than two tokens.
        """
        if shards.num_tokens < 2:
            raise DataError(
                f"{shards.folder / shards.split}: {shards.num_tokens} tokens, too few to predict "
                "any; give more text"
            )
        self.shards = shards
        self.sequence_length = sequence_length
        self.document_boundaries = document_boundaries

    def __len__(self) -> int:
        return -(-(self.shards.num_tokens - 1) // self.sequence_length)

    @property
    def num_targets(self) -> int:
        """Targets that count, over all rows."""
        crossings = 0
        if self.document_boundaries:
            offsets = self.shards.document_offsets
            full = np.count_nonzero(np.diff(offsets))
            crossings = max(0, int(full) - 1)
        return self.shards.num_tokens - 1 - crossings

    def batch(self, rows: Sequence[int]) -> Batch:
        """Several rows at once: ``input_ids``, ``targets``, ``position_ids``, ``document_ids``.

        Args:
            rows: Row numbers, b of them; numbers past the end begin again.

        Returns:
            int64 tensors (b, t). ``targets`` are shifted already and IGNORE_INDEX where nothing is
            to be predicted; ``document_ids`` is the document's number in the split, -1 on padding.
        """
        length, total = self.sequence_length, self.shards.num_tokens
        tokens_bs = np.full((len(rows), length + 1), self.shards.pad_token_id, dtype=np.int64)
        starts_b1 = (np.asarray(rows, dtype=np.int64) % len(self))[:, None] * length
        for row, start in enumerate(starts_b1[:, 0].tolist()):
            stop = min(start + length + 1, total)
            tokens_bs[row, : stop - start] = self.shards.read(start, stop)
        positions_bs = starts_b1 + np.arange(length + 1)
        offsets = self.shards.document_offsets
        documents_bs = np.searchsorted(offsets, positions_bs, side="right") - 1
        padding_bs = positions_bs >= total
        counted_bt = ~padding_bs[:, 1:]
        row_starts_bs = starts_b1
        if self.document_boundaries:
            counted_bt &= documents_bs[:, 1:] == documents_bs[:, :-1]
            # offsets[-1] is the end of the stream, so padding restarts like one more document.
            row_starts_bs = np.maximum(offsets[documents_bs], starts_b1)
        position_ids_bs = positions_bs - row_starts_bs
        documents_bs[padding_bs] = -1
        targets_bt = np.where(counted_bt, tokens_bs[:, 1:], IGNORE_INDEX)
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(tokens_bs[:, :-1])),
            "targets": torch.from_numpy(targets_bt),
            "position_ids": torch.from_numpy(np.ascontiguousarray(position_ids_bs[:, :-1])),
            "document_ids": torch.from_numpy(np.ascontiguousarray(documents_bs[:, :-1])),
        }
