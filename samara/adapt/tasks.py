"""What a task asks of a model: its loss, its validation loss, its scores."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from samara.adapt.config import FinetuneConfig, LabelsConfig
from samara.adapt.data import AnswerRows, LabelRows, TaskRows, find_labels, with_labels
from samara.data.loader import evaluation_batches
from samara.data.rows import Batch, Rows
from samara.data.tokens import IGNORE_INDEX
from samara.measure.language_model import LanguageModel
from samara.measure.local_tasks import TaskSource, load_task
from samara.measure.task_examples import ExampleMaker
from samara.measure.task_metrics import Item
from samara.measure.task_rows import read_task, spread
from samara.measure.task_scoring import num_requests, score_task
from samara.measure.tasks_config import PromptedConfig
from samara.model.cross_entropy import linear_cross_entropy
from samara.progress import ProgressLine
from samara.train.objective import Objective, Sums, count_targets, output_weight
from samara.train.parallel import Precision, autocast

SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models whose logits are not hidden state times matrix alone."""


@dataclass(frozen=True, kw_only=True)
class LabelLoss:
    """Cross-entropy of the labels of a batch of texts, for any model with a classification head."""

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`~samara.train.objective.Objective`."""
        # Decoders fill a cache unless told not to, which layers that are left out cannot.
        takes = inspect.signature(type(model).forward).parameters
        no_cache = {"use_cache": False} if "use_cache" in takes else {}
        logits_bn = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **no_cache
        ).logits
        nll = cross_entropy(_exact(logits_bn), batch["targets"], reduction="sum")
        return Sums(loss=nll, nll=nll)


@dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """Next-token prediction on rows of one text each, without whole logits.

    A row is padded behind its text, which causality hides: neither mask nor positions are needed,
    and attention takes its fastest path.
    """

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`~samara.train.objective.Objective`."""
        hidden_btd = model.base_model(
            input_ids=batch["input_ids"], use_cache=False
        ).last_hidden_state
        weight_vd = output_weight(model)
        assert weight_vd is not None, "a language model has a matrix to the vocabulary"
        result = linear_cross_entropy(hidden_btd, weight_vd, batch["targets"])
        return Sums(loss=result.loss_sum, nll=result.nll_sum)


