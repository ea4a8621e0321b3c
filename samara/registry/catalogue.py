"""What the catalogue knows, read and written: versions, aliases, evidence, gates, the log.

Every function takes an open connection; those that write belong into one of
:func:`samara.registry.tables.writing`, so that a change and its log entry stand or fall together.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from samara.errors import RegistryError, did_you_mean
from samara.registry import tables
from samara.registry.audit_log import Entry, entry_hash
from samara.registry.config import Gates
from samara.registry.records import Evidence


@dataclass(frozen=True, kw_only=True)
class Version:
    """One immutable version of a model line.

    Attributes:
        id: Over all lines.
        line: The model line.
        number: 1, 2, 3, … within it.
        manifest: Hash of the object that lists its files and describes it.
        identity: Content hash of weights, or id of a delta.
        kind: ``model``, ``run`` or ``delta``.
        added_at: UTC time.
        added_by: Who added it.
        is_dropped: Whether ``gc`` removed its files; what is known of it stays.
    """

    id: int
    line: str
    number: int
    manifest: str
    identity: str
    kind: str
    added_at: str
    added_by: str
    is_dropped: bool = False

    @property
    def name(self) -> str:
        """``line:number``."""
        return f"{self.line}:{self.number}"


@dataclass(frozen=True, kw_only=True)
class Alias:
    """Where an alias points; ``revision`` counts its moves."""

    line: str
    name: str
    version: Version
    revision: int


def now() -> str:
    """UTC time, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --- versions ---------------------------------------------------------------------------------


def _version(row: Row[Any]) -> Version:
    fields = row._mapping
    return Version(
        **{name: fields[name] for name in tables.versions.c.keys()},  # noqa: SIM118 - not a dict
        is_dropped=fields["dropped_at"] is not None,
    )


def all_versions(connection: Connection, line: str | None = None) -> list[Version]:
    """All versions, or those of a line, oldest first."""
    query = (
        select(tables.versions, tables.dropped.c.at.label("dropped_at"))
        .outerjoin(tables.dropped)
        .order_by(tables.versions.c.id)
    )
    if line is not None:
        query = query.where(tables.versions.c.line == line)
    return [_version(row) for row in connection.execute(query)]


