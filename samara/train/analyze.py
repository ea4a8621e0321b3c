"""Verb ``analyze``: models and text in; how many directions their activations need, out.

The run folder gets ``ranks.json``: the effective rank r(alpha) before and after every linear of
every layer (:mod:`samara.measure.spectrum`), of each model, and with ``checkpoints`` of each
checkpoint that its training kept. Every model reads the same documents, cut by its own tokenizer.

With ``allocate`` it also gets ``allocated.yaml``: ranks for a low-rank design under a budget, as
the recipe of the model's own training with these ranks in it, or, where the model is no training
run, as the ``model:`` section alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

from samara.config import dump_yaml, load_yaml
from samara.data.config import LocalFiles
from samara.data.local_files import find_files, read_files
from samara.data.prepare import PreparedCorpus
from samara.errors import CheckpointError, ConfigError, did_you_mean
from samara.measure.config import AllocateConfig, AnalyzeConfig
from samara.measure.language_model import context_length
from samara.measure.language_model_folder import (
    load_strictly,
    load_tokenizer,
    open_head,
    quiet_transformers,
    refuse_missing,
    saved_head,
    select_device,
)
from samara.measure.rank_allocation import Allocation, Choice, allocate_ranks
from samara.measure.rank_measurement import (
    TOKENS_PER_CHANNEL,
    Spectrum,
    measure_ranks,
    num_passes,
    text_rows,
)
from samara.model.config import PROJECTIONS, ColaConfig, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.progress import ProgressLine
from samara.runs import (
    Lineage,
    RunFolder,
    hash_file,
    hash_weights,
    model_folder,
    write_json,
    write_text,
)
from samara.train.checkpoint import FOLDER_NAME, MODEL, load_weights, verify

RANKS_FILE = "ranks.json"
ALLOCATED_FILE = "allocated.yaml"


@dataclass(frozen=True, kw_only=True)
class _Text:
    """What is read."""

    documents: Sequence[str]
    hash: str


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model on its device, in evaluation mode."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    device: torch.device

    @property
    def trunk(self) -> nn.Module:
        """The model without its head: what has layers."""
        trunk: nn.Module = self.model.base_model
        return trunk


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One model's part of the results, and the spectra of its final weights."""

    entry: dict[str, Any]
    spectra: Sequence[Spectrum]
    design: ModelConfig | None
    """None: no model of Samara's."""


def analyze(config: AnalyzeConfig, run: RunFolder) -> None:
    """Measure the models and write ``ranks.json`` (and ``allocated.yaml``) to the run folder.

    Raises:
        ConfigError: If a model's context is too short, ``allocate`` names none of the models or one
            that has no design of Samara's, or its budget holds no allocation.
        CheckpointError: If a folder holds no complete model with its tokenizer, has no checkpoints
            though they are asked for, or an activation is not finite.
        DataError: If the text is missing or empty.
    """
    source = _allocation_source(config)
    text = _read(config)
    measured = {
        name: _measure(name, Path(path).expanduser(), config, text)
        for name, path in config.models.items()
    }
    weights = {f"models.{name}": own.entry["weights_hash"] for name, own in measured.items()}
    allocation = None
    if config.allocate is not None:
        allocation, recipe = _allocate(
            source, Path(config.models[source]).expanduser(), measured[source], config.allocate
        )
        write_text(run.path / ALLOCATED_FILE, recipe)
    run.write_lineage(Lineage(parents={"data": text.hash, **weights}))
    write_json(
        run.path / RANKS_FILE,
        {
            "schema": 1,
            "data_hash": text.hash,
            "split": config.split,
            "alphas": list(config.alphas),
            "sequence_length": config.sequence_length,
            "precision": config.precision,
            "models": {name: own.entry for name, own in measured.items()},
            "allocation": allocation,
        },
    )


# --- text ---------------------------------------------------------------------------------------


def _read(config: AnalyzeConfig) -> _Text:
    path = Path(config.data).expanduser()
    if path.is_dir():
        corpus = PreparedCorpus.open(path)
        documents = corpus.documents(config.split)
        return _Text(documents=[document.text for document in documents], hash=corpus.hash)
    (file,) = find_files((str(path),), key="data")
    source = LocalFiles(paths=(str(file),))
    return _Text(
        documents=[document.text for document in read_files(source, [file])], hash=hash_file(file)
    )


# --- models -------------------------------------------------------------------------------------


def _open(name: str, path: Path, config: AnalyzeConfig) -> _Opened:
    folder, device = model_folder(path), select_device(config.device)
    head = saved_head(folder)
    model: Any
    if head is not None:
        saved = open_head(folder, head, device=config.device)
        model, tokenizer = saved.model, saved.tokenizer
    else:
        with quiet_transformers():
            tokenizer = load_tokenizer(folder)
            model, report = load_strictly(AutoModel, folder, dtype=torch.float32)
        # A pooler above the layers may be missing; it is not looked at.
        refuse_missing(folder, [key for key in report["missing_keys"] if "pooler" not in key])
        model = model.to(device)
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"models.{name}: {folder} is an encoder and a decoder; only one of them can be analyzed"
        )
    longest = context_length(model, tokenizer)
    if config.sequence_length > longest:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} exceeds the context of models.{name}, "
            f"{longest} tokens; make it smaller"
        )
    model.train(False)
    model.config.use_cache = False
    return _Opened(model=model, tokenizer=tokenizer, folder=folder, device=device)


