"""The model of a task: a causal language model, or a trunk with a new head of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from samara.errors import ConfigError
from samara.measure.language_model_folder import (
    load_causal_model,
    load_strictly,
    load_tokenizer,
    quiet_transformers,
    refuse_missing,
)
from samara.runs import model_folder


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """A loaded model, on the CPU.

    Attributes:
        model: As stored, or in the type asked for.
        tokenizer: Its own.
        folder: Where it came from.
        new_tensors: Names of parameters that the folder does not hold: a fresh head.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    new_tensors: tuple[str, ...] = ()


def load_task_model(
    init_from: str | Path, *, labels: Sequence[str] | None, dtype: torch.dtype | None, seed: int
) -> TaskModel:
    """Load a model for a task.

    Args:
        init_from: A model folder, or that of the run that made it.
        labels: Of a task with a head; None: a causal language model.
        dtype: Of the weights in memory; None: as stored.
        seed: Of a new head.

    Raises:
        CheckpointError: If the folder holds no model of that kind with its tokenizer.
        ConfigError: If the model is no causal one where the task needs one.
    """
    folder = model_folder(Path(init_from).expanduser())
    with quiet_transformers():
        tokenizer = load_tokenizer(folder)
        if labels is None:
            model = load_causal_model(folder, dtype=dtype)
            _check_causal(model, folder)
            return TaskModel(model=model, tokenizer=tokenizer, folder=folder)
        return _with_head(folder, tokenizer, labels, dtype, seed)


@torch.no_grad()
def _check_causal(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model whose first position sees the second: it cannot write an answer."""
    model.train(False)
    first_2v = model(input_ids=torch.tensor([[0, 0], [0, 1]])).logits[:, 0]
    if not torch.allclose(first_2v[0], first_2v[1], rtol=1e-3, atol=1e-5):
        raise ConfigError(
            f"task.kind: needs a causal language model, and {folder} is an encoder; use labels, "
            "with a head of its own"
        )


def _with_head(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    dtype: torch.dtype | None,
    seed: int,
) -> TaskModel:
    torch.manual_seed(seed)
    model, report = load_strictly(
        AutoModelForSequenceClassification,
        folder,
        dtype=dtype,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    replaced = {entry[0] for entry in report["mismatched_keys"]}
    new = {*report["missing_keys"], *replaced}
    trunk = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_parameters()}
    refuse_missing(folder, (name for name in new & trunk if ".pooler." not in name))
    marks = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    model.config.pad_token_id = next((mark for mark in marks if mark is not None), 0)
    names = tuple(name for name, _ in model.named_parameters() if name in new)
    return TaskModel(model=model, tokenizer=tokenizer, folder=folder, new_tensors=names)
