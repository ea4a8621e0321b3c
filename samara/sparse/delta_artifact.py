"""A delta file, for the registry: checked as a whole, and described by its own record."""

from __future__ import annotations

from pathlib import Path

from samara.registry.records import Description, Evidence
from samara.sparse.delta_file import read_delta


def describe_delta_file(path: Path) -> Description:
    """Describe a delta file.

    Raises:
        CorruptDelta: If it is missing, cut short or changed.
    """
    record = read_delta(path).record
    members = (
        [member.delta_id for member in record.composition.members] if record.composition else []
    )
    return Description(
        kind="delta",
        identity=record.delta_id,
        made_from=[*([record.parent] if record.parent else []), *members],
        evidence=Evidence(evaluations=record.eval, audits=record.audit),
        license=record.license,
    )