def find_version(connection: Connection, line: str, reference: str) -> Version:
    """A version by its number, by an alias, or by the beginning of its manifest or identity.

    Raises:
        RegistryError: If there is no such line or version, or several fit.
    """
    known = all_versions(connection, line)
    if not known:
        lines = {version.line for version in all_versions(connection)}
        raise RegistryError(f"{line}: no such model line{did_you_mean(line, lines)}")
    alias = find_alias(connection, line, reference)
    if alias is not None:
        return alias.version
    fitting = [
        version
        for version in known
        if reference == str(version.number)
        or (len(reference) >= 6 and version.manifest.startswith(reference))
        or (len(reference) >= 6 and version.identity.startswith(reference))
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RegistryError(f"{line}:{reference}: fits {len(fitting)} versions; give a number")
    names = [alias.name for alias in all_aliases(connection, line)]
    options = [str(version.number) for version in known] + names
    raise RegistryError(f"{line}:{reference}: no such version{did_you_mean(reference, options)}")


def insert_version(
    connection: Connection,
    *,
    line: str,
    manifest: str,
    identity: str,
    kind: str,
    actor: str,
    parent_ids: Sequence[int],
) -> Version:
    """Add the next version of a line."""
    highest = select(func.max(tables.versions.c.number)).where(tables.versions.c.line == line)
    number = (connection.execute(highest).scalar() or 0) + 1
    values: dict[str, Any] = {
        "line": line,
        "number": number,
        "manifest": manifest,
        "identity": identity,
        "kind": kind,
        "added_at": now(),
        "added_by": actor,
    }
    done = connection.execute(insert(tables.versions).values(values))
    key = done.inserted_primary_key
    assert key is not None
    for parent_id in parent_ids:
        connection.execute(insert(tables.parents).values(child=key[0], parent=parent_id))
    return Version(id=key[0], **values)


def parent_ids(connection: Connection) -> dict[int, list[int]]:
    """The parents of every version that has some, by id."""
    found: dict[int, list[int]] = {}
    for row in connection.execute(select(tables.parents).order_by(tables.parents.c.parent)):
        found.setdefault(row.child, []).append(row.parent)
    return found


def mark_dropped(connection: Connection, version: Version) -> None:
    """Record that a version's files are gone."""
    connection.execute(insert(tables.dropped).values(version=version.id, at=now()))


def mark_restored(connection: Connection, version: Version) -> Version:
    """Record that a version's files are back."""
    connection.execute(delete(tables.dropped).where(tables.dropped.c.version == version.id))
    return replace(version, is_dropped=False)


# --- evidence and gates -----------------------------------------------------------------------


def add_evidence(connection: Connection, version: Version, found: Evidence) -> None:
    """Add scores and audits to a version; nothing is replaced, the last one counts."""
    content = found.model_dump(mode="json")
    connection.execute(insert(tables.evidence).values(version=version.id, content=content))


def evidence_of(connection: Connection, version: Version) -> Evidence:
    """All scores and audits of a version, oldest first."""
    query = (
        select(tables.evidence.c.content)
        .where(tables.evidence.c.version == version.id)
        .order_by(tables.evidence.c.id)
    )
    found = Evidence()
    for content in connection.execute(query).scalars():
        found = found + Evidence.model_validate(content)
    return found


def gates_of(connection: Connection, line: str, alias: str) -> Gates | None:
    """The gates of an alias, where some were set."""
    query = select(tables.gates.c.content).where(
        tables.gates.c.line == line, tables.gates.c.alias == alias
    )
    content = connection.execute(query).scalar()
    return Gates.model_validate(content) if content is not None else None


def set_gates(connection: Connection, line: str, alias: str, gates: Gates) -> None:
    """Set the gates of an alias, in the place of earlier ones."""
    key = (tables.gates.c.line == line, tables.gates.c.alias == alias)
    connection.execute(delete(tables.gates).where(*key))
    content = gates.model_dump(mode="json")
    connection.execute(insert(tables.gates).values(line=line, alias=alias, content=content))


# --- aliases ----------------------------------------------------------------------------------


def all_aliases(connection: Connection, line: str | None = None) -> list[Alias]:
    """All aliases, or those of a line, by name."""
    query = select(tables.aliases).order_by(tables.aliases.c.line, tables.aliases.c.name)
    if line is not None:
        query = query.where(tables.aliases.c.line == line)
    by_id = {version.id: version for version in all_versions(connection, line)}
    return [
        Alias(line=row.line, name=row.name, version=by_id[row.version], revision=row.revision)
        for row in connection.execute(query)
    ]


def find_alias(connection: Connection, line: str, name: str) -> Alias | None:
    """An alias, if it points anywhere."""
    return next((a for a in all_aliases(connection, line) if a.name == name), None)


def move_alias(
    connection: Connection, line: str, name: str, version: Version, *, seen: Alias | None
) -> None:
    """Point an alias to a version, if it still stands where the caller saw it.

    Raises:
        RegistryError: If somebody else moved it since; nothing is changed then.
    """
    current = find_alias(connection, line, name)
    if (current.revision if current else 0) != (seen.revision if seen else 0):
        there = f"to version {current.version.number}" if current else "away"
        raise RegistryError(
            f"{line}: alias '{name}' was moved {there} by somebody else in the meantime; look at "
            "it and try again"
        )
    if current is None:
        values = {"line": line, "name": name, "version": version.id, "revision": 1}
        connection.execute(insert(tables.aliases).values(values))
        return
    connection.execute(
        update(tables.aliases)
        .where(tables.aliases.c.line == line, tables.aliases.c.name == name)
        .values(version=version.id, revision=current.revision + 1)
    )


# --- log --------------------------------------------------------------------------------------


def append_log(
    connection: Connection, *, actor: str, action: str, line: str, details: Mapping[str, Any]
) -> None:
    """Add an entry to the log, chained to the one before."""
    previous = log_head(connection)
    number = (connection.execute(select(func.max(tables.log.c.number))).scalar() or 0) + 1
    known: dict[str, Any] = {
        "number": number,
        "at": now(),
        "actor": actor,
        "action": action,
        "line": line,
        "previous": previous,
    }
    sha256 = entry_hash(details=details, **known)
    text = json.dumps(dict(details), sort_keys=True, ensure_ascii=False)
    connection.execute(insert(tables.log).values(details=text, sha256=sha256, **known))
    connection.execute(update(tables.state).values(log_head=sha256))


def log_head(connection: Connection) -> str:
    """Hash of the last entry."""
    head: str = connection.execute(select(tables.state.c.log_head)).scalar_one()
    return head


def log_entries(connection: Connection, line: str | None = None) -> list[Entry]:
    """The log, or what concerns a line, oldest first.

    Raises:
        RegistryError: If an entry is not what was written.
    """
    query = select(tables.log).order_by(tables.log.c.number)
    if line is not None:
        query = query.where(tables.log.c.line == line)
    entries = []
    for row in connection.execute(query):
        try:
            details = json.loads(row.details)
        except ValueError:
            raise RegistryError(
                f"log: entry {row.number} cannot be read; the log was changed by hand"
            ) from None
        entries.append(Entry(**{**row._mapping, "details": details}))
    return entries


def alias_history(connection: Connection, line: str, alias: str) -> list[int]:
    """Numbers of the versions that an alias went through and may go back to, the last one on top.

    A promotion puts a version on top; a rollback takes off what is above the one it went to.
    """
    stack: list[int] = []
    for entry in log_entries(connection, line):
        if entry.details.get("alias") != alias:
            continue
        if entry.action == "promote":
            stack.append(entry.details["version"])
        elif entry.action == "rollback":
            while stack[-1] != entry.details["version"]:
                stack.pop()
    return stack
