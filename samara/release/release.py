"""Verb ``release``: runs in; versions in a registry out, promoted through gates and rolled back.

The run folder gets ``summary.json``: the versions with their scores, where the aliases stand, and
the registry's log of the line; and ``registry/``, where no other was named.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samara.adapt.audits.config import EVIDENCE, SUMMARY
from samara.errors import GateError, RegistryError
from samara.registry.access import acting, open_registry, read_evidence
from samara.registry.audit_log import Entry
from samara.registry.records import Evidence
from samara.release.artifacts import describe
from samara.release.config import PromoteStep, ReleaseConfig, RollbackStep, Step, VersionConfig
from samara.runs import Lineage, RunFolder, read_json, write_json

if TYPE_CHECKING:
    from samara.registry.catalogue import Version
    from samara.registry.registry import Registry

MOVES = ("promote", "hold", "refuse", "rollback")
"""Log entries of steps: each step leaves exactly one, in the transaction that takes it."""


def release(config: ReleaseConfig, run: RunFolder) -> None:
    """Add the versions and take the steps; an interrupted release goes on with the next step.

    Raises:
        GateError: If the gates do not let a version pass whose step says ``stop``.
        LicenseDenied: If a version's licence record forbids giving it away.
        RegistryError: If the registry cannot be opened, or somebody moves an alias meanwhile.
    """
    actor = acting(config.actor, key="actor")
    registry = open_registry(config.registry or str(run.path / "registry"), config.catalogue)
    first = _first_entry(registry, run)
    versions = {
        name: _add(registry, config.line, wanted, actor=actor)
        for name, wanted in config.versions.items()
    }
    taken = iter(
        entry
        for entry in registry.log(config.line)
        if entry.number > first and entry.actor == actor and entry.action in MOVES
    )
    for step in config.steps:
        if not _was_taken(step, taken, versions):
            _take(registry, config, step, versions, actor=actor)
    run.write_lineage(Lineage(parents={name: v.identity for name, v in versions.items()}))
    write_json(run.path / "summary.json", _summary(registry, config, versions))


def _first_entry(registry: Registry, run: RunFolder) -> int:
    """Length of the log before this release began."""
    path = run.path / "start.json"
    if not path.exists():
        log = registry.log()
        write_json(path, {"schema": 1, "log_entries": log[-1].number if log else 0})
    return int(read_json(path)["log_entries"])


def _add(registry: Registry, line: str, wanted: VersionConfig, *, actor: str) -> Version:
    source = Path(wanted.source).expanduser()
    description = describe(source).model_copy(update={"note": wanted.note})
    version = registry.add(line, source, description, actor=actor)
    known, more = registry.evidence(version), Evidence()
    for path in wanted.evidence:
        more += _evidence(Path(path).expanduser(), version)
    missing = Evidence(
        evaluations=[row for row in more.evaluations if row not in known.evaluations],
        audits=[row for row in more.audits if row not in known.audits],
    )
    if missing != Evidence():
        registry.add_evidence(line, str(version.number), missing, actor=actor)
    return version


def _evidence(path: Path, version: Version) -> Evidence:
    """Evidence of a file, or of an audit's run folder, which knows whose it is.

    Raises:
        ConfigError: If it is missing or malformed.
        RegistryError: If an audit is of something else.
    """
    if not path.is_dir():
        return read_evidence(path)
    if not (path / SUMMARY).exists() or not (path / EVIDENCE).exists():
        raise RegistryError(f"evidence: {path} is no finished audit; run it, or give a file")
    audited = read_json(path / SUMMARY)["identity"]
    if audited != version.identity:
        raise RegistryError(
            f"evidence: {path} is an audit of {audited[:12]}, and {version.name} is "
            f"{version.identity[:12]}; audit what is released"
        )
    return read_evidence(path / EVIDENCE)


# --- steps ------------------------------------------------------------------------------------


def _was_taken(step: Step, taken: Iterator[Entry], versions: dict[str, Version]) -> bool:
    """Whether the log has the step; a promotion that may not fail is tried again if it did.

    Raises:
        RegistryError: If the log has something else in its place.
    """
    for entry in taken:
        is_same = (entry.action == "rollback") == isinstance(step, RollbackStep)
        wanted = None if step.version is None else versions[step.version].number
        if (
            not is_same
            or entry.details["alias"] != step.alias
            or wanted not in (None, entry.details["version"])
        ):
            raise RegistryError(
                f"{entry.line}: log entry {entry.number} ({entry.action} "
                f"{entry.details['alias']}) is none of this release's, and of the same actor "
                f"'{entry.actor}'; release again in another run folder"
            )
        has_failed = entry.action in ("hold", "refuse")
        if not (has_failed and isinstance(step, PromoteStep) and step.unless_passed == "stop"):
            return True
    return False


def _take(
    registry: Registry,
    config: ReleaseConfig,
    step: Step,
    versions: dict[str, Version],
    *,
    actor: str,
) -> None:
    if isinstance(step, RollbackStep):
        to = None if step.version is None else versions[step.version].number
        registry.rollback(config.line, alias=step.alias, actor=actor, reason=step.reason, to=to)
        return
    from samara.registry.registry import Override

    override = None
    if step.override is not None:
        override = Override(name=step.override.name, reason=step.override.reason)
    try:
        registry.promote(
            config.line,
            str(versions[step.version].number),
            alias=step.alias,
            actor=actor,
            gates=config.gates.get(step.alias),
            override=override,
        )
    except GateError:
        if step.unless_passed == "stop":
            raise


# --- the record -------------------------------------------------------------------------------


def _summary(
    registry: Registry, config: ReleaseConfig, versions: dict[str, Version]
) -> dict[str, Any]:
    from samara.registry import upkeep

    return {
        "schema": 1,
        "line": config.line,
        "versions": {name: _version(registry, version) for name, version in versions.items()},
        "aliases": {alias.name: alias.version.number for alias in registry.aliases(config.line)},
        "gates": {alias: gates.model_dump(mode="json") for alias, gates in config.gates.items()},
        "log": [_entry(entry) for entry in registry.log(config.line)],
        "problems": upkeep.verify(registry, full=True),
    }


def _version(registry: Registry, version: Version) -> dict[str, Any]:
    files = registry.manifest(version)["files"]
    evidence = registry.evidence(version)
    return {
        "number": version.number,
        "kind": version.kind,
        "identity": version.identity,
        "manifest": version.manifest,
        "added_at": version.added_at,
        "added_by": version.added_by,
        "made_from": [parent.name for parent in registry.parents(version)],
        "files": {name: entry["bytes"] for name, entry in files.items()},
        "evaluations": [row.model_dump(mode="json") for row in evidence.evaluations],
        "audits": [row.model_dump(mode="json") for row in evidence.audits],
    }


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "number": entry.number,
        "at": entry.at,
        "actor": entry.actor,
        "action": entry.action,
        "details": dict(entry.details),
        "sha256": entry.sha256,
    }
