"""The table of formats, and finding out which one a folder is in.

A format is one file with a function that reads, one that writes, or both; it is entered here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from samara.errors import CheckpointError, ConfigError, did_you_mean
from samara.model.interchange.gguf_format import write_gguf
from samara.model.interchange.hf_folder import CONFIG, read_config
from samara.model.interchange.llama2c_format import read_llama2c
from samara.model.interchange.llama_format import read_llama, write_llama
from samara.model.interchange.openelm_format import read_openelm, write_openelm
from samara.model.interchange.provenance import verify
from samara.model.interchange.samara_format import design_folder, read_samara, write_samara
from samara.model.interchange.stored_model import StoredModel

TargetFormat = Literal["samara", "openelm", "llama", "gguf"]
SourceFormat = Literal["auto", "samara", "openelm", "llama", "llama2c"]


class Write(Protocol):
    """Writes a model into an empty folder; returns what the user should know."""

    def __call__(self, model: StoredModel, folder: Path, *, max_shard_bytes: int) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to lay out a model on disk.

    Attributes:
        name: What the user calls it, and the ``model_type`` of its config.json where it has one.
        read: None: export only.
        write: None: import only.
    """

    name: str
    read: Callable[[Path], StoredModel] | None = None
    write: Write | None = None


FORMATS = {
    item.name: item
    for item in (
        Format(name="samara", read=read_samara, write=write_samara),
        Format(name="openelm", read=read_openelm, write=write_openelm),
        Format(name="llama", read=read_llama, write=write_llama),
        Format(name="llama2c", read=read_llama2c),
        Format(name="gguf", write=write_gguf),
    )
}
DETECTED = ("samara", "openelm", "llama")
"""Formats whose config.json names them."""


def read_model(path: Path, *, source_format: str = "auto") -> StoredModel:
    """Describe the model at ``path``; the weights are read when they are used.

    Args:
        path: A model folder, a run folder with one in ``model/``, or what ``source_format`` reads.
        source_format: Name of a format; ``auto``: as config.json says.

    Raises:
        CheckpointError: If there is no whole model there, or not in that format.
        ConfigError: If the format is unknown or cannot be read.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; give a model that is on this machine"
        )
    if path.is_dir():
        path = model_folder(path)
        verify(path)
    name = _detect(path) if source_format == "auto" else source_format
    read = format_named("from", name, [f.name for f in FORMATS.values() if f.read]).read
    assert read is not None
    return read(path)


def model_folder(path: Path) -> Path:
    """A model folder given by its own path or by that of the run that made it."""
    inner = path / "model"
    return inner if (inner / CONFIG).exists() and not (path / CONFIG).exists() else path


def format_named(option: str, name: str, choices: list[str]) -> Format:
    """Look up a format for the option of that name.

    Raises:
        ConfigError: If it is none of the choices.
    """
    if name not in choices:
        raise ConfigError(f"{option}: unknown format '{name}'{did_you_mean(name, choices)}")
    return FORMATS[name]


def _detect(path: Path) -> str:
    if path.is_file():
        raise CheckpointError(
            f"{path}: is a file, a model is a folder; for a llama2.c .bin file add --from llama2c"
        )
    folder = design_folder(path)
    model_type = read_config(folder).get("model_type")
    if model_type not in DETECTED:
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {model_type!r}, which Samara does not read"
            f"{did_you_mean(str(model_type), DETECTED)}"
        )
    return str(model_type)
