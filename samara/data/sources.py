"""Where text comes from: the interpreter's documentation, local files, hub datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from samara.data import hub, interpreter_docs, local_files
from samara.data.config import InterpreterDocs, LocalFiles, Source
from samara.data.documents import Document
from samara.runs import hash_file

__all__ = ["Document", "iterate_documents", "iterate_validation_documents", "source_key"]


def iterate_documents(source: Source, *, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Read a source's documents, always in the same order, one at a time.

    Args:
        source: The settings.
        skipped: Counts what could not be read, by reason, where the source tolerates that.

    Raises:
        DataError: If the source is missing, unreadable, or names a field that is not there.
    """
    skipped = skipped if skipped is not None else Counter()
    if isinstance(source, InterpreterDocs):
        return interpreter_docs.read_documentation(source, skipped=skipped)
    if isinstance(source, LocalFiles):
        return local_files.read_files(source, local_files.training_files(source))
    return hub.read_dataset(source)


def iterate_validation_documents(
    source: Source,
) -> Iterator[Document]:
    """Read the documents that the source itself names as its validation split; often none."""
    if isinstance(source, LocalFiles):
        return local_files.read_files(source, local_files.validation_files(source))
    return iter(())


def source_key(source: Source) -> dict[str, Any]:
    """Plain data that is equal for equal content: what a prepared corpus is cached under.

    Interpreter documentation: the installed distributions and their versions. Files, and a local
    folder given as a hub dataset: a hash of each one's content. Hub dataset: its name and revision.
    """
    if isinstance(source, InterpreterDocs):
        return interpreter_docs.content_key(source)
    if isinstance(source, LocalFiles):
        return {
            **source.model_dump(mode="json", exclude={"paths", "validation_paths"}),
            "files": _content(local_files.training_files(source)),
            "validation": _content(local_files.validation_files(source)),
        }
    settings = source.model_dump(mode="json", exclude={"streaming"})
    folder = Path(source.name)
    if folder.is_dir():
        settings["files"] = _content(sorted(p for p in folder.rglob("*") if p.is_file()))
    return settings


def _content(paths: Sequence[Path]) -> list[list[str]]:
    return [[path.name, hash_file(path)] for path in paths]
