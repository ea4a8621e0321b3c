"""Verb ``audit``: a model before and after a change in; evidence for a registry's gates out.

The run folder gets

    audit.json      the evidence, as ``samara registry … --evidence`` and ``release`` read it
    details.json    every pair, answer and loss
    summary.json    whose evidence it is, and what exactly was looked at
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samara.adapt.artifact import describe_finetuning, is_finetuning
from samara.adapt.audits.audit import Audited, Change, Plan
from samara.adapt.audits.audit import audit as audit_model
from samara.adapt.audits.config import DETAILS, EVIDENCE, SUMMARY, AuditRunConfig
from samara.adapt.audits.forgetting import read_texts
from samara.adapt.audits.seeds import compare_seeds
from samara.adapt.audits.stability import probe_texts, wordings
from samara.adapt.audits.templates import load_templates, templates_path
from samara.registry.artifacts import describe_folder
from samara.runs import Lineage, RunFolder, hash_file, hash_weights, model_folder, write_json
from samara.sparse.delta_artifact import describe_delta_file


def audit_verb(config: AuditRunConfig, run: RunFolder) -> None:
    """Audit a model in a run folder.

    Raises:
        ConfigError: If the change, the suites and the model do not fit each other.
        CheckpointError: If a model cannot be loaded.
        DeltaError: If a delta is damaged, or made for another base.
        DataError: If the text is too short.
    """
    base = Path(config.base).expanduser()
    audited = run_audit(config)
    write_json(run.path / EVIDENCE, audited.evidence.model_dump(mode="json"))
    write_json(run.path / DETAILS, audited.details)
    parents = {"base": hash_weights(model_folder(base)), "audited": _identity(config)}
    run.write_lineage(Lineage(parents=parents))
    write_json(
        run.path / SUMMARY,
        {
            "schema": 1,
            "identity": parents["audited"],
            "audits": [row.model_dump(mode="json") for row in audited.evidence.audits],
            "scope": _scope(config, audited.details),
        },
    )


def run_audit(config: AuditRunConfig) -> Audited:
    """Audit as settings say; see :func:`audit_verb` for what is raised."""
    has_text = "forgetting" in config.suites
    tuned = None if config.tuned is None else Path(config.tuned).expanduser()
    seeds = None
    if config.seeds:
        assert tuned is not None  # the settings were checked
        seeds = compare_seeds(tuned, [Path(path).expanduser() for path in config.seeds])
    plan = Plan(
        suites=config.suites,
        templates=load_templates(config.templates),
        texts=read_texts(
            corpus=None if config.corpus is None else Path(config.corpus).expanduser(),
            files=[Path(path).expanduser() for path in config.texts],
        )
        if has_text
        else (),
        config=config.limits,
        device=config.device,
        precision=config.precision,
        seeds=seeds,
    )
    change = Change(deltas=tuple(Path(path) for path in config.deltas), tuned=tuned)
    return audit_model(Path(config.base).expanduser(), change, plan)


def _identity(config: AuditRunConfig) -> str:
    """What a registry calls the audited version; of several deltas it is the last."""
    if config.deltas:
        return describe_delta_file(Path(config.deltas[-1])).identity
    audited = Path(config.tuned or config.base).expanduser()
    if is_finetuning(audited):
        return describe_finetuning(audited).identity
    return describe_folder(audited).identity


def _scope(config: AuditRunConfig, details: dict[str, Any]) -> dict[str, Any]:
    """What was looked at, for whoever reads a verdict; and what was not."""
    templates = load_templates(config.templates)
    limits = config.limits.stability
    scope: dict[str, Any] = {
        "templates": Path(config.templates).stem,
        "templates_sha256": hash_file(templates_path(config.templates)),
        "language": templates.language,
        "attributes": list(templates.attributes),
        "confidence": config.limits.confidence,
        "precision": config.precision,
    }
    if "bias" in config.suites:
        scope["pairs_of_texts"] = len(details["bias"]["cases"])
        scope["unit"] = details["bias"]["unit"]
    if "stability" in config.suites:
        scope |= {
            "prompts": len(probe_texts(templates)),
            "pairs_of_wordings": len(wordings(templates)),
            "batch_sizes": list(limits.batch_sizes),
            "repeats": limits.repeats,
            "extreme_inputs": details["stability"]["after"]["num_extremes"],
            "other_seeds": len(config.seeds),
        }
    return scope
