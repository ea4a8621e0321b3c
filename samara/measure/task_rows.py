"""The rows of a task: JSON Lines or tables, and prompts filled from them.

Every error names the file and the line.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.data.text_lines import read_json_lines, read_lines
from samara.errors import ConfigError, DataError, did_you_mean

SUFFIXES = (".jsonl", ".csv", ".tsv")
FIELD = re.compile(r"(?P<name>[^\[\]!:{}]+)(?:\[(?P<entry>\d+)\])?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its fields and where they stand."""

    fields: Mapping[str, Any]
    path: Path
    line: int

    @property
    def origin(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def id(self) -> str | None:
        """The row's own id, where it has one."""
        own = self.fields.get("id")
        return str(own) if isinstance(own, (str, int)) and str(own) else None

    def get(self, field: str) -> Any:
        """The value of a field.

        Raises:
            DataError: If the row has no such field, or nothing in it.
        """
        if field not in self.fields:
            hint = did_you_mean(field, map(str, self.fields))
            raise DataError(f"{self.origin}: no field '{field}'{hint}")
        if self.fields[field] is None:
            raise DataError(f"{self.origin}: field '{field}' is empty")
        return self.fields[field]

    def texts(self, field: str) -> list[str]:
        """The entries of a field that holds a list of texts; a text is a list of one.

        Raises:
            DataError: If the field is missing or holds something else.
        """
        value = self.get(field)
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, (str, int, float)) for entry in entries):
            raise DataError(f"{self.origin}: field '{field}' holds {value!r:.60}, not texts")
        return [as_text(entry) for entry in entries]


def as_text(value: str | int | float) -> str:
    """A value as it is written in JSON, a text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


# --- reading ----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        DataError: If the file is missing, of a kind that cannot be read, malformed or empty.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot be read; give .jsonl, .csv or .tsv, each also with .gz")
    if suffix == ".jsonl":
        rows = list(_json_rows(path))
    else:
        rows = list(_table_rows(path, "\t" if suffix == ".tsv" else ","))
    if not rows:
        raise DataError(f"{path}: holds no rows, so there is nothing to score")
    return rows


def _json_rows(path: Path) -> Iterator[Row]:
    for number, fields in read_json_lines(path):
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{number}: a row is a mapping of fields, not {fields!r:.60}")
        yield Row(fields=fields, path=path, line=number)


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    text = io.StringIO("".join(read_lines(path)), newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(values)} columns, the first line names {len(header)}"
                )
            if values:
                yield Row(fields=dict(zip(header, values, strict=True)), path=path, line=line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a valid table: {error}") from error


# --- prompts ----------------------------------------------------------------------------------


def fill(template: str, row: Row, *, key: str) -> str:
    """Fill the ``{field}`` and ``{field[0]}`` of a template from a row.

    Args:
        template: The text; ``{{`` and ``}}`` are braces.
        row: Where the fields come from.
        key: The key of the task file that holds the template, for errors.

    Raises:
        ConfigError: If the template's braces do not make sense.
        DataError: If the row lacks a field, or it holds no single value.
    """
    return "".join(
        literal if name is None else _value(row, name, entry)
        for literal, name, entry in _parse(template, key)
    )


@functools.lru_cache(maxsize=256)
def _parse(template: str, key: str) -> tuple[tuple[str, str | None, int | None], ...]:
    """Pieces of a template: (text, None, None) or ("", field, entry)."""
    pieces: list[tuple[str, str | None, int | None]] = []
    try:
        for literal, field, form, conversion in string.Formatter().parse(template):
            pieces.append((literal, None, None))
            if field is None:
                continue
            match = FIELD.fullmatch(field)
            if match is None or form or conversion:
                raise ValueError(f"'{{{field}}}' is no field")
            entry = match["entry"]
            pieces.append(("", match["name"], None if entry is None else int(entry)))
    except ValueError as error:
        raise ConfigError(
            f"{key}: {error}; a field is written {{name}} or {{name[0]}}, a brace {{{{ or }}}}"
        ) from error
    return tuple(pieces)


def _value(row: Row, name: str, entry: int | None) -> str:
    value = row.get(name)
    if entry is not None:
        if not isinstance(value, list) or entry >= len(value):
            raise DataError(f"{row.origin}: field '{name}' has no entry {entry}")
        value = value[entry]
    if not isinstance(value, (str, int, float)):
        raise DataError(
            f"{row.origin}: field '{name}' holds {value!r:.60}; a prompt takes single values, "
            f"as {{{name}[0]}}"
        )
    return as_text(value)
