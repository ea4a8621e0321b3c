"""A delta file's record for people, as ``samara delta show`` prints it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from samara.registry.records import Audit, Evaluation
from samara.sparse.delta_data import DeltaData


def describe(delta: DeltaData, *, num_bytes: int) -> str:
    """A few lines that say what a delta is.

    Args:
        delta: The delta.
        num_bytes: Size of its file.
    """
    return "\n".join(f"{label:<12}{text}" for label, text in _lines(delta, num_bytes))


def _lines(delta: DeltaData, num_bytes: int) -> Iterator[tuple[str, str]]:
    record = delta.record
    yield "delta", delta.id
    model = record.base.model_id or "unnamed"
    commit = f" at {record.base.revision_commit}" if record.base.revision_commit else ""
    yield "base", f"{model}{commit}, weights {record.base.tensors_root[:12]}"
    yield "belongs on", f"delta {record.parent[:12]}" if record.parent else "the bare base"
    per_entry = f", {num_bytes / delta.nnz:.2f} bytes each" if delta.nnz else ""
    yield (
        "changes",
        f"{delta.nnz:,} weights in {len(delta.tensors)} tensors, {num_bytes:,} bytes{per_entry}",
    )
    inexact = ", not checked against the base's bits" if delta.mode == "additive" else ""
    yield "mode", f"{delta.mode}{inexact}"
    yield "created", f"{record.created} by {record.producer.name} {record.producer.version}"
    if record.selector:
        yield "selected", f"by {record.selector.score}, density {record.selector.density}"
    if record.train and record.train.data_sha256:
        yield "data", record.train.data_sha256
    if record.composition:
        ids = ", ".join(member.delta_id[:12] for member in record.composition.members)
        yield "composed", f"of {ids}; policy {record.composition.policy}"
    for row in record.eval:
        yield "evaluation", _evaluation(row)
    for audit in record.audit:
        yield "audit", _audit(audit)
    known = record.license
    yield "licence", f"{known.delta or 'unnamed'}; redistribution {known.redistribution}"


def _evaluation(row: Evaluation) -> str:
    interval = f" [{row.ci[0]:.4g}, {row.ci[1]:.4g}]" if row.ci else ""
    base = f", base {row.base_value:.4g}" if row.base_value is not None else ""
    items = f", {row.n:,} items" if row.n else ""
    return f"{row.task} {row.metric} {row.value:.4g}{interval}{base}{items}"


def _audit(row: Audit) -> str:
    change = ""
    if row.before is not None and row.after is not None:
        change = f", {row.before:.4g} -> {row.after:.4g}"
    return f"{row.suite}: {row.verdict}{change}"