@dataclass(frozen=True, kw_only=True)
class AnswerLossByLogits:
    """The same for decoders whose logits are more than one product."""

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Sums:
        """See :class:`~samara.train.objective.Objective`."""
        logits_btv = model(input_ids=batch["input_ids"], use_cache=False).logits
        counted_bt = batch["targets"] != IGNORE_INDEX
        nll = cross_entropy(
            _exact(logits_btv[counted_bt]), batch["targets"][counted_bt], reduction="sum"
        )
        return Sums(loss=nll, nll=nll)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class Task:
    """A task with its data, for one model.

    Attributes:
        labels: Of a head; None: the task is prompted.
        objective: The loss.
        train: Training rows.
        validation: Rows of the validation loss.
        scored: Rows scored at the end, of a task with a head.
        left_out: Of a task with a head: rows of other labels, by what they were meant for.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        rows: TaskRows,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Tokenise everything.

        Raises:
            ConfigError, DataError: If rows and task do not fit each other.
        """
        self._config, self._tokenizer = config, tokenizer
        self.labels = task_labels(config, rows)
        self.scored: LabelRows | None = None
        self.left_out: dict[str, int] = {}
        settings, length = config.task, config.data.sequence_length
        self.train: AnswerRows | LabelRows
        self.validation: AnswerRows | LabelRows
        if isinstance(settings, LabelsConfig):
            assert self.labels is not None
            self.objective: Objective = LabelLoss()
            scored = read_task(scored_file(config), settings)
            own = {"train": rows.train, "validation": rows.validation, "scored": scored}
            kept = {name: with_labels(own[name], settings, self.labels) for name in own}
            self.left_out = {name: len(own[name]) - len(kept[name]) for name in own}
            places = spread(len(kept["scored"]), settings.limit)
            kept["scored"] = [kept["scored"][place] for place in places]
            self.train, self.validation, self.scored = (
                LabelRows(kept[name], settings, self.labels, tokenizer, sequence_length=length)
                for name in ("train", "validation", "scored")
            )
            return
        self.objective = causal_objective(model)
        asked = LanguageModel(model, tokenizer)
        maker = ExampleMaker(settings, [*rows.train, *rows.validation])
        self.train, self.validation = (
            AnswerRows(own, maker, asked, sequence_length=length)
            for own in (rows.train, rows.validation)
        )

    def validation_loss(self, model: PreTrainedModel, *, batch_size: int) -> float:
        """Mean loss over the targets of the validation rows."""
        return mean_loss(
            model,
            self.objective,
            self.validation,
            batch_size=batch_size,
            precision=self._config.training.precision,
        )

    def score(self, model: PreTrainedModel) -> list[Item]:
        """Every scored row with what the model said."""
        config = self._config
        if self.scored is None:
            return self._score_prompted(model)
        assert self.labels is not None
        logits_rn = predict(
            model,
            self.scored,
            batch_size=config.evaluation_batch_size,
            precision=config.training.precision,
        )
        predicted = [self.labels[place] for place in logits_rn.argmax(dim=1).tolist()]
        return [
            Item(
                line=row.line,
                id=row.id,
                scores={"accuracy": float(found == self.labels[target])},
                sums={},
                gold=(self.labels[target],),
                prediction=found,
                is_truncated=is_cut,
                details={},
            )
            for row, target, found, is_cut in zip(
                self.scored.rows, self.scored.targets, predicted, self.scored.is_cut, strict=True
            )
        ]

    def _score_prompted(self, model: PreTrainedModel) -> list[Item]:
        config, settings = self._config, self._config.task
        shots = settings.fewshot_data if isinstance(settings, PromptedConfig) else None
        task = load_task(
            TaskSource(
                config=settings,
                data=scored_file(config),
                fewshot_data=None if shots is None else Path(shots).expanduser(),
            )
        )
        asked = LanguageModel(model, self._tokenizer, batch_size=config.evaluation_batch_size)
        total = num_requests(task.examples)
        with ProgressLine(task.name, total=total, unit="requests") as line:
            return score_task(task, asked, on_progress=line.update)


def scored_file(config: FinetuneConfig) -> Path:
    """The file with the rows that are scored at the end."""
    return Path(config.task.data).expanduser()


def task_labels(config: FinetuneConfig, rows: TaskRows) -> tuple[str, ...] | None:
    """The labels of a task with a head; None of a prompted one."""
    if not isinstance(config.task, LabelsConfig):
        return None
    return find_labels(config.task, [*rows.train, *rows.validation])


def causal_objective(model: PreTrainedModel) -> Objective:
    """The loss of a causal model: without whole logits where they are one plain product."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    scales = [getattr(model.config, name, None) for name in SCALED_LOGITS]
    is_plain = head is not None and getattr(head, "bias", None) is None
    if is_plain and all(scale in (None, 1.0) for scale in scales):
        return AnswerLoss()
    return AnswerLossByLogits()


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    objective: Objective,
    rows: Rows,
    *,
    batch_size: int,
    precision: Precision,
) -> float:
    """Negative log-likelihood per target over all rows."""
    was_training = model.training
    model.train(False)
    total, num_targets = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in evaluation_batches(rows, batch_size=batch_size):
        on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with autocast(model.device, precision):
            total += objective(model, on_device).nll
        num_targets += count_targets([batch])
    model.train(was_training)
    return float(total) / num_targets


@torch.no_grad()
def predict(model: PreTrainedModel, rows: Rows, *, batch_size: int, precision: Precision) -> Tensor:
    """Logits of all rows (r, n), float32 or better, on the CPU."""
    was_training = model.training
    model.train(False)
    found = []
    for batch in evaluation_batches(rows, batch_size=batch_size):
        inputs = {n: t.to(model.device) for n, t in batch.items() if n != "targets"}
        with autocast(model.device, precision):
            found.append(_exact(model(**inputs).logits).cpu())
    model.train(was_training)
    return torch.cat(found)
