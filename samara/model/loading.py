"""Reading and writing a model folder, strictly: a checkpoint fits its configuration or is refused.

Transformers fills missing tensors with random numbers and warns. Here every tensor's name and shape
is compared with the model first, from the file's header.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from samara.errors import CheckpointError, ConfigError
from samara.model.configuration import SamaraConfig
from samara.model.modeling import SamaraForCausalLM, SamaraPreTrainedModel

Shape = tuple[int, ...]
ModelT = TypeVar("ModelT", bound=SamaraPreTrainedModel)


@overload
def load_model(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> SamaraForCausalLM: ...


@overload
def load_model(
    folder: Path,
    *,
    model_class: type[ModelT],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ModelT: ...


def load_model(
    folder: Path,
    *,
    model_class: type[SamaraPreTrainedModel] = SamaraForCausalLM,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SamaraPreTrainedModel:
    """Load a model saved by :func:`save_model` or ``save_pretrained``.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors`` (or its shards and their index).
        model_class: The class that was saved.
        dtype: Of the weights in memory. Left out: as saved.
        device: Where to. Left out: CPU.

    Raises:
        CheckpointError: If a file is missing or damaged, or a tensor does not fit ``config.json``.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _compare(
        folder, found=_tensor_shapes(folder), expected=_expected_shapes(folder, config, model_class)
    )
    with _no_progress_bars():
        model: SamaraPreTrainedModel = model_class.from_pretrained(
            folder, config=config, dtype=dtype or "auto", local_files_only=True
        )
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type] # a wrapper hides the signature
    return model


def save_model(
    model: SamaraPreTrainedModel, folder: Path, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` to ``folder``.

    Args:
        model: What to write.
        folder: Where.
        weights: Its weights by name, a tied one once, where the model itself has them in shards.
    """
    with _no_progress_bars():
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers draws bars on the terminal, across Samara's own progress line."""
    were_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if were_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read_config(folder: Path) -> SamaraConfig:
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder with a saved model")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds no config.json, so it is no saved model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type != SamaraConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}, not 'samara'; this folder holds another "
            "architecture"
        )
    try:
        config: SamaraConfig = SamaraConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def _tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Name and shape of every tensor, from the headers alone."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: cannot be read: {error}") from None
    shapes: dict[str, Shape] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 # no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged or cut short: {error}") from None
    return shapes


def _expected_shapes(
    folder: Path, config: SamaraConfig, model_class: type[SamaraPreTrainedModel]
) -> dict[str, Shape]:
    try:
        with torch.device("meta"):
            model = model_class(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    state: dict[str, Any] = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # saved once, as the embedding
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _compare(folder: Path, *, found: dict[str, Shape], expected: dict[str, Shape]) -> None:
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("holds unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            raise CheckpointError(
                f"{folder}: {problem} {len(names)} tensor(s) for its config.json, "
                f"such as {names[0]}; it was made for another model"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(found[name])}, config.json asks for "
                f"{list(shape)}; it was made for another model"
            )
