"""Verb ``prepare``: text in; a folder of documents, tokenizer and token shards out.

A prepared corpus holds

    corpus.json                    hash, settings, statistics, every file's size and hash
    documents/{train,…}.jsonl      the kept documents with their labels, one a line
    tokenizer/                     a Hugging Face tokenizer folder
    tokens/{train,…}/              memory-mapped token shards

Documents are cleaned, then split: near-duplicates are gone before the split, so they cannot
straddle it. The tokenizer is trained on the training split only. Texts stream through; none of the
steps holds the corpus in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from samara.data.cleaning import Cleaner
from samara.data.config import LoadTokenizer, LocalFiles, PrepareConfig
from samara.data.documents import Document
from samara.data.sources import iterate_documents, iterate_validation_documents, source_key
from samara.data.splits import SPLITS, Split, split_of
from samara.data.stored_files import check_contents, check_sizes, describe
from samara.data.tokenizer import TextTokenizer, train_tokenizer
from samara.data.tokens import INDEX_FILE, TokenShards, write_token_shards
from samara.errors import DataError
from samara.progress import ProgressLine
from samara.runs import (
    RunFolder,
    hash_json,
    new_folder,
    read_json,
    write_json,
)

CORPUS_FILE = "corpus.json"
SCHEMA = 1
"""Raised whenever the same settings would give another corpus; cached ones are then made anew."""

TOP_PACKAGES = 100
"""Packages listed in the statistics, largest first."""


# --- reading ----------------------------------------------------------------------------------


class PreparedCorpus:
    """A prepared corpus on disk.

    Attributes:
        folder: Where it is.
        hash: Hash of documents, split, tokenizer and settings: equal hash, equal corpus.
        vocab_size: Rows an embedding needs.
        tokenizer_folder: A Hugging Face tokenizer folder.
        statistics: Counts by split, by package, by reason of dropping.
        special_tokens: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; None where the
            tokenizer has no such mark.
    """

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder = folder
        self.hash: str = data["hash"]
        self.vocab_size: int = data["vocab_size"]
        self.tokenizer_folder = folder / "tokenizer"
        self.statistics: dict[str, Any] = data["statistics"]
        self.special_tokens: dict[str, int | None] = data["special_tokens"]
        self._files: list[dict[str, Any]] = data["files"]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a prepared folder and check that its files are whole (sizes, not contents).

        Raises:
            DataError: If it is no prepared corpus, or a file is missing or of the wrong size.
        """
        folder = Path(folder)
        path = folder / CORPUS_FILE
        if not path.exists():
            raise DataError(
                f"{folder}: no prepared corpus there ({CORPUS_FILE} is missing); give the output "
                "folder of `samara prepare`"
            )
        data = read_json(path)
        if data.get("schema") != SCHEMA:
            raise DataError(
                f"{path}: schema {data.get('schema')}, this version reads {SCHEMA}; prepare it anew"
            )
        check_sizes(folder, data["files"])
        return cls(folder, data)

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split, in the order of its token stream."""
        with self.documents_path(split).open(encoding="utf-8") as file:
            for line in file:
                yield Document(**json.loads(line))

    def tokens(self, split: str) -> TokenShards:
        """The token stream of a split.

        Raises:
            DataError: If the split is empty or its shards are damaged.
        """
        return TokenShards.open(self.folder / "tokens", split)

    def verify(self) -> None:
        """Compare the content of every file with its recorded hash.

        Raises:
            DataError: If one was altered.
        """
        check_contents(self.folder, self._files)
        for split in SPLITS:
            if self.statistics["splits"][split]["documents"]:
                self.tokens(split).verify()

    def documents_path(self, split: str) -> Path:
        """The JSON Lines file of a split's documents."""
        return self.folder / "documents" / f"{split}.jsonl"


def open_corpus(corpus: str | PrepareConfig, *, cache: Path) -> PreparedCorpus:
    """Open a prepared corpus, or prepare one in the cache and find it again next time.

    Args:
        corpus: A prepared folder, or the settings to make one.
        cache: Where inline corpora are kept, under a hash of their settings and their content.

    Raises:
        DataError: If the folder is no prepared corpus, or preparing fails.
    """
    if isinstance(corpus, str):
        return PreparedCorpus.open(Path(corpus).expanduser())
    key = hash_json(_key(corpus))[:24]
    folder = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    # Several processes of one training run ask at once: one prepares, the others wait for it.
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / CORPUS_FILE).exists():
            for leftover in cache.glob(f".{key}.*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            return prepare(corpus, folder)
    return PreparedCorpus.open(folder)


def _key(config: PrepareConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"source"})
    if isinstance(config.tokenizer, LoadTokenizer):
        settings["tokenizer"] = TextTokenizer.load(_tokenizer_path(config.tokenizer)).hash
    return {"schema": SCHEMA, "source": source_key(config.source), "settings": settings}


