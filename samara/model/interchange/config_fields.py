"""Reads a foreign ``config.json`` key by key: required, of the right type, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from samara.errors import CheckpointError, ConfigError
from samara.model.configuration import SamaraConfig

REQUIRED: Any = object()


class ConfigFields:
    """The keys of one configuration file.

    Args:
        path: The file, for error messages.
        data: What it holds.
    """

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path = path
        self._data = data

    def get(self, key: str) -> Any:
        """The value as it stands; None where there is none."""
        return self._data.get(key)

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        """A positive whole number.

        Raises:
            CheckpointError: If it is missing without default, or something else.
        """
        return int(self._typed(key, default, _is_positive_int, "a positive whole number"))

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A positive number."""
        return float(self._typed(key, default, _is_positive, "a positive number"))

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        return bool(self._typed(key, default, lambda v: isinstance(v, bool), "true or false"))

    def token_ids(self, **defaults: int | None) -> dict[str, Any]:
        """Special token ids by key; one that is absent gets its default, one that is null none."""
        found = {}
        for key, default in defaults.items():
            value = self._data.get(key, default)
            ids = value if isinstance(value, list) else [value]
            if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids):
                raise self.error(key, "a token id or a list of them")
            found[key] = None if value in ([], -1) else value  # -1: some writers' "none"
        return found

    def refuse(self, key: str, *, unless: bool, because: str) -> None:
        """Refuse the file for the value of one key.

        Raises:
            CheckpointError: Unless the condition holds.
        """
        if not unless:
            raise CheckpointError(f"{self.path}: {key} is {self._data.get(key)!r}; {because}")

    def error(self, key: str, wanted: str) -> CheckpointError:
        """Say that a key is not what it must be."""
        if self._data.get(key) is None:
            return CheckpointError(f"{self.path}: {key} is missing, and it must be {wanted}")
        return CheckpointError(f"{self.path}: {key} is {self._data[key]!r}, and not {wanted}")

    def build(self, **fields: Any) -> SamaraConfig:
        """Make Samara's configuration of the translated fields.

        Raises:
            CheckpointError: If they do not make a model.
        """
        try:
            return SamaraConfig(**fields)
        except ConfigError as error:
            line = "; ".join(str(error).splitlines())
            raise CheckpointError(f"{self.path}: {line}") from None

    def _typed(self, key: str, default: Any, is_valid: Callable[[Any], bool], wanted: str) -> Any:
        value = self._data.get(key)
        if value is None and default is not REQUIRED:
            return default
        if not is_valid(value):
            raise self.error(key, wanted)
        return value


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