def _measure(name: str, path: Path, config: AnalyzeConfig, text: _Text) -> _Measured:
    opened = _open(name, path, config)
    rows = text_rows(
        text.documents,
        opened.tokenizer,
        sequence_length=config.sequence_length,
        max_tokens=config.max_tokens,
    )
    measurements: list[dict[str, Any]] = []
    spectra = _spectra(name, opened, rows, config)
    if config.checkpoints:
        for step, file in _checkpoints(name, path):
            load_weights(file, opened.model)
            label = f"{name}, step {step}"
            sites = _records(_spectra(label, opened, rows, config), config)
            measurements.append({"step": step, "sites": sites})
    measurements.append({"step": None, "sites": _records(spectra, config)})
    num_tokens = sum(map(len, rows))
    widest = max(one.width for one in spectra)
    own_config = opened.model.config
    return _Measured(
        entry={
            "path": str(path),
            "weights_hash": hash_weights(opened.folder),
            "num_tokens": num_tokens,
            "widest": widest,
            "warning": _warning(num_tokens, widest),
            "measurements": measurements,
        },
        spectra=spectra,
        design=own_config.to_design() if isinstance(own_config, SamaraConfig) else None,
    )


def _spectra(
    label: str, opened: _Opened, rows: Sequence[Sequence[int]], config: AnalyzeConfig
) -> list[Spectrum]:
    total = len(rows) * num_passes(opened.trunk, config.layers_at_once)
    with ProgressLine(f"analyze {label}", total=total, unit="rows") as line:
        return measure_ranks(
            opened.trunk,
            rows,
            batch_size=config.batch_size,
            device=opened.device,
            precision=config.precision,
            layers_at_once=config.layers_at_once,
            on_progress=line.update,
        )


def _records(spectra: Sequence[Spectrum], config: AnalyzeConfig) -> list[dict[str, Any]]:
    return [one.record(config.alphas) for one in spectra]


def _warning(num_tokens: int, widest: int) -> str | None:
    needed = TOKENS_PER_CHANNEL * widest
    if num_tokens >= needed:
        return None
    return (
        f"{num_tokens:,} tokens are few for {widest:,} channels: ranks look lower than they are; "
        f"give {needed:,} tokens or more (max_tokens, more text)"
    )


def _checkpoints(name: str, path: Path) -> Iterator[tuple[int, Path]]:
    folders = sorted(
        folder
        for folder in (path / "checkpoints").glob("step-*")
        if FOLDER_NAME.fullmatch(folder.name)
    )
    if not folders:
        raise CheckpointError(
            f"models.{name}: {path} holds no checkpoints of a training run; give its run folder, "
            "and let it keep some (checkpoint.keep_last)"
        )
    for folder in folders:
        verify(folder)
        yield int(folder.name.removeprefix("step-")), folder / MODEL


# --- allocation ---------------------------------------------------------------------------------


def _allocation_source(config: AnalyzeConfig) -> str:
    first = next(iter(config.models))
    if config.allocate is None or config.allocate.model is None:
        return first
    name = config.allocate.model
    if name not in config.models:
        raise ConfigError(f"allocate.model: no such model{did_you_mean(name, config.models)}")
    return name


def _allocate(
    name: str, path: Path, measured: _Measured, config: AllocateConfig
) -> tuple[dict[str, Any], str]:
    """The allocation as data, and as a recipe."""
    design = measured.design
    if design is None:
        raise ConfigError(
            f"allocate: models.{name} is no model of Samara's, so no recipe can hold its ranks; "
            "convert it with `samara convert --to samara`, or leave allocate out"
        )
    choices = _choices(measured.spectra, centred=config.centred)
    dense = sum(choice.in_features * choice.out_features for choice in choices)
    budget = round(config.budget * dense) if config.budget <= 1 else int(config.budget)
    found = allocate_ranks(choices, budget, multiple=config.multiple)
    per_layer: list[dict[str, int]] = [{} for _ in range(design.num_hidden_layers)]
    for choice, rank in zip(choices, found.ranks, strict=True):
        per_layer[choice.layer][choice.projection] = rank
    cola = ColaConfig.model_validate({"rank": per_layer, "activation": config.activation})
    allocated = design.model_copy(update={"cola": cola})
    data = {
        "model": name,
        "budget": budget,
        "parameters": found.parameters,
        "dense_parameters": dense,
        "captured": found.captured,
        "bound": found.bound,
        "exact": found.exact,
        "multiple": config.multiple,
        "centred": config.centred,
        "ranks": per_layer,
    }
    return data, _recipe(path, allocated, found, budget)


def _choices(spectra: Sequence[Spectrum], *, centred: bool) -> list[Choice]:
    by_place = {(s.place.layer, s.place.projection, s.place.space): s for s in spectra}
    return [
        Choice(
            layer=layer,
            projection=projection,
            in_features=by_place[layer, projection, "input"].width,
            out_features=by_place[layer, projection, "output"].width,
            spectrum=by_place[layer, projection, "output"].centred
            if centred
            else by_place[layer, projection, "output"].eigenvalues,
        )
        for layer in sorted({one.place.layer for one in spectra})
        for projection in PROJECTIONS
    ]


def _recipe(path: Path, design: ModelConfig, found: Allocation, budget: int) -> str:
    model = design.model_dump(mode="json", exclude_defaults=True)
    comment = (
        "# Ranks by `samara analyze`, from the activations of a trained model: "
        f"{found.parameters:,} of\n# {budget:,} parameters, {found.captured:.1%} of the outputs' "
        "energy on average.\n"
    )
    own = path / "recipe.yaml"
    recipe = load_yaml(own) if own.exists() else {}
    if not isinstance(recipe.get("pretrain"), dict):
        return comment + dump_yaml({"model": model})
    name = f"{recipe['name']}-allocated"
    settings = {**recipe["pretrain"], "model": model, "init_from": None}
    return comment + dump_yaml({"schema": 1, "name": name, "pretrain": settings})
