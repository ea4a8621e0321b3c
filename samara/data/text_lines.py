"""Text files, plain or gzipped, read line by line; a mistake in one names file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from samara.errors import DataError


def open_file(path: Path) -> BinaryIO:
    """Open a file, unpacking it where its name ends in .gz."""
    try:
        return cast(BinaryIO, gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file."""
    number = 0
    with open_file(path) as file:
        try:
            for line in file:
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8 (byte {error.start} of the line is "
                f"0x{error.object[error.start]:02x}); convert the file, as with iconv"
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read to the end: {error}") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank.

    Raises:
        DataError: If the file cannot be read, or a line is not JSON.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON: {error}; mend or remove the line"
            ) from error
