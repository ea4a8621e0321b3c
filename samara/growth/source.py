"""What a growth starts from: a run's newest checkpoint, or a model folder; read, never changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samara.config import load_yaml
from samara.data.objectives import MaskedObjective
from samara.data.prepare import PreparedCorpus
from samara.data.tokenizer import TextTokenizer
from samara.errors import CheckpointError, ConfigError
from samara.growth.config import GrowConfig
from samara.growth.state import GrowthState
from samara.model.config import ModelConfig
from samara.model.loading import load_model
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM
from samara.runs import Compute, RunFolder, hash_weights, read_json
from samara.train.checkpoint import (
    FOLDER_NAME,
    MODEL,
    OPTIMIZER,
    TrainingState,
    named_weights,
    verify,
)
from samara.train.config import AdamW
from samara.train.config import Optimizer as OptimizerConfig
from samara.train.origin import check_tokenizer, origin_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to grow.

    Attributes:
        folder: Of the model.
        design: Expanded.
        checkpoint: With the optimizer's state; None: there is none.
        hash: Of the weights (and optimizer state) that grow.
        inherited: Compute that it and its ancestors took.
        first_row: Rows of this run's data order that the source has read.
        data_note: Where the data starts, and why, in a sentence.
    """

    folder: Path
    design: ModelConfig
    checkpoint: Path | None
    hash: str
    inherited: Compute = field(default_factory=Compute)
    first_row: int = 0
    data_note: str = ""

    def first_batch(self, batch_size: int) -> int:
        """Batches of this run's data order before the first one: none is read twice."""
        return -(-self.first_row // batch_size)


def open_source(config: GrowConfig, corpus: PreparedCorpus, tokenizer: TextTokenizer) -> Source:
    """Find and check what ``config.source`` names.

    Raises:
        ConfigError: If its context, tokenizer or objective is not that of the recipe, or a
            candidate needs an optimizer state that is not there.
        CheckpointError: If it holds no whole model, or all its checkpoints are damaged.
    """
    path = Path(config.source).expanduser()
    _check_folder(path)
    try:
        origin = origin_of(str(path), sequence_length=config.data.sequence_length)
        assert origin.folder is not None
        check_tokenizer(origin.folder, tokenizer)
    except (ConfigError, CheckpointError) as error:
        message = str(error).removeprefix("init_from: ").replace("init_from", "source")
        raise type(error)(f"source: {message}") from error
    _check_objective(config, origin.folder)
    run = RunFolder(path)
    checkpoint = newest_checkpoint(path)  # of a run; a model folder has none
    _check_moments(config, checkpoint, path)
    first_row, note = _position(config, corpus, run, checkpoint)
    return Source(
        folder=origin.folder,
        design=origin.design,
        checkpoint=checkpoint,
        hash=hash_weights(checkpoint or origin.folder),
        inherited=origin.inherited,
        first_row=first_row,
        data_note=note,
    )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(
            f"source: {path}: no such folder; give a run folder or a model folder"
        )
    if (path / "checkpoints").is_dir() and not (path / "model").is_dir():
        raise CheckpointError(
            f"source: {path}: the run has not finished, there is no model in it; run it to its end"
        )


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, which stays as it is; None if it has none.

    Raises:
        CheckpointError: If it has some and all are damaged.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return None
    paths = sorted(path for path in folder.iterdir() if FOLDER_NAME.fullmatch(path.name))
    problem: CheckpointError | None = None
    for path in reversed(paths):
        try:
            verify(path)
        except CheckpointError as error:
            problem = problem or error
            log.warning("source: %s; the checkpoint before is taken", error)
            continue
        return path
    if problem is not None:
        raise CheckpointError(f"source: {problem}; no whole checkpoint is left in {folder}")
    return None


def checkpoint_state(path: Path) -> TrainingState:
    """Where the run stood at a checkpoint."""
    return TrainingState.from_dict(read_json(path / "state.json")["state"])


def growth_state(
    checkpoint: Path | None, folder: Path, design: ModelConfig, optimizer: OptimizerConfig
) -> GrowthState:
    """Read weights and optimizer state.

    Args:
        checkpoint: Where both are; None: there are weights alone.
        folder: Of the model, where there is no checkpoint.
        design: Of the model, expanded.
        optimizer: Of the training to come; its decay rates belong to the state.
    """
    if checkpoint is not None:
        betas = optimizer.betas if isinstance(optimizer, AdamW) else optimizer.adamw_betas
        return GrowthState(
            design=design,
            weights=load_file(checkpoint / MODEL),
            optimizer=load_file(checkpoint / OPTIMIZER),
            betas=betas,
        )
    model_class = SamaraForMaskedLM if _is_masked(folder) else SamaraForCausalLM
    model = load_model(folder, model_class=model_class, dtype=torch.float32)
    weights = {name: tensor.detach() for name, tensor in named_weights(model).items()}
    return GrowthState(design=design, weights=weights)


def _is_masked(folder: Path) -> bool:
    return bool(read_json(folder / "config.json").get("attention") == "bidirectional")


def _check_objective(config: GrowConfig, folder: Path) -> None:
    masked = isinstance(config.objective, MaskedObjective)
    if masked != _is_masked(folder):
        looks = "both ways" if _is_masked(folder) else "back only"
        raise ConfigError(
            f"objective.kind: is {config.objective.kind}, but the model of source {folder} looks "
            f"{looks}; take the objective that it was trained with"
        )


def _check_moments(config: GrowConfig, checkpoint: Path | None, path: Path) -> None:
    if checkpoint is not None:
        return
    for number, operator in enumerate(config.candidates):
        if operator.moments != "reset":
            raise ConfigError(
                f"candidates.{number}.moments: {operator.moments} needs the optimizer's state, and "
                f"source {path} has no checkpoints; give the run folder that has them, or set "
                "moments: reset"
            )


def _position(
    config: GrowConfig, corpus: PreparedCorpus, run: RunFolder, checkpoint: Path | None
) -> tuple[int, str]:
    """Rows of this run's order that the source has read, and a sentence on it.

    The order is a function of seed, corpus and row layout alone (:mod:`samara.data.loader`): where
    all are the source's, the data goes on; where one differs, its rows stand in another order and
    nothing can be gone on with.
    """
    summary = run.path / "summary.json"
    if checkpoint is None or not summary.exists() or not run.recipe_path.exists():
        return 0, "the data starts at its beginning: what the source has read is not known"
    recipe = load_yaml(run.recipe_path)
    settings = recipe.get("grow") or recipe.get("pretrain")
    if settings is None:
        return 0, "the data starts at its beginning: the source learned from other data"
    known = read_json(summary)
    theirs = {"corpus": known["corpus_hash"], **_layout(settings)}
    ours = {"corpus": corpus.hash, **_layout(config.model_dump(mode="json"))}
    changed = [key for key, value in ours.items() if theirs[key] != value]
    if changed:
        what = " and ".join(changed)
        return 0, f"the data starts at its beginning: {what} differs from the source's"
    steps = checkpoint_state(checkpoint).step
    growth = known.get("growth") or {}
    rows = int(growth.get("first_row", 0)) + steps * int(settings["training"]["batch_size"])
    return rows, f"the data goes on behind the {rows:,} rows that the source has read"


def _layout(settings: Mapping[str, Any]) -> dict[str, Any]:
    data = settings["data"]
    return {
        "seed": settings["seed"],
        "objective": settings["objective"],
        **{key: data[key] for key in ("sequence_length", "rows", "document_boundaries")},
    }
