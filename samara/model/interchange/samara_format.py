"""Samara's own format: what ``pretrain`` and ``save_pretrained`` write. Holds every design."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samara.errors import CheckpointError, ConfigError
from samara.model.configuration import SamaraConfig
from samara.model.heads import head_of
from samara.model.interchange.hf_folder import (
    CONFIG,
    read_config,
    read_files,
    read_tensors,
    write_folder,
)
from samara.model.interchange.stored_model import (
    EMBEDDING,
    HEAD,
    StoredModel,
    expected_tensors,
    without_tied_head,
)
from samara.model.interchange.stored_tensors import check_fit

TRAINING_STATE = "state.json"


def read_samara(folder: Path) -> StoredModel:
    """Read a model folder, or a training checkpoint of a run that has finished.

    Raises:
        CheckpointError: If it is not whole.
    """
    described_by = design_folder(folder)
    config = _parse(described_by / CONFIG, read_config(described_by))
    found = read_tensors(folder)
    if config.tie_word_embeddings:
        found = dict(without_tied_head(folder, found, embedding=EMBEDDING, head=HEAD))
    expected = expected_tensors(config)
    check_fit(folder, found=found, expected=expected)
    return StoredModel(
        folder=folder,
        format="samara",
        config=config,
        tensors={name: found[name] for name in expected},
        files=read_files(described_by),
    )


def design_folder(folder: Path) -> Path:
    """Where the design of a folder's weights stands: in a training checkpoint, not beside them.

    Raises:
        CheckpointError: If it is a checkpoint of a run that has not yet written its model.
    """
    if (folder / CONFIG).exists() or not (folder / TRAINING_STATE).exists():
        return folder
    model = folder.parent.parent / "model"
    if not (model / CONFIG).exists():
        raise CheckpointError(
            f"{folder}: is a checkpoint of a run without {model}, where design and tokenizer are; "
            "let the run finish first"
        )
    return model


def _parse(path: Path, fields: dict[str, Any]) -> SamaraConfig:
    try:
        config: SamaraConfig = SamaraConfig.from_dict(fields)
        head_of(config)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {'; '.join(str(error).splitlines())}") from None
    return config


def write_samara(model: StoredModel, folder: Path, *, max_shard_bytes: int) -> list[str]:
    """Write a folder that the Auto class of its head loads after ``import samara``."""
    fields = json.loads(model.config.to_json_string())
    fields.pop("dtype", None)
    write_folder(
        folder,
        config={**fields, "architectures": [head_of(model.config).model_class.__name__]},
        tensors=model.tensors,
        files=model.files,
        max_shard_bytes=max_shard_bytes,
    )
    return []
