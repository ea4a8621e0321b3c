"""The hash chain of the registry's log: each entry holds the hash of the one before.

Changing, removing or reordering an entry breaks the chain from there on; the catalogue also keeps
the last hash, so entries cut off at the end are missed. This finds accidents and careless edits. An
attacker who can rewrite the whole database can rewrite the chain; keep a copy of the last hash
elsewhere where that matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samara.errors import RegistryError
from samara.runs import hash_json

FIRST = "0" * 64
"""What the first entry holds for the hash of the one before."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing done to the registry.

    Attributes:
        number: 1, 2, 3, …
        at: UTC time, ISO 8601.
        actor: Who did it.
        action: ``add``, ``restore``, ``evidence``, ``gates``, ``promote``, ``hold``, ``refuse``,
            ``rollback``, ``drop`` or ``gc``.
        line: The model line, or "" for the whole registry.
        details: What was done, plain data.
        previous: Hash of the entry before.
        sha256: Hash of this entry, ``previous`` included.
    """

    number: int
    at: str
    actor: str
    action: str
    line: str
    details: Mapping[str, Any]
    previous: str
    sha256: str


def entry_hash(
    *,
    number: int,
    at: str,
    actor: str,
    action: str,
    line: str,
    details: Mapping[str, Any],
    previous: str,
) -> str:
    """Hash of an entry."""
    return hash_json([number, at, actor, action, line, dict(details), previous])


def check_chain(entries: Sequence[Entry], head: str) -> None:
    """Check a whole log.

    Args:
        entries: All of it, in order.
        head: The hash of the last entry, as kept outside the log.

    Raises:
        RegistryError: At the first entry that does not follow from the one before.
    """
    previous = FIRST
    for position, entry in enumerate(entries, start=1):
        expected = entry_hash(
            number=entry.number,
            at=entry.at,
            actor=entry.actor,
            action=entry.action,
            line=entry.line,
            details=entry.details,
            previous=entry.previous,
        )
        if entry.number != position:
            raise RegistryError(f"log: entry {position} is missing; the log was changed by hand")
        if entry.previous != previous or entry.sha256 != expected:
            raise RegistryError(
                f"log: entry {position} ({entry.action} {entry.line}) does not follow from the one "
                "before it; the log was changed by hand"
            )
        previous = entry.sha256
    if previous != head:
        raise RegistryError("log: its last entries are missing; the log was changed by hand")
