"""``samara average``: the mean of checkpoints of one model.

OpenELM publishes the mean of its last five (arXiv 2404.14619). Summed in float64, rounded once to
the type of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from samara.errors import CheckpointError, ConfigError
from samara.model.interchange import provenance
from samara.model.interchange.convert import refuse_occupied, write_model
from samara.model.interchange.formats import read_model
from samara.model.interchange.hf_folder import TOKENIZER_FILES, parse_size
from samara.model.interchange.provenance import Making, Origin, weights_hash
from samara.model.interchange.samara_format import design_folder
from samara.model.interchange.stored_model import StoredModel, described
from samara.model.interchange.stored_tensors import StoredTensor, dtype_name
from samara.runs import differences


@dataclass(frozen=True, kw_only=True)
class AverageResult:
    """What was written.

    Attributes:
        folder: Where.
        num_models: How many were averaged.
        weights_hash: SHA-256 of the mean.
    """

    folder: Path
    num_models: int
    weights_hash: str


def average(
    checkpoints: Sequence[Path], out: Path, *, max_shard_size: str = "5GB"
) -> AverageResult:
    """Write the mean of several checkpoints of one model, each counted the same.

    Args:
        checkpoints: Model folders, run folders with ``model/``, or training checkpoints of a
            finished run; all of one design and tokenizer. The result has the format of the first.
        out: The folder to make; must not hold anything.
        max_shard_size: Weights larger than this are cut into several files.

    Raises:
        CheckpointError: If one is not whole, or is of another design, tokenizer or type.
        ConfigError: If there are fewer than two, or one is given twice.
        ResourceError: If the disk is full.
    """
    paths, out = [Path(path) for path in checkpoints], Path(out)
    _check_list(paths)
    max_shard_bytes = parse_size(max_shard_size)
    refuse_occupied(out)
    models = [read_model(path) for path in paths]
    for other in models[1:]:
        _check_alike(models[0], other)
    first = models[0]
    mean = replace(
        first,
        tensors={name: _mean([m.tensors[name] for m in models]) for name in first.tensors},
        folder=out,
    )
    origins = [Origin.of(model.folder, format=model.format) for model in models]
    making = _common_making(models).then("average", origins)
    write_model(mean, out, to=first.format, max_shard_bytes=max_shard_bytes, making=making)
    return AverageResult(folder=out, num_models=len(models), weights_hash=weights_hash(out))


def _check_list(paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        raise ConfigError(f"average: {len(paths)} checkpoint given; give two or more")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"average: {path} is given twice; each counts once")
        seen.add(path.resolve())


def _check_alike(first: StoredModel, other: StoredModel) -> None:
    changed = differences(described(first.config), described(other.config))
    if changed:
        raise CheckpointError(
            f"{other.folder}: is of another design than {first.folder} ({'; '.join(changed[:3])}); "
            "only checkpoints of one model have a mean"
        )
    for name in TOKENIZER_FILES:
        if first.files.get(name) != other.files.get(name):
            raise CheckpointError(
                f"{other.folder}: has another tokenizer than {first.folder} ({name} differs); only "
                "checkpoints of one model have a mean"
            )
    for name, tensor in first.tensors.items():
        if other.tensors[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{other.folder}: {name} is {dtype_name(other.tensors[name].dtype)}, in "
                f"{first.folder} it is {dtype_name(tensor.dtype)}; convert them to one dtype first"
            )


def _mean(members: Sequence[StoredTensor]) -> StoredTensor:
    def load() -> Tensor:
        total = members[0].load().to(torch.float64)
        for member in members[1:]:
            total += member.load().to(torch.float64)
        return (total / len(members)).to(members[0].dtype)

    return replace(members[0], load=load)


def _common_making(models: Sequence[StoredModel]) -> Making:
    """What all members say about their making; scores are those of none of them."""
    first, *others = (
        replace(provenance.find_making(design_folder(model.folder)), scores=None)
        for model in models
    )
    return first if all(other == first for other in others) else Making()
