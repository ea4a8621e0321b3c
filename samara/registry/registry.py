"""The registry: versions that never change, aliases that move through gates, a log of all of it.

    registry = Registry.open("registry")
    version = registry.add("assistant", Path("summaries.sdelta"), description, actor="ada")
    registry.promote("assistant", "3", alias="stable", gates=gates, actor="ada")

Contents lie in an object store by their hash, the catalogue in SQL; embedded, both are files of one
folder. A version appears when all of its objects are there; an alias moves in one transaction with
its log entry, and only from where the mover saw it stand.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Engine, delete, insert

from samara.errors import GateError, LicenseDenied, RegistryError
from samara.registry import catalogue, tables
from samara.registry.artifacts import files_of
from samara.registry.audit_log import Entry
from samara.registry.catalogue import Alias, Version
from samara.registry.config import Gates
from samara.registry.gates import Decision, decide
from samara.registry.objects import ObjectStore
from samara.registry.records import Description, Evidence
from samara.runs import hash_file, new_folder

GATED = "stable"
"""The alias that never moves without gates; any other has them once they were set."""
LEASE_SECONDS = 24 * 3600
"""How long an addition may take before its objects count as left behind."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """A person's decision to move an alias though the gates do not let it pass."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """An alias that moved.

    Attributes:
        version: Where it points now.
        previous: Where it pointed before.
        decision: What the gates said; None where the alias has none.
    """

    version: Version
    previous: Version | None
    decision: Decision | None


class Registry:
    """A registry of models and deltas.

    Args:
        objects: Where contents lie.
        engine: Where the catalogue lies.
    """

    def __init__(self, objects: ObjectStore, engine: Engine) -> None:
        self.objects = objects
        self.engine = engine

    @classmethod
    def open(cls, location: str, *, catalogue_url: str | None = None) -> Self:
        """Open a registry, and make it if there is none.

        Args:
            location: Folder or fsspec URL of the objects.
            catalogue_url: SQLAlchemy URL; None: SQLite in the same folder, which must be local.

        Raises:
            RegistryError: If either cannot be opened.
        """
        if catalogue_url is None:
            if "://" in location:
                raise RegistryError(
                    f"{location}: is no local folder, so name the catalogue with --catalogue "
                    "(sqlite:///file or postgresql+psycopg://user@host/name)"
                )
            Path(location).mkdir(parents=True, exist_ok=True)
            catalogue_url = f"sqlite:///{Path(location).resolve() / 'catalogue.sqlite'}"
        return cls(ObjectStore(location), tables.open_engine(catalogue_url))

    # --- versions -----------------------------------------------------------------------------

    def add(
        self,
        line: str,
        source: Path,
        description: Description,
        *,
        actor: str,
        parents: Sequence[str] = (),
    ) -> Version:
        """Add a version; the same content twice is one version.

        Args:
            line: The model line it belongs to; made if there is none of that name.
            source: The file or folder.
            description: What it is.
            actor: Who adds it.
            parents: References to versions of the line that it was made from, besides those that
                ``description.made_from`` names.

        Raises:
            LicenseDenied: If its licence record forbids giving it away.
            RegistryError: If there is nothing to add, or a file changes meanwhile.
        """
        _check_line(line)
        _check_publishable(line, description)
        files = {name: (path, hash_file(path)) for name, path in files_of(source).items()}
        listing = {
            name: {"sha256": sha256, "bytes": path.stat().st_size}
            for name, (path, sha256) in files.items()
        }
        content = {
            "schema": 1,
            "description": description.model_dump(mode="json"),
            "files": listing,
        }
        manifest = _canonical(content)
        with self._leased([*(sha256 for _, sha256 in files.values()), _sha256(manifest)]):
            for path, sha256 in files.values():
                self.objects.put_file(path, sha256)
            address = self.objects.put_bytes(manifest)
            return self._insert(line, address, description, actor=actor, parents=parents)

    def _insert(
        self,
        line: str,
        manifest: str,
        description: Description,
        *,
        actor: str,
        parents: Sequence[str],
    ) -> Version:
        with tables.writing(self.engine) as connection:
            for known in catalogue.all_versions(connection, line):
                if known.manifest == manifest:
                    return self._again(connection, known, actor=actor)
            made_from = _parents(connection, line, description, parents)
            version = catalogue.insert_version(
                connection,
                line=line,
                manifest=manifest,
                identity=description.identity,
                kind=description.kind,
                actor=actor,
                parent_ids=[parent.id for parent in made_from],
            )
            catalogue.add_evidence(connection, version, description.evidence)
            details = {
                "version": version.number,
                "manifest": manifest,
                "identity": version.identity,
                "parents": [parent.name for parent in made_from],
            }
            catalogue.append_log(connection, actor=actor, action="add", line=line, details=details)
            return version

    def _again(self, connection: Connection, version: Version, *, actor: str) -> Version:
        """A version whose content was added before: nothing new, but its files are there now."""
        if not version.is_dropped:
            return version
        catalogue.append_log(
            connection,
            actor=actor,
            action="restore",
            line=version.line,
            details={"version": version.number},
        )
        return catalogue.mark_restored(connection, version)

    def add_evidence(self, line: str, reference: str, found: Evidence, *, actor: str) -> None:
        """Add scores and audits to a version; earlier ones stay on record, the last ones count."""
        with tables.writing(self.engine) as connection:
            version = catalogue.find_version(connection, line, reference)
            catalogue.add_evidence(connection, version, found)
            details = {"version": version.number, "content": found.model_dump(mode="json")}
            catalogue.append_log(
                connection, actor=actor, action="evidence", line=line, details=details
            )

    def manifest(self, version: Version) -> dict[str, Any]:
        """A version's files and description, as they were added.

        Raises:
            RegistryError: If it is missing or damaged.
        """
        content: dict[str, Any] = json.loads(self.objects.get_bytes(version.manifest))
        return content

    def fetch(self, line: str, reference: str, out: Path) -> Version:
        """Write a version's files to a new folder, every hash checked.

        Raises:
            RegistryError: If there is no such version, its files are gone or damaged, or ``out``
                is there already.
        """
        version = self.resolve(line, reference)
        if out.exists():
            raise RegistryError(f"{out}: is there already; give a new folder")
        _check_not_dropped(version)
        files = self.manifest(version)["files"]
        with new_folder(out) as staging:
            for name, entry in files.items():
                path = staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.objects.get_file(entry["sha256"], path)
        return version

    def resolve(self, line: str, reference: str) -> Version:
        """A version by number, alias, or the beginning of a hash.

        Raises:
            RegistryError: If there is none.
        """
        with self.engine.connect() as connection:
            return catalogue.find_version(connection, line, reference)

    # --- aliases ------------------------------------------------------------------------------

    def promote(
        self,
        line: str,
        reference: str,
        *,
        alias: str,
        actor: str,
        gates: Gates | None = None,
        override: Override | None = None,
    ) -> Promotion:
        """Point an alias to a version, if the gates let it pass.

        Args:
            line: The model line.
            reference: The version.
            alias: ``stable``, ``candidate``, or any other name.
            actor: Who does it.
            gates: Set for this alias from now on; None: those set before.
            override: A person's decision to move it all the same, which is recorded.

        Raises:
            GateError: If the gates refuse or hold the version, or ``stable`` has none. The attempt
                is in the log.
            RegistryError: If somebody else moves the alias at the same time.
        """
        _check_alias(alias)
        if gates is not None:
            self._set_gates(line, alias, gates, actor=actor)
        with self.engine.connect() as connection:
            seen = _standing(connection, line, reference, alias)
        _check_not_dropped(seen.version)
        if seen.gates is None and alias == GATED and override is None:
            raise GateError(f"{line}: alias '{alias}' has no gates yet; set them with --gates FILE")
        decision = decide(seen.gates, seen.evidence, seen.holder_evidence) if seen.gates else None
        outcome = "promote" if decision is None or override else decision.outcome
        holder = seen.alias.version if seen.alias else None
        details = {
            "alias": alias,
            "version": seen.version.number,
            "from": holder.number if holder else None,
            "gates": decision.text() if decision else None,
            "override": {"name": override.name, "reason": override.reason} if override else None,
        }
        with tables.writing(self.engine) as connection:
            if outcome == "promote":
                catalogue.move_alias(connection, line, alias, seen.version, seen=seen.alias)
                _check_unchanged(seen, _standing(connection, line, reference, alias))
            catalogue.append_log(
                connection, actor=actor, action=outcome, line=line, details=details
            )
        if decision is not None and outcome != "promote":
            hint = "measure more" if outcome == "hold" else "mend it"
            raise GateError(
                f"{seen.version.name}: the gates of '{alias}' say {outcome} ({decision.text()}); "
                f"{hint}, or override with a name and a reason"
            )
        return Promotion(version=seen.version, previous=holder, decision=decision)

    def _set_gates(self, line: str, alias: str, gates: Gates, *, actor: str) -> None:
        with tables.writing(self.engine) as connection:
            if catalogue.gates_of(connection, line, alias) == gates:
                return
            catalogue.set_gates(connection, line, alias, gates)
            details = {"alias": alias, "content": gates.model_dump(mode="json")}
            catalogue.append_log(
                connection, actor=actor, action="gates", line=line, details=details
            )

    def rollback(
        self, line: str, *, alias: str, actor: str, reason: str, to: int | None = None
    ) -> Promotion:
        """Point an alias back to a version that it pointed to before; no gate stands in the way.

        Args:
            line: The model line.
            alias: The alias.
            actor: Who does it.
            reason: Why; it is recorded.
            to: Number of the version; None: the one before.

        Raises:
            RegistryError: If the alias never pointed there, or the files are gone.
        """
        with tables.writing(self.engine) as connection:
            seen = catalogue.find_alias(connection, line, alias)
            history = catalogue.alias_history(connection, line, alias)
            if seen is None or len(history) < 2:
                raise RegistryError(f"{line}: alias '{alias}' has nothing to go back to")
            target = history[-2] if to is None else to
            if target not in history[:-1]:
                earlier = ", ".join(map(str, sorted(set(history[:-1]))))
                raise RegistryError(
                    f"{line}: alias '{alias}' never pointed to version {target} before; it can go "
                    f"back to {earlier}"
                )
            version = catalogue.find_version(connection, line, str(target))
            _check_not_dropped(version)
            catalogue.move_alias(connection, line, alias, version, seen=seen)
            details = {
                "alias": alias,
                "version": version.number,
                "from": seen.version.number,
                "reason": reason,
            }
            catalogue.append_log(
                connection, actor=actor, action="rollback", line=line, details=details
            )
            return Promotion(version=version, previous=seen.version, decision=None)

    # --- reading ----------------------------------------------------------------------

    def versions(self, line: str | None = None) -> list[Version]:
        """All versions, or those of a line, oldest first."""
        with self.engine.connect() as connection:
            return catalogue.all_versions(connection, line)

    def aliases(self, line: str | None = None) -> list[Alias]:
        """All aliases, or those of a line."""
        with self.engine.connect() as connection:
            return catalogue.all_aliases(connection, line)

    def parents(self, version: Version) -> list[Version]:
        """What a version was made from, as far as the registry holds it."""
        with self.engine.connect() as connection:
            ids = catalogue.parent_ids(connection).get(version.id, [])
            return [v for v in catalogue.all_versions(connection) if v.id in ids]

    def evidence(self, version: Version) -> Evidence:
        """All scores and audits of a version."""
        with self.engine.connect() as connection:
            return catalogue.evidence_of(connection, version)

    def log(self, line: str | None = None) -> list[Entry]:
        """The log, or what concerns a line, oldest first."""
        with self.engine.connect() as connection:
            return catalogue.log_entries(connection, line)

    def _leased(self, hashes: Sequence[str]) -> _Lease:
        return _Lease(self.engine, hashes)


class _Lease:
    """Keeps ``gc`` off objects between their upload and the version that will name them."""

    def __init__(self, engine: Engine, hashes: Sequence[str]) -> None:
        self._engine = engine
        self._holder = uuid.uuid4().hex
        self._hashes = sorted(set(hashes))

    def __enter__(self) -> None:
        until = int(time.time()) + LEASE_SECONDS
        with tables.writing(self._engine) as connection:
            for sha256 in self._hashes:
                values = {"sha256": sha256, "holder": self._holder, "until": until}
                connection.execute(insert(tables.leases).values(values))

    def __exit__(self, *_: object) -> None:
        with tables.writing(self._engine) as connection:
            connection.execute(delete(tables.leases).where(tables.leases.c.holder == self._holder))


# --- promotion ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Standing:
    """All that a promotion is decided on."""

    version: Version
    alias: Alias | None
    gates: Gates | None
    evidence: Evidence
    holder_evidence: Evidence | None


def _standing(connection: Connection, line: str, reference: str, alias: str) -> _Standing:
    version = catalogue.find_version(connection, line, reference)
    found = catalogue.find_alias(connection, line, alias)
    is_held = found is not None and found.version.id != version.id
    return _Standing(
        version=version,
        alias=found,
        gates=catalogue.gates_of(connection, line, alias),
        evidence=catalogue.evidence_of(connection, version),
        holder_evidence=catalogue.evidence_of(connection, found.version)
        if found and is_held
        else None,
    )


def _check_unchanged(seen: _Standing, now: _Standing) -> None:
    """Refuse a decision whose grounds changed while it was made.

    Raises:
        RegistryError: If the version's files, its evidence or the gates did.
    """
    same = (seen.version, seen.gates, seen.evidence) == (now.version, now.gates, now.evidence)
    if not same:
        raise RegistryError(
            f"{seen.version.name}: its evidence or the gates were changed by somebody else in the "
            "meantime; look at them and try again"
        )


# --- checks -----------------------------------------------------------------------------------


def _check_line(line: str) -> None:
    if not line or len(line) > 200 or any(c in line for c in ":/ \n\t"):
        raise RegistryError(f"model line {line!r}: give a short name without ':', '/' and spaces")


def _check_alias(alias: str) -> None:
    if not alias or alias.isdigit() or len(alias) > 200 or any(c in alias for c in ":/ \n\t"):
        raise RegistryError(
            f"alias {alias!r}: give a short name without ':', '/' and spaces that is no number"
        )


def _check_publishable(line: str, description: Description) -> None:
    known = description.license
    if known.redistribution == "forbidden":
        notice = f" ({known.notice})" if known.notice else ""
        raise LicenseDenied(
            f"{line}: the licence record of {description.kind} {description.identity[:12]} says "
            f"redistribution: forbidden{notice}; it may not be published"
        )


def _check_not_dropped(version: Version) -> None:
    if version.is_dropped:
        raise RegistryError(f"{version.name}: its files were removed by gc; add it again")


def _parents(
    connection: Connection, line: str, description: Description, references: Sequence[str]
) -> list[Version]:
    """The versions that a new one was made from: those named, and those recognised by identity."""
    named = [catalogue.find_version(connection, line, reference) for reference in references]
    known = catalogue.all_versions(connection)
    recognised = [
        next((v for v in reversed(known) if v.identity == identity), None)
        for identity in description.made_from
    ]
    found = {v.id: v for v in [*named, *recognised] if v is not None}
    return [found[version_id] for version_id in sorted(found)]


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
