"""How commands and verbs come to a registry: the registry itself, who acts, files of evidence.

Imports nothing heavy by itself, since the command line imports it for its help.
"""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING

from samara.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from samara.registry.records import Evidence
    from samara.registry.registry import Registry


def open_registry(location: str, catalogue: str | None) -> Registry:
    """Open a registry, and make it if there is none.

    Args:
        location: Folder or fsspec URL.
        catalogue: SQLAlchemy URL; None: SQLite in the registry's folder.

    Raises:
        RegistryError: If it cannot be opened, or a package that it needs is not installed.
    """
    try:
        from samara.registry.registry import Registry
    except ModuleNotFoundError as error:
        if error.name not in ("sqlalchemy", "fsspec"):
            raise
        raise RegistryError(
            f"registry: needs {error.name}; install it with `pip install 'samara[registry]'`"
        ) from None
    return Registry.open(location, catalogue_url=catalogue)


def acting(name: str | None, *, key: str) -> str:
    """Who acts: the name given, or that of the user logged in.

    Raises:
        ConfigError: If neither has one; ``key`` is what to set.
    """
    try:
        return name or getpass.getuser()
    except OSError:  # a container's user without a name
        raise ConfigError(f"{key}: the user logged in has no name; give one") from None


def read_evidence(path: Path) -> Evidence:
    """Scores and audits of a YAML or JSON file.

    Raises:
        ConfigError: If it is missing or malformed.
    """
    from samara.config import load_yaml, validate
    from samara.registry.records import Evidence

    return validate(Evidence, load_yaml(path), path=str(path))
