"""What a finished fine-tuning or federation is, for the registry: identity, parents, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samara.registry.records import Description, Evaluation, Evidence
from samara.runs import hash_file, hash_weights, read_json
from samara.sparse.delta_artifact import describe_delta_file

RESULTS, ADAPTER, HEAD = "results.json", "adapter", "head.safetensors"


def is_finetuning(folder: Path) -> bool:
    """Whether a folder is that of a finished fine-tuning."""
    path = folder / RESULTS
    return path.exists() and {"method", "artefacts"} <= read_json(path).keys()


def is_federation(folder: Path) -> bool:
    """Whether a folder is that of a finished federation."""
    path = folder / RESULTS
    return path.exists() and {"method", "rounds", "clients"} <= read_json(path).keys()


def describe_federation(run: Path) -> Description:
    """Describe the run folder of a finished federation: its adapter, or the head it trained.

    The global model's test scores have no intervals, so that no gate passes by them alone: more
    evidence has to be given.
    """
    results = read_json(run / RESULTS)
    scores = results["test"]["best"]
    return Description(
        kind="run",
        identity=hash_file(run / HEAD) if (run / HEAD).exists() else hash_weights(run / ADAPTER),
        made_from=[results["parents"]["init_from"]],
        evidence=Evidence(
            evaluations=[
                Evaluation(task=results["task"]["name"], metric=name, value=scores[name])
                for name in ("accuracy", "loss")
                if scores[name] is not None
            ]
        ),
    )


def describe_finetuning(run: Path) -> Description:
    """Describe the run folder of a finished fine-tuning.

    A delta keeps its own id and record; what a full fine-tuning or an adapter is follows from its
    weights. The parent is the model that was adapted.

    Raises:
        CorruptDelta: If its delta is missing, cut short or changed.
    """
    results = read_json(run / RESULTS)
    evidence = Evidence(evaluations=_evaluations(results))
    made_from = [results["parents"]["init_from"]]
    weights = run / next(iter(results["artefacts"]))  # what holds the change; then its head, if any
    if results["method"] == "sparse":
        delta = describe_delta_file(weights)
        audits = Evidence(audits=delta.evidence.audits)
        made_from += delta.made_from
        return delta.model_copy(update={"evidence": evidence + audits, "made_from": made_from})
    return Description(
        kind="run",
        identity=hash_weights(weights),
        made_from=made_from,
        evidence=evidence,
    )


def _evaluations(results: dict[str, Any]) -> list[Evaluation]:
    base = results["base_scores"] or {}
    return [
        Evaluation(
            task=results["task"]["name"],
            metric=name,
            value=score["value"],
            ci=None if score["low"] is None else (score["low"], score["high"]),
            n=results["num_items"],
            base_value=base[name]["value"] if name in base else None,
        )
        for name, score in results["scores"].items()
    ]
