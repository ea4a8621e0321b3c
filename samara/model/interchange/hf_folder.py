"""A Hugging Face model folder: config.json, weights in safetensors files, and what travels along.

Weights lie in ``model.safetensors``, or in shards that ``model.safetensors.index.json`` maps tensor
names to. Pickled weights are never opened: a pickle runs whatever code its maker put in.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from samara.errors import CheckpointError, ConfigError
from samara.model.disk_errors import disk_errors
from samara.model.interchange.stored_tensors import DTYPES, StoredTensor, Tensors, dtype_name
from samara.runs import read_json, write_bytes, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
GENERATION_CONFIG = "generation_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
STORED_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


# --- reading ----------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        CheckpointError: If the folder is no model folder, or the weights are quantized.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder with a model")
    path = folder / CONFIG
    if not path.exists():
        hint = "; it is an adapter, merge it into its base first" if _is_adapter(folder) else ""
        raise CheckpointError(f"{folder}: holds no {CONFIG}, so it is no model folder{hint}")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: must hold a mapping of keys")
    for key in ("quantization_config", "quantization"):
        if fields.get(key):
            raise CheckpointError(
                f"{path}: {key} says the weights are quantized; convert from the original weights"
            )
    return fields


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Describe all tensors of a folder; the values are read later.

    Raises:
        CheckpointError: If a file is missing, damaged, or does not hold what the index says.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, names in weight_files(folder).items():
        found = _read_file(path)
        for name in names:
            if name not in found:
                raise CheckpointError(f"{path}: does not hold {name}, which {INDEX} says it does")
        tensors |= found
    return tensors


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a folder, each with the tensors that the index says it holds.

    Raises:
        CheckpointError: If there are none, or a shard is missing.
    """
    if (folder / WEIGHTS).exists():
        return {folder / WEIGHTS: []}
    if not (folder / INDEX).exists():
        raise CheckpointError(_why_no_weights(folder))
    where = _read_index(folder / INDEX)
    files: dict[Path, list[str]] = {}
    for shard in sorted(set(where.values())):
        path = folder / shard
        if not path.exists():
            raise CheckpointError(
                f"{path}: this shard is missing; fetch it again, {INDEX} lists it"
            )
        files[path] = [name for name, file in where.items() if file == shard]
    return files


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder}: holds its weights only as {pickles[0]}, a pickle, which can run any code "
            "when opened; ask its makers for safetensors, or save it as such where you trust it"
        )
    if any(folder.glob("*.gguf")):
        return f"{folder}: holds a GGUF file, which is for export only; convert its original folder"
    return f"{folder}: holds no {WEIGHTS} and no {INDEX}"


def _read_index(path: Path) -> dict[str, str]:
    content = read_json(path)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{path}: has no weight_map")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path}: {name} lies in {shard!r}, which is no file name")
    return where


def _read_file(path: Path) -> dict[str, StoredTensor]:
    """Describe the tensors of one safetensors file from its header."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                stored = file.get_slice(name)
                kind = stored.get_dtype()
                if kind not in STORED_DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} is of type {kind}; known are "
                        f"{', '.join(STORED_DTYPES.values())}"
                    )
                tensors[name] = StoredTensor(
                    shape=tuple(stored.get_shape()),
                    dtype=DTYPES[STORED_DTYPES[kind]],
                    load=functools.partial(_load, path, name),
                )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); fetch it again") from None
    return tensors


def _load(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files and the generation settings, by name."""
    names = (*TOKENIZER_FILES, GENERATION_CONFIG)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


# --- writing ----------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Tensors,
    files: Mapping[str, bytes],
    max_shard_bytes: int,
) -> None:
    """Write a model folder.

    Args:
        folder: Exists, and is empty.
        config: For ``config.json``; the weights' type is added as ``torch_dtype``, the key that
            all generations of readers know.
        tensors: By the names to write.
        files: What travels along.
        max_shard_bytes: A file of weights is no larger, unless one tensor is.

    Raises:
        ResourceError: If the disk is full.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    write_json(folder / CONFIG, {**config, "torch_dtype": dtype_name(dtype)})
    _write_tensors(folder, tensors, max_shard_bytes)
    for name, content in files.items():
        write_bytes(folder / name, content)


def _write_tensors(folder: Path, tensors: Tensors, max_shard_bytes: int) -> None:
    shards = _shards(tensors, max_shard_bytes)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        loaded = {name: tensors[name].load() for name in names}
        with disk_errors():
            save_file(loaded, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / INDEX, index)


def _shards(tensors: Tensors, max_bytes: int) -> list[list[str]]:
    """Names in their order, cut where a shard would grow too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def parse_size(text: str) -> int:
    """Read a size: ``5GB``, ``200 MB``, ``1000000``. Units are powers of 1000.

    Raises:
        ConfigError: If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?B)?\s*", text, flags=re.IGNORECASE)
    size = int(float(match[1]) * SIZE_UNITS[(match[2] or "B").upper()]) if match else 0
    if size <= 0:
        raise ConfigError(f"max_shard_size: '{text}' is no size; write it as 5GB or 200MB")
    return size
