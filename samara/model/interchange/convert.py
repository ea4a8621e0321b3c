"""``samara convert``: a model from one format into another, bit for bit, or refused with a reason.

Weights are read one shard at a time. What was written is read back and compared before the folder
appears; on any failure the destination is as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from samara.errors import CheckpointError, ConfigError, did_you_mean
from samara.model.heads import CAUSAL, head_of
from samara.model.interchange import model_card, provenance
from samara.model.interchange.formats import (
    FORMATS,
    SourceFormat,
    TargetFormat,
    format_named,
    read_model,
)
from samara.model.interchange.hf_folder import TOKENIZER_FILES, parse_size
from samara.model.interchange.provenance import Making, Origin, weights_hash
from samara.model.interchange.samara_format import design_folder
from samara.model.interchange.stored_model import StoredModel, described
from samara.model.interchange.stored_tensors import DTYPES, cast
from samara.runs import new_folder, write_bytes, write_text

Dtype = Literal["keep", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """What was written.

    Attributes:
        folder: Where.
        source_format, target_format: From and to.
        num_parameters: Parameters of the model.
        weights_hash: SHA-256 of the weights as written.
        files: Names of the files written.
        notes: What the user should know, one sentence each.
    """

    folder: Path
    source_format: str
    target_format: str
    num_parameters: int
    weights_hash: str
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    src: Path,
    dst: Path,
    *,
    to: TargetFormat,
    source_format: SourceFormat = "auto",
    dtype: Dtype = "keep",
    max_shard_size: str = "5GB",
    license: str | None = None,
) -> ConversionResult:
    """Write the model at ``src`` into the new folder ``dst`` in another format.

    Args:
        src: A model folder, a run folder with ``model/``, or a llama2.c ``.bin`` file.
        dst: The folder to make; must not hold anything.
        to: ``samara``; ``openelm``: mlx-lm; ``llama``: transformers, vLLM and others, without code
            of ours; ``gguf``: llama.cpp.
        source_format: ``auto``: as its config.json says; ``llama2c`` must be named.
        dtype: Type of the weights written; ``keep``: as they are.
        max_shard_size: Weights larger than this are cut into several files.
        license: Identifier for the model card. Left out: the source's own, if it states one.

    Raises:
        CheckpointError: If the source is not whole or the target cannot express it.
        ConfigError: If an argument is wrong or an extra is not installed.
        ResourceError: If the disk is full.
    """
    src, dst = Path(src), Path(dst)
    format_named("to", to, [name for name, item in FORMATS.items() if item.write])
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype: unknown value '{dtype}'{did_you_mean(dtype, get_args(Dtype))}")
    max_shard_bytes = parse_size(max_shard_size)
    refuse_occupied(dst)
    model = read_model(src, source_format=source_format)
    origin = Origin.of(model.folder, format=model.format)
    making = provenance.find_making(design_folder(model.folder))
    if license is not None:
        making = replace(making, license=license)
    notes = _no_tokenizer(model) + write_model(
        _with_dtype(model, dtype),
        dst,
        to=to,
        max_shard_bytes=max_shard_bytes,
        making=making.then("convert", [origin]),
    )
    return ConversionResult(
        folder=dst,
        source_format=model.format,
        target_format=to,
        num_parameters=model.num_parameters,
        weights_hash=weights_hash(dst),
        files=tuple(sorted(path.name for path in dst.iterdir())),
        notes=tuple(notes),
    )


def write_model(
    model: StoredModel, dst: Path, *, to: str, max_shard_bytes: int, making: Making
) -> list[str]:
    """Write a model with its card and provenance, and read it back; complete or absent.

    Returns:
        What the user should know.

    Raises:
        CheckpointError: If the format cannot express the model, or the disk gives back other bits.
    """
    write = FORMATS[to].write
    assert write is not None
    _check_head(model, to)
    model = replace(model, name=dst.name)
    with new_folder(dst) as staging:
        notes = write(model, staging, max_shard_bytes=max_shard_bytes)
        if FORMATS[to].read is not None:
            _check_same(model, read_model(staging, source_format=to), dst)
        card = model_card.model_card(model, target=to, making=making)
        write_text(staging / model_card.FILE, card)
        _keep_foreign_card(model.folder, staging)
        provenance.write_provenance(staging, making)
    return notes


def _check_head(model: StoredModel, to: str) -> None:
    head = head_of(model.config)
    if to != "samara" and head is not CAUSAL:
        raise CheckpointError(
            f"{model.folder}: is a {head.description}, {to} holds causal ones only; keep it with "
            f"--to samara, which transformers' {head.auto_class} loads after `import samara`"
        )


def refuse_occupied(dst: Path) -> None:
    """Nothing a user has is overwritten.

    Raises:
        CheckpointError: If something is there.
    """
    if dst.exists() and (dst.is_file() or any(dst.iterdir())):
        raise CheckpointError(f"{dst}: exists already; give another folder, or remove it")


def _with_dtype(model: StoredModel, dtype: Dtype) -> StoredModel:
    if dtype == "keep":
        return model
    tensors = {name: cast(name, t, DTYPES[dtype]) for name, t in model.tensors.items()}
    return replace(model, tensors=tensors)


def _no_tokenizer(model: StoredModel) -> list[str]:
    if any(name in model.files for name in TOKENIZER_FILES):
        return []
    return [f"{model.folder} holds no tokenizer: add the one it was trained with to the new folder"]


def _keep_foreign_card(folder: Path, staging: Path) -> None:
    """A card that others wrote says what ours does not know."""
    for name in (model_card.SOURCE_CARD, model_card.FILE):
        card = folder / name
        ours = name == model_card.FILE and (folder / provenance.FILE).exists()
        if card.is_file() and not ours:
            write_bytes(staging / model_card.SOURCE_CARD, card.read_bytes())
            return


def _check_same(model: StoredModel, written: StoredModel, dst: Path) -> None:
    """Compare with what was read back: nothing is reported as converted that is not."""
    assert described(written.config) == described(model.config), "the design changed on its way"
    for name, tensor in model.tensors.items():
        wanted, found = tensor.load(), written.tensors[name].load()
        if wanted.dtype != found.dtype or not torch.equal(_bits(wanted), _bits(found)):
            raise CheckpointError(
                f"{dst}: {name} does not read back as it was written; the disk or memory is faulty"
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: not-a-number is equal to itself, and zero is not minus zero."""
    return tensor.contiguous().view(torch.uint8)
