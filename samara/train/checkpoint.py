"""Checkpoints: everything a run needs to go on, complete or absent.

    checkpoints/step-00000100/
        model.safetensors        weights, by parameter name; tied ones once
        optimizer.safetensors    {parameter name}.{key}
        rng.safetensors          states of torch's random generators
        state.json               step, tokens, FLOPs, seconds, ...; size and SHA-256 of each file

A checkpoint is written in a hidden folder and renamed when complete: a crash leaves the old ones.
Loading checks sizes, hashes and the architecture first and changes nothing unless all is well. If
the newest checkpoint is damaged, the run says so, sets it aside as ``step-….damaged``, and goes on
from the one before; if all are damaged it stops: it never starts over by itself. Nothing is
pickled.

Of several processes the first reads and writes, whole tensors: a checkpoint does not know how many
there were, and any number goes on from it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from samara.errors import CheckpointError
from samara.model.disk_errors import disk_errors
from samara.runs import (
    differences,
    hash_file,
    hash_json,
    new_folder,
    read_json,
    write_json,
)
from samara.train.optim import Updater
from samara.train.processes import is_first, like, open_stored, share, whole

SCHEMA = 1
STATE = "state.json"
MODEL, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
FOLDER_NAME = re.compile(r"step-(\d{8})")

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Window:
    """What was seen since the last training record."""

    nll_sum: float = 0.0
    num_targets: int = 0
    tokens: int = 0
    useful_flops: float = 0.0
    seconds: float = 0.0


@dataclass(kw_only=True)
class TrainingState:
    """Where a run stands; the loop moves it on, a checkpoint holds it.

    Attributes:
        step: Updates done.
        tokens: Sequence positions trained on.
        flops: Floating-point operations of the model's own work.
        useful_flops: Those of them that MFU counts; 0 of what was trained before they were.
        seconds: Wall time of training, evaluation and saving left out, over all resumes.
        peak_memory_bytes: The highest so far; see :class:`samara.train.memory.PeakMemory`.
        train_loss: The loss of the last training record.
        validation_loss: The last one measured.
        window: What the next training record will be made of.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    useful_flops: float = 0.0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    train_loss: float | None = None
    validation_loss: float | None = None
    window: Window = field(default_factory=Window)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingState:
        """Read what ``asdict`` wrote; what was not counted then is 0."""
        return cls(**{**data, "window": Window(**data["window"])})


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    state: TrainingState


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are; need not exist yet.
        keep_last: How many are kept.
        identity: What the run is made from (plain data, as the corpus' hash); a checkpoint with
            another identity is refused.
    """

    def __init__(self, folder: Path, *, keep_last: int, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._identity = dict(identity)

    def save(self, model: nn.Module, optimizer: Updater, state: TrainingState) -> Path:
        """Write a checkpoint, then drop all but the newest ``keep_last``.

        All processes call it; the first one writes.

        Raises:
            ResourceError: If the disk is full; the checkpoints before are untouched.
        """
        tensors = {
            MODEL: whole(named_weights(model)),
            OPTIMIZER: whole(optimizer.state_dict()),
            RANDOM: _random_state(),
        }
        path = self.folder / f"step-{state.step:08d}"
        if not is_first():
            return path
        write_tensors(path, tensors, state=asdict(state), identity=self._identity)
        for old in self._paths()[: -self._keep_last]:
            shutil.rmtree(old)
        return path

    def newest(self) -> Path | None:
        """The newest checkpoint by its name, not verified; None if there is none."""
        paths = self._paths()
        return paths[-1] if paths else None

    def latest(self) -> Checkpoint | None:
        """Find the newest whole checkpoint; None if there is none at all.

        A damaged one is reported, set aside as ``….damaged``, and the one before is taken. All
        processes call it and get what the first one finds.

        Raises:
            CheckpointError: If all are damaged, or the newest belongs to a run of something else.
        """
        found = self._latest() if is_first() else None
        data = share(found and {"path": str(found.path), "state": asdict(found.state)})
        if data is None:
            return None
        return Checkpoint(path=Path(data["path"]), state=TrainingState.from_dict(data["state"]))

    def _latest(self) -> Checkpoint | None:
        sweep(self.folder)
        paths = self._paths()
        problem: CheckpointError | None = None
        for path in reversed(paths):
            try:
                data = verify(path)
            except CheckpointError as error:
                problem = problem or error
                log.warning("%s; it is set aside and the checkpoint before is taken", error)
                continue
            self._set_aside([p for p in paths if p > path])
            self._check_identity(path, data["identity"])
            return Checkpoint(path=path, state=TrainingState.from_dict(data["state"]))
        if problem is not None:
            raise CheckpointError(
                f"{problem}; no whole checkpoint is left in {self.folder}: "
                "remove that folder to start from step 0"
            )
        return None

    def load(self, checkpoint: Checkpoint, model: nn.Module, optimizer: Updater) -> None:
        """Put a verified checkpoint into a model, its optimizer and the random generators.

        Raises:
            CheckpointError: If it is of another architecture; nothing is changed then.
        """
        load_weights(checkpoint.path / MODEL, model)
        with open_stored(checkpoint.path / OPTIMIZER) as stored:
            optimizer.load_state_dict(stored)
        with open_stored(checkpoint.path / RANDOM) as stored:
            _set_random_state(dict(stored))

    def _paths(self) -> list[Path]:
        if not self.folder.exists():
            return []
        return sorted(p for p in self.folder.iterdir() if FOLDER_NAME.fullmatch(p.name))

    def _check_identity(self, path: Path, identity: Mapping[str, Any]) -> None:
        changed = differences(identity, self._identity)
        if changed:
            raise CheckpointError(
                f"{path}: belongs to a run of something else ({'; '.join(changed[:3])}); "
                "give another run folder"
            )

    def _set_aside(self, damaged: list[Path]) -> None:
        for path in damaged:
            target = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written in ``folder`` (:mod:`samara.runs`)."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> None:
    """Write safetensors files and their ``state.json`` as one folder, complete or absent.

    Raises:
        ResourceError: If the disk is full.
    """
    with new_folder(path) as staging:
        for name, named in tensors.items():
            contiguous = {key: tensor.detach().contiguous() for key, tensor in named.items()}
            with disk_errors():
                save_file(contiguous, staging / name, metadata={"format": "pt"})
        files = {
            name: {"bytes": (staging / name).stat().st_size, "sha256": hash_file(staging / name)}
            for name in tensors
        }
        content = {"schema": SCHEMA, "identity": identity, "state": state, "files": files}
        write_json(staging / STATE, {**content, "sha256": hash_json(content)})


def verify(path: Path) -> dict[str, Any]:
    """Check a folder of :func:`write_tensors` and return its ``state.json``.

    Raises:
        CheckpointError: If a file is missing, truncated or altered, or of a newer format.
    """
    data = read_json(path / STATE)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise CheckpointError(
            f"{path / STATE}: schema {found!r} is not {SCHEMA}, the one this version reads"
        )
    if data.pop("sha256", None) != hash_json(data):
        raise CheckpointError(f"{path / STATE}: was altered, its SHA-256 is not the recorded one")
    for name, expected in data["files"].items():
        file = path / name
        if not file.exists():
            raise CheckpointError(f"{file}: is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file}: is cut off, {size} of {expected['bytes']} bytes")
        if hash_file(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: was altered, its SHA-256 is not the recorded one")
    return data


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a tied one under its first name only."""
    seen: dict[int, str] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            weights[name] = tensor
    return weights


def load_weights(file: Path, model: nn.Module) -> None:
    """Copy the weights of a safetensors file into a model of the same architecture.

    Raises:
        CheckpointError: If names or shapes differ, naming the first difference; the model is
            unchanged then.
    """
    weights = named_weights(model)
    with open_stored(file) as stored:
        _check_architecture(file, stored.shapes, {n: tuple(t.shape) for n, t in weights.items()})
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(like(tensor, stored[name]))


def _check_architecture(
    file: Path, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    for name in [*wanted, *stored]:
        there, here = stored.get(name), wanted.get(name)
        if there != here:
            raise CheckpointError(
                f"{file}: is of another architecture: {name} is {_shape(there)} there, "
                f"{_shape(here)} in this model"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