def _tokenizer_path(config: LoadTokenizer) -> Path:
    return Path(config.path).expanduser()


# --- writing ----------------------------------------------------------------------------------


def prepare_verb(config: PrepareConfig, run: RunFolder) -> None:
    """Prepare a corpus in the run folder itself; a corpus that is there already is left alone.

    The corpus is made in a hidden folder inside and its parts are moved out at the end, the file
    that makes it openable last: killed at any moment, the run can be started again.
    """
    if (run.path / CORPUS_FILE).exists():
        PreparedCorpus.open(run.path)
        return
    started = time.monotonic()
    staging = run.path / ".prepared"
    for leftover in run.path.glob(".prepared.*.tmp"):
        shutil.rmtree(leftover)
    corpus = prepare(config, staging)
    write_json(
        run.path / "summary.json",
        {
            "schema": 1,
            "corpus_hash": corpus.hash,
            "vocab_size": corpus.vocab_size,
            "statistics": corpus.statistics,
            "seconds": round(time.monotonic() - started, 3),
        },
    )
    for name in ("documents", "tokenizer", "tokens", CORPUS_FILE):
        target = run.path / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(staging / name, target)
    staging.rmdir()


def prepare(config: PrepareConfig, folder: Path) -> PreparedCorpus:
    """Read, clean, split and tokenise a corpus into ``folder``, whole or not at all.

    Args:
        config: The settings.
        folder: Where it goes; a corpus that is there is replaced once the new one is complete.

    Raises:
        DataError: If the source cannot be read, leaves no documents to train or validate on, or
            the folder holds something else.
        ResourceError: If the disk is full.
    """
    if folder.exists() and not (folder / CORPUS_FILE).exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: holds other files; give a new or empty folder")
    with new_folder(folder) as staging:
        collected = _collect_documents(config, staging / "documents")
        tokenizer = _make_tokenizer(config, staging, collected)
        tokens = _write_tokens(staging, tokenizer, collected)
        statistics = _statistics(collected, tokens)
        settings = config.model_dump(mode="json")
        identity = {
            "schema": SCHEMA,
            "documents": collected.digest.hexdigest(),
            "tokenizer": tokenizer.hash,
            "cleaning": settings["cleaning"],
            "split": settings["split"],
        }
        write_json(
            staging / CORPUS_FILE,
            {
                "schema": SCHEMA,
                "hash": hash_json(identity),
                "identity": identity,
                "settings": settings,
                "vocab_size": tokenizer.vocab_size,
                "special_tokens": tokenizer.special_tokens,
                "statistics": statistics,
                "files": _file_records(staging),
            },
        )
    return PreparedCorpus.open(folder)


@dataclass
class _Collected:
    """What is counted while documents are written."""

    documents: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    packages: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, split: str, document: Document) -> None:
        data = document.text.encode("utf-8")
        self.documents[split] += 1
        self.characters[split] += len(document.text)
        self.bytes[split] += len(data)
        self.packages[document.package] += 1
        self.digest.update(hash_json([split, document.to_dict()]).encode("ascii"))


def _collect_documents(config: PrepareConfig, folder: Path) -> _Collected:
    """Read, clean and split; write each split's documents to its file."""
    folder.mkdir()
    collected = _Collected()
    cleaner = Cleaner(config.cleaning)
    files: dict[str, IO[str]] = {}
    try:
        for split in SPLITS:
            files[split] = (folder / f"{split}.jsonl").open("w", encoding="utf-8")
        with ProgressLine("documents", total=config.max_documents, unit="kept") as line:
            for number, (split, document) in enumerate(
                _split_documents(config, cleaner, collected.skipped), start=1
            ):
                json.dump(document.to_dict(), files[split], ensure_ascii=False)
                files[split].write("\n")
                collected.add(split, document)
                line.update(number)
    finally:
        for file in files.values():
            file.close()
    collected.dropped = +cleaner.dropped
    _check_not_empty(config, collected)
    return collected


