"""Versions and log entries for people, as ``samara registry show`` and ``log`` print them."""

from __future__ import annotations

from collections.abc import Iterator

from samara.registry.audit_log import Entry
from samara.registry.catalogue import Version
from samara.registry.registry import Registry


def describe_version(registry: Registry, version: Version) -> str:
    """A few lines that say what a version is."""
    return "\n".join(f"{label:<12}{text}" for label, text in _lines(registry, version))


def _lines(registry: Registry, version: Version) -> Iterator[tuple[str, str]]:
    yield "version", f"{version.name}, {version.kind} {version.identity}"
    yield "added", f"{version.added_at} by {version.added_by}"
    names = [a.name for a in registry.aliases(version.line) if a.version.id == version.id]
    yield "aliases", ", ".join(names) or "none"
    yield "made from", ", ".join(p.name for p in registry.parents(version)) or "nothing kept here"
    if version.is_dropped:
        yield "files", "dropped"
    else:
        content = registry.manifest(version)
        files = content["files"]
        total = sum(entry["bytes"] for entry in files.values())
        yield "files", f"{len(files)}, {total:,} bytes"
        license_ = content["description"]["license"]
        yield "licence", f"{license_['delta'] or 'unnamed'}; {license_['redistribution']}"
        if note := content["description"]["note"]:
            yield "note", note
    evidence = registry.evidence(version)
    for row in evidence.evaluations:
        interval = f" [{row.ci[0]:.4g}, {row.ci[1]:.4g}]" if row.ci else ""
        items = f", {row.n:,} items" if row.n else ""
        yield "evaluation", f"{row.task} {row.metric} {row.value:.4g}{interval}{items}"
    for audit in evidence.audits:
        yield "audit", f"{audit.suite}: {audit.verdict}"


def describe_entry(entry: Entry) -> str:
    """One line of the log."""
    details = entry.details
    parts = [f"{entry.number:>5}  {entry.at}  {entry.actor}  {entry.action}"]
    if entry.line:
        number = f":{details['version']}" if "version" in details else ""
        parts.append(f"{entry.line}{number}")
    if "alias" in details:
        parts.append(details["alias"])
    if details.get("gates"):
        parts.append(f"({details['gates']})")
    if override := details.get("override"):
        parts.append(f"overridden by {override['name']}: {override['reason']}")
    if "reason" in details:
        parts.append(f"because {details['reason']}")
    return " ".join(parts)
