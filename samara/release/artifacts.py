"""What can be registered, told apart: deltas, finished adaptations, models and their runs."""

from __future__ import annotations

from pathlib import Path

from samara.registry.artifacts import describe_folder
from samara.registry.records import Description


def describe(source: Path) -> Description:
    """Describe a model folder, a run folder, or a delta file (``.sdelta``).

    Raises:
        RegistryError: If there is none of these.
        CorruptDelta: If it is a delta, and missing, cut short or changed.
    """
    if source.suffix == ".sdelta":
        from samara.sparse.delta_artifact import describe_delta_file

        return describe_delta_file(source)
    if (source / "results.json").exists():
        from samara.adapt.artifact import (
            describe_federation,
            describe_finetuning,
            is_federation,
            is_finetuning,
        )

        if is_finetuning(source):
            return describe_finetuning(source)
        if is_federation(source):
            return describe_federation(source)
    return describe_folder(source)
