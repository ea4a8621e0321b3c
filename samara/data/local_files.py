"""Text, JSON Lines and Parquet files as documents, plain or gzipped, found by path or pattern."""

from __future__ import annotations

import glob
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from samara.data.config import LocalFiles
from samara.data.documents import LABELS, Document, first_line, readable
from samara.data.text_lines import open_file, read_json_lines, read_lines
from samara.errors import DataError, did_you_mean

KINDS = (".txt", ".jsonl", ".parquet")

PASSAGE_CHARACTERS = 1000
"""A passage of a text file ends at the first blank line after this many characters."""


def find_files(patterns: Sequence[str], *, key: str) -> list[Path]:
    """The files that paths and glob patterns name, sorted, each once.

    Args:
        patterns: Paths or patterns; ``**`` matches any number of folders.
        key: The key of the recipe they come from, for the error.

    Raises:
        DataError: If one of them names nothing, or a file of a kind that cannot be read.
    """
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if glob.has_magic(expanded) and not os.path.exists(expanded):
            matches = [Path(path) for path in glob.glob(expanded, recursive=True)]
            files = [path for path in matches if path.is_file()]
            if not files:
                raise DataError(f"{key}: '{pattern}' matches no file (looked from {Path.cwd()})")
        else:
            if not os.path.exists(expanded):
                raise DataError(f"{key}: '{pattern}': no such file (looked from {Path.cwd()})")
            if os.path.isdir(expanded):
                raise DataError(f"{key}: '{pattern}' is a folder; write '{pattern}/**/*.txt'")
            files = [Path(expanded)]
        for file in files:
            _kind(file)
        found.update(files)
    return sorted(found)


def training_files(source: LocalFiles) -> list[Path]:
    """The files of ``source.paths`` that are not validation files."""
    held_out = {path.resolve() for path in validation_files(source)}
    files = find_files(source.paths, key="source.paths")
    return [path for path in files if path.resolve() not in held_out]


def validation_files(source: LocalFiles) -> list[Path]:
    """The files of ``source.validation_paths``; none if they are left out."""
    return find_files(source.validation_paths, key="source.validation_paths")


def read_files(source: LocalFiles, paths: Sequence[Path]) -> Iterator[Document]:
    """The documents of the files, in order.

    A document's id is the record's own ``id``, else the file and the line.

    Raises:
        DataError: If a file cannot be read, with the file and the line.
    """
    if not paths:
        return
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    for path in paths:
        label = path.resolve().relative_to(root).as_posix()
        kind = _kind(path)
        if kind == ".jsonl":
            yield from _read_json_lines(path, label, source.text_field)
        elif kind == ".parquet":
            yield from _read_parquet(path, label, source.text_field)
        elif source.text_documents == "passages":
            yield from _read_passages(path, label)
        else:
            yield make_document("".join(read_lines(path)), id=label, module=label)


def make_document(text: str, *, id: str, **labels: str) -> Document:
    """A document of ``text`` with its summary filled in."""
    text = readable(text).strip()
    return Document(id=id, text=text, **{"summary": first_line(text), **labels})


def document_of_record(record: Any, *, text_field: str, origin: str, default_id: str) -> Document:
    """The document of a record: text, id and the labels it has.

    Args:
        record: A mapping of fields.
        text_field: The field that holds the text.
        origin: Where the record stands; an error starts with it.
        default_id: The document's id where the record has none.

    Raises:
        DataError: If the record has no such field, or it holds no text.
    """
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a record is a mapping of fields, this one is {record!r:.60}")
    if text_field not in record:
        raise DataError(
            f"{origin}: no field '{text_field}'{did_you_mean(text_field, map(str, record))}; "
            "name the field that holds the text with source.text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{origin}: field '{text_field}' holds {text!r:.60}, not text")
    labels = {label: readable(str(record[label])) for label in LABELS if record.get(label)}
    own = record.get("id")
    named = isinstance(own, (str, int)) and str(own) != ""
    return make_document(text, id=readable(str(own)) if named else default_id, **labels)


# --- by kind ----------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    for kind in KINDS:
        if name.endswith(kind):
            return kind
    raise DataError(f"{path}: cannot be read; give .txt, .jsonl or .parquet, each also with .gz")


def _read_json_lines(path: Path, label: str, text_field: str) -> Iterator[Document]:
    for number, record in read_json_lines(path):
        yield document_of_record(
            record,
            text_field=text_field,
            origin=f"{path}:{number}",
            default_id=f"{label}:{number}",
        )


def _read_passages(path: Path, label: str) -> Iterator[Document]:
    passage: list[str] = []
    start = size = 0
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip() and size >= PASSAGE_CHARACTERS:
            yield make_document("".join(passage), id=f"{label}:{start}", module=label)
            passage, size = [], 0
        elif passage or line.strip():
            start = start if passage else number
            passage.append(line)
            size += len(line)
    if passage:
        yield make_document("".join(passage), id=f"{label}:{start}", module=label)


def _read_parquet(path: Path, label: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: Parquet files need the package pyarrow; pip install 'samara[data]'"
        ) from None
    try:
        with open_file(path) as file:
            table = pyarrow.parquet.ParquetFile(
                io.BytesIO(file.read()) if path.name.endswith(".gz") else file
            )
            columns = {text_field, "id", *LABELS} & set(table.schema_arrow.names)
            if text_field not in columns:
                fields = did_you_mean(text_field, table.schema_arrow.names)
                raise DataError(
                    f"{path}: no field '{text_field}'{fields}; name the field that holds the text "
                    "with source.text_field"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=sorted(columns)):
                for record in batch.to_pylist():
                    number += 1
                    yield document_of_record(
                        record,
                        text_field=text_field,
                        origin=f"{path}, row {number}",
                        default_id=f"{label}:{number}",
                    )
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