def _split_documents(
    config: PrepareConfig, cleaner: Cleaner, skipped: Counter[str]
) -> Iterator[tuple[Split, Document]]:
    """The kept documents with their split.

    Documents that the source names as validation come first: what repeats them is then dropped
    from training, not the other way round.
    """
    seen: set[str] = set()
    for document in cleaner.clean(iterate_validation_documents(config.source)):
        yield "validation", _with_unique_id(document, seen)
    given = _has_validation_files(config)
    documents = cleaner.clean(iterate_documents(config.source, skipped=skipped))
    for document in itertools.islice(documents, config.max_documents):
        document = _with_unique_id(document, seen)
        yield split_of(document.id, config.split, validation_given=given), document


def _has_validation_files(config: PrepareConfig) -> bool:
    return isinstance(config.source, LocalFiles) and bool(config.source.validation_paths)


def _with_unique_id(document: Document, seen: set[str]) -> Document:
    """The document under an id not seen before: the second ``x`` becomes ``x#2``."""
    new_id, copy = document.id, 1
    while new_id in seen:
        copy += 1
        new_id = f"{document.id}#{copy}"
    seen.add(new_id)
    return document if copy == 1 else Document(**{**document.to_dict(), "id": new_id})


def _check_not_empty(config: PrepareConfig, collected: _Collected) -> None:
    dropped = ", ".join(f"{count} {reason}" for reason, count in collected.dropped.most_common())
    dropped = f" (dropped: {dropped})" if dropped else " (none was read)"
    if not collected.documents:
        raise DataError(f"source: no document is left{dropped}; give more text or relax cleaning")
    if _has_validation_files(config) and not collected.documents["validation"]:
        raise DataError(f"source.validation_paths: no document of theirs is left{dropped}")
    needed = {"train": True, "validation": config.split.validation_fraction > 0.0}
    for split, is_needed in needed.items():
        if is_needed and not collected.documents[split]:
            raise DataError(
                f"split: none of the {collected.documents.total()} documents fell into the {split} "
                "split; give more documents, other fractions or source.validation_paths, or cut "
                "text files with source.text_documents=passages"
            )


def _texts(documents: Path, line: ProgressLine, *, before: int = 0) -> Iterator[str]:
    """The texts of a split's file; shows each one read, ``before`` others counted."""
    with documents.open(encoding="utf-8") as file:
        for number, record in enumerate(file, start=before + 1):
            line.update(number)
            yield str(json.loads(record)["text"])


def _make_tokenizer(config: PrepareConfig, staging: Path, collected: _Collected) -> TextTokenizer:
    folder = staging / "tokenizer"
    if isinstance(config.tokenizer, LoadTokenizer):
        return TextTokenizer.load(_tokenizer_path(config.tokenizer)).copy_to(folder)
    total = collected.documents["train"]
    with ProgressLine("tokenizer", total=total, unit="documents") as line:
        texts = _texts(staging / "documents" / "train.jsonl", line)
        return train_tokenizer(texts, folder, vocab_size=config.tokenizer.vocab_size)


def _write_tokens(
    staging: Path, tokenizer: TextTokenizer, collected: _Collected
) -> dict[str, TokenShards]:
    shards: dict[str, TokenShards] = {}
    done = 0
    (staging / "tokens").mkdir()
    with ProgressLine("tokens", total=collected.documents.total(), unit="documents") as line:
        for split in SPLITS:
            if collected.documents[split]:
                texts = _texts(staging / "documents" / f"{split}.jsonl", line, before=done)
                write_token_shards(texts, tokenizer, staging / "tokens" / split)
                shards[split] = TokenShards.open(staging / "tokens", split)
                done += collected.documents[split]
    return shards


def _statistics(collected: _Collected, tokens: dict[str, TokenShards]) -> dict[str, Any]:
    splits = {
        split: {
            "documents": collected.documents[split],
            "characters": collected.characters[split],
            "bytes": collected.bytes[split],
            "tokens": tokens[split].num_tokens if split in tokens else 0,
        }
        for split in SPLITS
    }
    total = sum(split["tokens"] for split in splits.values())
    ranked = sorted(collected.packages.items(), key=lambda item: (-item[1], item[0]))
    return {
        "splits": splits,
        "bytes_per_token": sum(collected.bytes.values()) / total,
        "dropped": dict(sorted(collected.dropped.items())),
        "skipped": dict(sorted((+collected.skipped).items())),
        "num_packages": len(ranked),
        "packages": dict(ranked[:TOP_PACKAGES]),
    }


def _file_records(staging: Path) -> list[dict[str, Any]]:
    """Size and hash of every file so far, token shards excepted: their own index has them."""
    records = []
    for path in sorted(staging.rglob("*")):
        name = path.relative_to(staging)
        if path.is_file() and (name.parts[0] != "tokens" or path.name == INDEX_FILE):
            records.append(describe(path, name=name.as_posix()))
    return records
