"""Files recorded with size and hash, so that a damaged one is noticed before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from samara.errors import DataError
from samara.runs import hash_file

REMEDY = "remove the prepared folder and run the same command again to make it anew"


def describe(path: Path, *, name: str) -> dict[str, Any]:
    """What is recorded of a file: its name, size in bytes and SHA-256."""
    return {"name": name, "bytes": path.stat().st_size, "sha256": hash_file(path)}


def check_sizes(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Compare sizes; reads no contents.

    Raises:
        DataError: If a file is missing or of another size than recorded.
    """
    for record in records:
        path = folder / record["name"]
        if not path.exists():
            raise DataError(f"{path}: is missing; {REMEDY}")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise DataError(f"{path}: has {size} bytes instead of {record['bytes']}; {REMEDY}")


def check_contents(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Compare hashes; reads every file.

    Raises:
        DataError: If a file was altered.
    """
    for record in records:
        path = folder / record["name"]
        if hash_file(path) != record["sha256"]:
            raise DataError(f"{path}: its content was altered; {REMEDY}")
