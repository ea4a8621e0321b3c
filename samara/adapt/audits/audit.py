"""Audits of a model before and after a change: what ``samara audit`` does.

The change is delta files, applied to the loaded base and taken off again, or a second model: a
fine-tuning run or a model folder. The result is evidence as the registry's gates read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from samara.adapt.audits.bias import Gaps, bias_audits, bias_details, measure_gaps
from samara.adapt.audits.config import AuditConfig, Precision, Suite
from samara.adapt.audits.forgetting import forgetting_audit, forgetting_details, measure_loss
from samara.adapt.audits.seeds import SeedAnswers
from samara.adapt.audits.stability import (
    Stability,
    measure_stability,
    probe_logits,
    stability_audits,
    stability_details,
)
from samara.adapt.audits.subject import Kind, Subject, open_model
from samara.adapt.audits.templates import TemplateSet
from samara.adapt.load import load_finetuned
from samara.adapt.methods import DELTA
from samara.adapt.models import TaskModel
from samara.adapt.results import RESULTS
from samara.errors import ConfigError
from samara.measure.loss import LossResult
from samara.registry.records import Audit, Evidence
from samara.runs import read_json
from samara.sparse.delta import Delta
from samara.sparse.delta_apply import delta_stack
from samara.sparse.tensor_files import CheckpointFiles


@dataclass(frozen=True, kw_only=True)
class Change:
    """What happened to a base.

    Attributes:
        deltas: Delta files, in the order they apply.
        tuned: A fine-tuning run, or the folder of the changed model; not with deltas.
    """

    deltas: tuple[Path, ...] = ()
    tuned: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is audited, and how.

    Attributes:
        suites: Which audits.
        templates: Sentences of the bias and stability audits.
        texts: Documents whose loss is compared; empty without ``forgetting``.
        config: Limits and sizes.
        device: ``cpu``, ``cuda``, or ``auto``: CUDA if there is one.
        precision: ``float32``, or as the weights are ``stored``.
        seeds: How trainings that differ in their seed answer; None: that is not looked at.
    """

    suites: tuple[Suite, ...]
    templates: TemplateSet
    texts: Sequence[str] = ()
    config: AuditConfig = field(default_factory=AuditConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
    seeds: SeedAnswers | None = None


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What the audits found: the evidence, and what it is made of."""

    evidence: Evidence
    details: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    gaps: Gaps | None
    stability: Stability | None
    losses: LossResult | None


def audit(base: Path, change: Change, plan: Plan) -> Audited:
    """Audit a model, or what a change makes of it.

    Args:
        base: A model folder, or the run that made it.
        change: What happened to it; nothing: the model is audited as it is.
        plan: What is audited, and how.

    Raises:
        ConfigError: If the change, the suites and the model do not fit each other.
        CheckpointError: If a model cannot be loaded.
        DeltaError: If a delta is damaged, or made for another base.
        DataError: If the text is too short.
    """
    _check(change, plan)
    loaded, kind = open_model(base)
    _to_device(loaded, plan)
    if change.tuned is not None:
        return _audit_tuned(base, loaded, kind, change.tuned, plan)
    if not change.deltas:
        return _judge(None, _measure(loaded, kind, plan), plan, is_reverted=None)
    before = _measure(loaded, kind, plan)
    subject = Subject(loaded, kind, precision="stored", batch_size=plan.config.batch_size)
    bare = probe_logits(subject, plan.templates)
    with _applied(loaded, change.deltas):
        after = _measure(loaded, kind, plan)
    reverted = probe_logits(subject, plan.templates)
    is_reverted = all(torch.equal(a, b) for a, b in zip(bare, reverted, strict=True))
    return _judge(before, after, plan, is_reverted=is_reverted)


def _check(change: Change, plan: Plan) -> None:
    if change.deltas and change.tuned is not None:
        raise ConfigError("--delta and --tuned: give one of them, the change is either")
    if "forgetting" in plan.suites:
        if not plan.texts:
            raise ConfigError("forgetting: needs text the base knows; give --text or --corpus")
        if not (change.deltas or change.tuned):
            raise ConfigError("forgetting: compares with a changed model; give --delta or --tuned")


def _to_device(loaded: TaskModel, plan: Plan) -> None:
    wanted = plan.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, this machine has none; use cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = loaded.model
    model.to(wanted)


@contextmanager
def _applied(loaded: TaskModel, paths: Sequence[Path]) -> Iterator[None]:
    """Deltas on a loaded model, taken off again in the end."""
    stack = delta_stack(loaded.model, base_root=CheckpointFiles(loaded.folder).root())
    applied = []
    try:
        for path in paths:
            applied.append(Delta.load(path))
            stack.apply(applied[-1])
        yield
    finally:
        for delta in reversed([d for d in applied if d.id in stack.ids]):
            stack.revert(delta)


def _audit_tuned(base: Path, loaded: TaskModel, kind: Kind, tuned: Path, plan: Plan) -> Audited:
    """Audit a changed model; the head of a task is new, so that its base has none to compare."""
    if (tuned / RESULTS).exists():
        labels = read_json(tuned / RESULTS)["labels"]
        changed, changed_kind = load_finetuned(tuned, base=base), "labels" if labels else kind
    else:
        changed, changed_kind = open_model(tuned)
    _to_device(changed, plan)
    if changed_kind == kind:
        before = _measure(loaded, kind, plan)
        return _judge(before, _measure(changed, kind, plan), plan, is_reverted=None)
    others = tuple(suite for suite in plan.suites if suite != "forgetting")
    after = _measure(changed, changed_kind, _with_suites(plan, others))
    if "forgetting" not in plan.suites:
        return _judge(None, after, plan, is_reverted=None)
    if not (tuned / DELTA).exists():
        raise ConfigError(
            f"forgetting: {tuned} is another kind of model than {base}, and holds no delta that "
            "could be tried under the base's own head; leave the suite out"
        )
    text = _with_suites(plan, ("forgetting",))
    before = _measure(loaded, kind, text)
    with _applied(loaded, [tuned / DELTA]):  # the trunk's change, under the old head
        losses = _measure(loaded, kind, text).losses
    return _judge(before, replace(after, losses=losses), plan, is_reverted=None)


def _with_suites(plan: Plan, suites: tuple[Suite, ...]) -> Plan:
    return replace(plan, suites=suites)


def _measure(loaded: TaskModel, kind: Kind, plan: Plan) -> _Measured:
    size = plan.config.batch_size
    subject = Subject(loaded, kind, precision=plan.precision, batch_size=size)
    gaps = stability = losses = None
    if "bias" in plan.suites:
        gaps = measure_gaps(subject, list(plan.templates.cases()))
    if "stability" in plan.suites:
        stability = measure_stability(subject, plan.templates, plan.config.stability)
    if "forgetting" in plan.suites:
        losses = measure_loss(subject, plan.texts, plan.config.forgetting, batch_size=size)
    return _Measured(gaps=gaps, stability=stability, losses=losses)


def _judge(
    before: _Measured | None, after: _Measured, plan: Plan, *, is_reverted: bool | None
) -> Audited:
    audits: list[Audit] = []
    details: dict[str, Any] = {"schema": 1, "config": plan.config.model_dump(mode="json")}
    if after.gaps is not None:
        cases, old = list(plan.templates.cases()), before.gaps if before else None
        audits += bias_audits(cases, old, after.gaps, plan.config)
        details["bias"] = bias_details(cases, old, after.gaps)
    if after.stability is not None:
        known = before.stability if before else None
        audits += stability_audits(
            known, after.stability, plan.config, is_reverted=is_reverted, seeds=plan.seeds
        )
        details["stability"] = stability_details(known, after.stability)
    if before is not None and before.losses is not None and after.losses is not None:
        audits.append(forgetting_audit(before.losses, after.losses, plan.config))
        details["forgetting"] = forgetting_details(before.losses, after.losses)
    return Audited(evidence=Evidence(audits=audits), details=details)
