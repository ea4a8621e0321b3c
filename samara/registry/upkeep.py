"""Is the registry whole, and what in it does nobody need any more."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, select

from samara.errors import RegistryError
from samara.registry import catalogue, tables
from samara.registry.audit_log import check_chain
from samara.registry.catalogue import Version
from samara.registry.registry import LEASE_SECONDS, Registry

_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What :func:`collect_garbage` removed."""

    num_objects: int
    num_bytes: int
    versions: Sequence[Version]


# --- whole --------------------------------------------------------------------------------------


def verify(registry: Registry, *, full: bool = False) -> list[str]:
    """Check log, aliases and objects.

    Args:
        registry: The registry.
        full: Read and hash every object, too.

    Returns:
        What is wrong, one line each; empty if nothing is.
    """
    with registry.engine.connect() as connection:
        problems = _check_log(connection) or _check_aliases(connection)
        found = catalogue.all_versions(connection)
    for version in found:
        if not version.is_dropped:
            problems += _check_version(registry, version, full=full)
    return problems


def _check_log(connection: Connection) -> list[str]:
    try:
        check_chain(catalogue.log_entries(connection), catalogue.log_head(connection))
    except RegistryError as error:
        return [str(error)]
    return []


def _check_aliases(connection: Connection) -> list[str]:
    """Compare every alias with where the log says it was moved."""
    moved: dict[tuple[str, str], int] = {}
    for entry in catalogue.log_entries(connection):
        if entry.action in ("promote", "rollback"):
            moved[entry.line, entry.details["alias"]] = entry.details["version"]
    found = {(a.line, a.name): a.version.number for a in catalogue.all_aliases(connection)}
    return [
        f"{line}: alias '{name}' points to version {found.get((line, name))}, by the log to "
        f"{moved.get((line, name))}; the catalogue was changed by hand"
        for line, name in sorted(moved.keys() | found.keys())
        if moved.get((line, name)) != found.get((line, name))
    ]


def _check_version(registry: Registry, version: Version, *, full: bool) -> list[str]:
    try:
        files = registry.manifest(version)["files"]
    except RegistryError as error:
        return [f"{version.name}: {error}"]
    checked = {
        name: registry.objects.check(entry["sha256"], entry["bytes"], full=full)
        for name, entry in files.items()
    }
    return [f"{version.name}: {name} {problem}" for name, problem in checked.items() if problem]


# --- needed -------------------------------------------------------------------------------------


def collect_garbage(
    registry: Registry, *, actor: str, drop_older_than_days: float | None = None
) -> Swept:
    """Remove what nobody needs.

    Always: objects of no version and of no addition under way. With ``drop_older_than_days`` also
    the files of older versions, except of those that an alias points or pointed to, and of all that
    a kept version was made from; what is known of a dropped version stays.
    """
    dropped = []
    if drop_older_than_days is not None:
        # First the catalogue, then the files: killed in between, a version is known to be gone.
        dropped = _drop(registry, drop_older_than_days, actor=actor)
    with tables.writing(registry.engine) as connection:
        # Additions lease their objects under the same lock, before they look what is there.
        needed = _needed(registry, connection)
        num_objects = num_bytes = 0
        for name in list(registry.objects.names()):
            if name not in needed and not _is_young_leftover(registry, name):
                num_bytes += registry.objects.remove(name)
                num_objects += 1
        if num_objects:
            details = {"objects": num_objects, "bytes": num_bytes}
            catalogue.append_log(connection, actor=actor, action="gc", line="", details=details)
    return Swept(num_objects=num_objects, num_bytes=num_bytes, versions=dropped)


def _drop(registry: Registry, days: float, *, actor: str) -> list[Version]:
    with tables.writing(registry.engine) as connection:
        dropped = _droppable(connection, days)
        for version in dropped:
            catalogue.mark_dropped(connection, version)
            details = {"version": version.number}
            catalogue.append_log(
                connection, actor=actor, action="drop", line=version.line, details=details
            )
    return dropped


def _droppable(connection: Connection, days: float) -> list[Version]:
    """Versions older than so many days that no alias had and no kept version was made from."""
    known = catalogue.all_versions(connection)
    limit = time.time() - days * _DAY
    had_alias = {
        (entry.line, entry.details["version"])
        for entry in catalogue.log_entries(connection)
        if entry.action in ("promote", "rollback")
    }
    waiting = [
        version.id
        for version in known
        if (version.line, version.number) in had_alias or _added(version) > limit
    ]
    kept = set(waiting)
    parents = catalogue.parent_ids(connection)
    while waiting:
        fresh = [parent for parent in parents.get(waiting.pop(), []) if parent not in kept]
        kept.update(fresh)
        waiting += fresh
    return [v for v in known if v.id not in kept and not v.is_dropped]


def _added(version: Version) -> float:
    return datetime.datetime.fromisoformat(version.added_at).timestamp()


def _needed(registry: Registry, connection: Connection) -> set[str]:
    """Hashes of all objects that a version or an addition under way needs."""
    now = int(time.time())
    connection.execute(delete(tables.leases).where(tables.leases.c.until <= now))
    needed = set(connection.execute(select(tables.leases.c.sha256)).scalars())
    for version in catalogue.all_versions(connection):
        if not version.is_dropped:
            files = registry.manifest(version)["files"]
            needed |= {version.manifest, *(entry["sha256"] for entry in files.values())}
    return needed


def _is_young_leftover(registry: Registry, name: str) -> bool:
    """Whether a temporary name may still be written to."""
    is_temporary = name.endswith(".tmp")
    return is_temporary and registry.objects.age_seconds(name, time.time()) < LEASE_SECONDS
