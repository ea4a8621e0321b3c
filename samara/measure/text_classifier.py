"""Ask a text classification model the rows of a classification task.

The model reads the row's text as it is (the task's ``text``), without prompt or solved examples,
and gives a score to each of its labels. Labels are matched by name (``id2label`` of
``config.json``), or by number where the data numbers them; a text longer than the model's context
loses its end.

Shapes: b batch, t positions, n labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samara.errors import ConfigError, DataError
from samara.measure.language_model_folder import SavedModel
from samara.measure.local_tasks import Task
from samara.measure.task_examples import ChoiceExample, Example
from samara.measure.task_metrics import Item
from samara.measure.task_rows import fill
from samara.measure.tasks_config import ClassificationConfig

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """A text's scores, one for each label of the model, and whether the text was cut."""

    logits: tuple[float, ...]
    is_truncated: bool


class TextClassifier:
    """A classification model with its tokenizer.

    Attributes:
        saved: The model and where it came from.
        labels: Names of its labels, by their number.
        batch_size: Texts at a time.
    """

    def __init__(self, saved: SavedModel, *, batch_size: int = 16) -> None:
        """Wrap a model.

        Raises:
            ConfigError: If the model does not choose one of several labels.
        """
        config: Any = saved.model.config
        kind = config.problem_type or "single_label_classification"
        if config.num_labels < 2 or kind != "single_label_classification":
            raise ConfigError(
                f"{saved.folder}: gives {config.num_labels} score(s) ({kind}), a classification "
                "task needs a model that chooses one of two labels or more"
            )
        self.saved = saved
        self.batch_size = batch_size
        self.labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))

    @property
    def model(self) -> Any:
        return self.saved.model

    @property
    def max_length(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @torch.no_grad()
    def classify(self, texts: Sequence[str], *, on_progress: Progress) -> list[LabelScores]:
        """Score the labels of each text; the result depends on the batch size by rounding only."""
        encoded: list[list[int]] = self.saved.tokenizer(list(texts), verbose=False)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: -len(encoded[index]))
        found: dict[int, LabelScores] = {}
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            rows = [encoded[index][: self.max_length] for index in indices]
            for index, logits_n in zip(indices, self._logits(rows), strict=True):
                found[index] = LabelScores(
                    logits=tuple(logits_n), is_truncated=len(encoded[index]) > self.max_length
                )
            on_progress(len(found))
        return [found[index] for index in range(len(texts))]

    def _logits(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Scores (b, n) of token rows, padded on the right; the mask hides the padding."""
        length = max(len(row) for row in rows)
        ids_bt = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        mask_bt = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        logits_bn = self.model(
            input_ids=ids_bt.to(self.device), attention_mask=mask_bt.to(self.device)
        ).logits
        scores: list[list[float]] = logits_bn.float().cpu().tolist()
        return scores


def score_labels(task: Task, classifier: TextClassifier, *, on_progress: Progress) -> list[Item]:
    """Score all rows of a classification task, in their order.

    Args:
        task: A loaded task.
        classifier: Who is asked.
        on_progress: Called with the number of rows done.

    Raises:
        ConfigError: If the task is of another kind, or its labels are not the model's.
        DataError: If a text is empty.
    """
    config = task.source.config
    if not isinstance(config, ClassificationConfig):
        raise ConfigError(
            f"task '{task.name}': is no classification, and {classifier.saved.folder} is a text "
            "classification model; give a task of kind classification, or a language model"
        )
    names = _names(task, classifier)
    key = f"{config.name}.text"
    texts = [fill(config.text, example.row, key=key) for example in task.examples]
    for example, text in zip(task.examples, texts, strict=True):
        if not text.strip():
            raise DataError(f"{example.row.origin}: the text is empty: nothing to classify")
    found = classifier.classify(texts, on_progress=on_progress)
    return [
        _item(example, list(task.labels), names, scores)
        for example, scores in zip(task.examples, found, strict=True)
    ]


def _item(
    example: Example, labels: Sequence[str], names: Sequence[str], scores: LabelScores
) -> Item:
    assert isinstance(example, ChoiceExample)
    right = labels[example.gold[0]]
    chosen = names[max(range(len(names)), key=scores.logits.__getitem__)]
    return Item(
        line=example.row.line,
        id=example.row.id,
        scores={"accuracy": float(chosen == right)},
        sums={},
        gold=(right,),
        prediction=chosen,
        is_truncated=scores.is_truncated,
        details={"logits": list(scores.logits)},
    )


def _names(task: Task, classifier: TextClassifier) -> tuple[str, ...]:
    """The model's labels as the task writes them."""
    numbers = tuple(str(number) for number in range(len(classifier.labels)))
    for names in (classifier.labels, numbers):
        if set(task.labels) <= set(names):
            return names
    missing = next(label for label in task.labels if label not in classifier.labels)
    raise ConfigError(
        f"task '{task.name}': label '{missing}' is none of {classifier.saved.folder}'s "
        f"({', '.join(classifier.labels)}); name them in id2label of its config.json"
    )
