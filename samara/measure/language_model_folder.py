"""Open a saved model to be measured: any causal language model, or Samara's with another head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from samara.errors import CheckpointError, ConfigError
from samara.measure.language_model import LanguageModel
from samara.model.configuration import SamaraConfig
from samara.model.heads import Head, head_of
from samara.model.loading import load_model
from samara.model.modeling import SamaraPreTrainedModel
from samara.model.quantization import Quantization, quantize_int8, require_torchao
from samara.runs import hash_weights, model_folder, read_json

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SavedLanguageModel:
    """A model ready to be asked, the folder it came from, and the hash of its weights."""

    language_model: LanguageModel
    folder: Path
    weights_hash: str


def open_language_model(
    path: Path,
    *,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: int = 16,
    quantize: Quantization = "none",
) -> SavedLanguageModel:
    """Open a model folder, or the ``model`` folder of a run.

    Args:
        path: Holds ``config.json``, safetensors and a tokenizer; any causal language model that
            ``transformers`` knows. Nothing is fetched and no code of the folder is run.
        device: ``auto``: CUDA if there is one.
        precision: Of the weights in memory; log-probabilities are taken in float32 at least.
        batch_size: Rows at a time.
        quantize: ``int8``: the projections in memory, for decoding on CPU; the folder stays.

    Raises:
        CheckpointError: If the folder holds no complete model with its tokenizer.
        ConfigError: If ``cuda`` is asked for and there is none, or int8 off the CPU.
        ResourceError: If int8 is asked for and torchao is not installed.
    """
    folder = model_folder(path)
    where = select_device(device)
    if quantize == "int8":
        require_torchao()  # before a large model is read
    with quiet_transformers():
        tokenizer = load_tokenizer(folder)
        model = load_causal_model(folder, dtype=getattr(torch, precision)).to(where)
    if quantize == "int8":
        quantize_int8(model)
    return SavedLanguageModel(
        language_model=LanguageModel(model, tokenizer, batch_size=batch_size),
        folder=folder,
        weights_hash=hash_weights(folder),
    )


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model of Samara's under one of its heads, in evaluation mode, and where it came from."""

    model: SamaraPreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    weights_hash: str


def open_head(
    path: Path, head: Head, *, device: Device = "auto", precision: Precision = "float32"
) -> SavedModel:
    """Open a folder of one of Samara's own models.

    Args:
        path: A model folder, or the folder of a run that holds one.
        head: What it has to be.
        device: ``auto``: CUDA if there is one.
        precision: Of the weights in memory.

    Raises:
        CheckpointError: If the folder holds no complete model of this head with its tokenizer.
        ConfigError: If ``cuda`` is asked for and there is none.
    """
    folder, where = model_folder(path), select_device(device)
    with quiet_transformers():
        tokenizer = load_tokenizer(folder)
        found = saved_head(folder)
        if found is not head:
            kind = "no model of Samara's" if found is None else f"a {found.description}"
            raise CheckpointError(f"{folder}: is {kind}, a {head.description} is needed here")
        model = load_model(
            folder, model_class=head.model_class, dtype=getattr(torch, precision), device=where
        )
    model.train(False)
    return SavedModel(
        model=model, tokenizer=tokenizer, folder=folder, weights_hash=hash_weights(folder)
    )


def saved_head(path: Path) -> Head | None:
    """The head of a folder's model; None if it is not one of Samara's.

    Raises:
        CheckpointError: If the folder holds no readable ``config.json``.
    """
    folder = model_folder(path)
    fields = _read_config(folder)
    if fields["model_type"] != SamaraConfig.model_type:
        return None
    try:
        return head_of(SamaraConfig.from_dict(fields))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and hints while loading; what matters is checked here and raised."""
    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def select_device(name: Device) -> torch.device:
    """The device of a name; ``auto``: CUDA if there is one.

    Raises:
        ConfigError: If ``cuda`` is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, this machine has none; use cpu")
    return torch.device(name)


def _read_config(folder: Path) -> dict[str, Any]:
    _check_folder(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: holds no config.json, so it is no saved model")
    fields = read_json(folder / "config.json")
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise CheckpointError(f"{folder / 'config.json'}: names no model_type")
    return fields


def load_causal_model(folder: Path, *, dtype: torch.dtype | None) -> Any:
    """Load any causal language model, strictly; ``dtype`` None: as it is stored.

    Raises:
        CheckpointError: If the folder holds no complete model.
    """
    fields = _read_config(folder)
    if fields["model_type"] == SamaraConfig.model_type:
        return load_model(folder, dtype=dtype)
    model, report = load_strictly(AutoModelForCausalLM, folder, dtype=dtype)
    refuse_missing(folder, report["missing_keys"])
    return model


def load_strictly(
    auto_class: Any, folder: Path, *, dtype: torch.dtype | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Let transformers load a local model: safetensors alone, and no code of its own.

    Args:
        auto_class: Of transformers; says which head.
        folder: Of the model.
        dtype: None: as it is stored.
        options: More for ``from_pretrained``.

    Returns:
        The model, and transformers' report on the keys.

    Raises:
        CheckpointError: If it cannot be loaded.
    """
    try:
        loaded: tuple[Any, dict[str, Any]] = auto_class.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot be loaded by transformers: {first}") from error
    return loaded


def refuse_missing(folder: Path, names: Iterable[str]) -> None:
    """Refuse weights that are not whole.

    Raises:
        CheckpointError: If any tensor is missing.
    """
    lacking = sorted(names)
    if lacking:
        raise CheckpointError(
            f"{folder}: lacks {len(lacking)} tensor(s) for its config.json, such as {lacking[0]}"
        )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder with a saved model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: If there is none that can be loaded.
    """
    _check_folder(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(
            f"{folder}: holds no tokenizer; copy the tokenizer files of the model into it"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {first}") from error
