"""What a model folder or run folder is, for the registry: its files, its identity, its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samara.errors import RegistryError
from samara.registry.records import Description, Evaluation, Evidence
from samara.runs import RunFolder, hash_weights, model_folder, read_json

NOT_KEPT = ("checkpoints", "clients", "support.safetensors", "folds", "superseded")
"""Of a run folder: what resuming needs, what a federation's clients keep to themselves, runs within
it, and what was replaced."""
WEIGHTS = ("*.safetensors", "*.gguf")


def files_of(source: Path) -> dict[str, Path]:
    """The files to keep of an artefact, by their path inside it; hidden ones are left out.

    Raises:
        RegistryError: If there is nothing there.
    """
    if source.is_file():
        return {source.name: source}
    if not source.is_dir():
        raise RegistryError(f"{source}: no such file or folder; give a model, run or delta")
    found = {}
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        is_kept = inner.parts[0] not in NOT_KEPT and not any(p.startswith(".") for p in inner.parts)
        if path.is_file() and is_kept:
            found[inner.as_posix()] = path
    if not found:
        raise RegistryError(f"{source}: is empty")
    return found


def describe_folder(folder: Path) -> Description:
    """Describe a model folder, or a run folder that made one.

    A run's lineage names what it was made from; its ``results.json``, where it evaluated itself,
    becomes evidence.

    Raises:
        RegistryError: If the folder holds no model.
    """
    model = model_folder(folder)
    if not folder.is_dir():
        raise RegistryError(f"{folder}: no such file or folder; give a model, run or delta")
    if not any(path for pattern in WEIGHTS for path in model.glob(pattern)):
        raise RegistryError(f"{folder}: holds no weights ({', '.join(WEIGHTS)}); give a model")
    is_run = model != folder
    parents = RunFolder(folder).lineage().parents if is_run else {}
    return Description(
        kind="run" if is_run else "model",
        identity=hash_weights(model),
        made_from=sorted(set(parents.values())),
        evidence=_results(folder / "results.json", hash_weights(model)),
    )


def _results(path: Path, weights_hash: str) -> Evidence:
    """Held-out scores that a run recorded for these weights."""
    content = read_json(path) if path.exists() else {}
    models: Mapping[str, Any] = content.get("models", {}) if isinstance(content, dict) else {}
    rows = []
    for known in models.values():
        if known.get("weights_hash") != weights_hash:
            continue
        for metric in ("loss", "perplexity", "bits_per_byte"):
            if isinstance(score := known.get(metric), dict):
                rows.append(
                    Evaluation(
                        task=str(content.get("split", "validation")),
                        metric=metric,
                        value=score["value"],
                        ci=(score["low"], score["high"]),
                        n=content.get("num_documents"),
                    )
                )
    return Evidence(evaluations=rows)
