"""``provenance.json``: what a converted or averaged folder was made from, and hashes of its files.

A folder that has one is checked against it when it is read, so a file that was cut short or changed
on its way is noticed. What is known about the making of the weights (recipe, data, compute, scores)
travels in it from conversion to conversion; the model card shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samara.config import load_yaml
from samara.errors import CheckpointError
from samara.model.interchange.hf_folder import CONFIG, WEIGHTS
from samara.runs import hash_file, hash_files, read_json, write_json

FILE, SCHEMA = "provenance.json", 1


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One folder (or file) that a model was made from.

    Attributes:
        name: The last two parts of its path; the rest is nobody's business but its owner's.
        format: The format it was in.
        weights_hash: What it held.
    """

    name: str
    format: str
    weights_hash: str

    @classmethod
    def of(cls, path: Path, *, format: str) -> Origin:
        """Describe what lies at a path."""
        name = "/".join(path.resolve().parts[-2:])
        return cls(name=name, format=format, weights_hash=weights_hash(path))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing done to weights after training.

    Attributes:
        verb: ``convert`` or ``average``.
        made_from: Its sources.
    """

    verb: str
    made_from: Sequence[Origin]


@dataclass(frozen=True, kw_only=True)
class Making:
    """What is known about how weights came to be; all of it may be unknown.

    Attributes:
        recipe: The resolved recipe of the run that trained them.
        data_hash: Content hash of the corpus.
        compute: ``tokens``, ``flops``, ``seconds``, ``joules``, ancestors included.
        scores: Per measure (``loss``, ...), ``value``, ``low``, ``high``; and ``split``,
            ``corpus_hash``, ``num_documents`` of the evaluation.
        license: Identifier, as ``apache-2.0``.
        steps: What was done to them after training, first to last.
    """

    recipe: Mapping[str, Any] | None = None
    data_hash: str | None = None
    compute: Mapping[str, float] | None = None
    scores: Mapping[str, Any] | None = None
    license: str | None = None
    steps: Sequence[Step] = ()

    def then(self, verb: str, made_from: Sequence[Origin]) -> Making:
        """The same with one more step."""
        return replace(self, steps=[*self.steps, Step(verb=verb, made_from=made_from)])


def weights_hash(path: Path) -> str:
    """SHA-256 over a model's weights files and their names, as summaries and results give it."""
    if path.is_file():
        files = [path]
    elif (path / WEIGHTS).exists():  # a training checkpoint has other safetensors beside it
        files = [path / WEIGHTS]
    else:
        files = [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return hash_files({file.name: file for file in files})


def write_provenance(folder: Path, making: Making) -> None:
    """Write the record of a complete folder, with the size and SHA-256 of each file."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != FILE
    }
    write_json(folder / FILE, {"schema": SCHEMA, "making": asdict(making), "files": files})


def verify(folder: Path) -> None:
    """Compare a folder with the sizes and hashes recorded in it, if there are any.

    Raises:
        CheckpointError: If a file is missing, cut short or changed.
    """
    is_training_checkpoint = not (folder / CONFIG).exists()
    for record in (FILE, *(["state.json"] if is_training_checkpoint else [])):
        path = folder / record
        if not path.exists():
            continue
        content = read_json(path)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise CheckpointError(f"{path}: is not a record that this version reads; remove it")
        for name, recorded in content["files"].items():
            _verify_file(folder / name, recorded, record)


def _verify_file(path: Path, recorded: Mapping[str, Any], record: str) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: is missing, {record} lists it; fetch it again")
    size = path.stat().st_size
    if size != recorded["bytes"]:
        raise CheckpointError(
            f"{path}: has {size} bytes, {record} says {recorded['bytes']}; fetch it again, or "
            f"remove {record} if you changed it"
        )
    if hash_file(path) != recorded["sha256"]:
        raise CheckpointError(
            f"{path}: its SHA-256 is not the one in {record}; fetch it again, or remove {record} "
            "if you changed it"
        )


# --- how the weights came to be ---------------------------------------------------------------


def find_making(folder: Path) -> Making:
    """Collect what the folder, or the run it lies in, says about the making of its weights."""
    record = folder / FILE
    if record.exists():
        return _parse_making(read_json(record)["making"])
    run = folder.parent
    summary, lineage = _optional_json(run / "summary.json"), _optional_json(run / "lineage.json")
    is_run = folder.name == "model" and bool(lineage)
    return Making(
        recipe=load_yaml(run / "recipe.yaml")
        if is_run and (run / "recipe.yaml").exists()
        else None,
        data_hash=lineage.get("parents", {}).get("data") if is_run else None,
        compute=lineage.get("total") if is_run else None,
        scores=_find_scores(folder, summary.get("weights_hash")) if is_run else None,
        license=_card_license(folder / "README.md"),
    )


def _parse_making(known: Mapping[str, Any]) -> Making:
    steps = [
        Step(verb=step["verb"], made_from=[Origin(**origin) for origin in step["made_from"]])
        for step in known["steps"]
    ]
    return Making(**{**known, "steps": steps})


def _optional_json(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def _find_scores(folder: Path, digest: str | None) -> dict[str, Any] | None:
    """Scores of exactly these weights in ``results.json`` of the run, or of its chain's stages."""
    run = folder.resolve().parent
    for path in (run / "results.json", *sorted(run.parent.glob("*/results.json"))):
        results = _optional_json(path)
        for model in results.get("models", {}).values():
            if digest is not None and model.get("weights_hash") == digest:
                measures = ("loss", "perplexity", "bits_per_byte")
                about = ("split", "corpus_hash", "num_documents")
                return {
                    **{key: model[key] for key in measures if key in model},
                    **{key: results[key] for key in about if key in results},
                }
    return None


def _card_license(card: Path) -> str | None:
    """The ``license:`` line in the head of a model card."""
    if not card.exists():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        key, _, value = line.partition(":")
        if key.strip() == "license":
            return value.strip().strip("\"'") or None
    return None
