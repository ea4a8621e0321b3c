"""A task's rows as training data: read, split, tokenised as the task is scored.

Prompted tasks train on the answer alone, with the tokens and the boundary that scoring uses
(:class:`samara.measure.language_model.LanguageModel`), then the end mark where the model writes the
answer itself. Tasks with a head train on labels. Rows are padded on the right to the longest of
their batch, and a little more: batches then have few lengths (:data:`LENGTH_STEP`).

Shapes: b rows, t positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from samara.adapt.config import FinetuneData, LabelsConfig
from samara.data.rows import Batch, Rows
from samara.data.tokens import IGNORE_INDEX
from samara.errors import ConfigError, DataError, did_you_mean
from samara.measure.language_model import LanguageModel
from samara.measure.task_examples import ChoiceExample, ExampleMaker, TextExample, WrittenExample
from samara.measure.task_rows import Row, as_text, fill, read_task
from samara.measure.tasks_config import TaskConfig
from samara.runs import hash_file, hash_json

LENGTH_STEP = 32
"""Padded rows are a multiple of this long. For each shape of a bfloat16 product oneDNN keeps code
of its own on CPU (half a megabyte), and a compiler compiles: with any length that is hundreds."""


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The rows of a fine-tuning run as they were read.

    Attributes:
        train: Rows to train on.
        validation: Rows for the validation loss.
        hash: Equal files and split, equal hash.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    hash: str


class TaskAndData(Protocol):
    """Settings that name a task and its training rows."""

    @property
    def task(self) -> TaskConfig: ...

    @property
    def data(self) -> FinetuneData: ...


def read_task_rows(config: TaskAndData) -> TaskRows:
    """Read and split.

    Raises:
        DataError: If a file is missing or malformed, or a split is left without rows.
    """
    data = config.data
    path = Path(data.train).expanduser()
    rows = read_training_rows(config)
    origin = {
        "train": hash_file(path),
        "max_rows": str(data.max_rows),
        "split_first_line": str(config.task.split_first_line),
    }
    if data.validation is not None:
        held_out = Path(data.validation).expanduser()
        origin["validation"] = hash_file(held_out)
        train, validation = rows, read_task(held_out, config.task)
    else:
        train, validation = _split(rows, data.validation_fraction)
        origin["validation_fraction"] = str(data.validation_fraction)
        if not train:
            raise DataError(
                f"{path}: holds one row {len(rows)} times, which is not enough to train on and to "
                "validate with; give more rows, or a file of validation rows: data.validation"
            )
    return TaskRows(train=tuple(train), validation=tuple(validation), hash=hash_json(origin))


def read_training_rows(config: TaskAndData) -> list[Row]:
    """The rows to train on before any are held out, in the order of the file.

    Raises:
        DataError: If the file is missing or malformed.
    """
    rows = read_task(Path(config.data.train).expanduser(), config.task)
    most = config.data.max_rows
    if most is None or most >= len(rows):
        return rows
    ranked = sorted(range(len(rows)), key=lambda place: (_content(rows[place]), place))
    return [rows[place] for place in sorted(ranked[:most])]


def _content(row: Row) -> str:
    return hash_json(dict(row.fields))


def _split(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and to validate with, at least one; equal rows stay together.

    Contents are ranked by their hashes: the same rows are split alike whatever their order, and a
    small file gets its fraction exactly.
    """
    hashes = [_content(row) for row in rows]
    ranked = sorted(set(hashes))
    held_out = set(ranked[: max(1, round(fraction * len(ranked)))])
    pairs = list(zip(rows, hashes, strict=True))
    train = [row for row, content in pairs if content not in held_out]
    return train, [row for row, content in pairs if content in held_out]


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedAnswer:
    """Tokens of a prompt and of the answer behind it; whether something had to be cut off."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    is_cut: bool


class AnswerRows(Rows):
    """Prompts with their answers, one a row: ``input_ids`` and ``targets`` (b, t).

    Only the answer is counted. Padding stands behind the text, and needs no mask in a causal model.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        maker: ExampleMaker,
        language_model: LanguageModel,
        *,
        sequence_length: int,
    ) -> None:
        """Tokenise.

        Args:
            rows: Of the task.
            maker: Makes the task's examples.
            language_model: Tokenises as scoring does.
            sequence_length: Most inputs of a row.

        Raises:
            DataError: If a row lacks what the task asks for.
        """
        self.sequence_length = sequence_length
        prompts, answers, ends = [], [], []
        for row in rows:
            prompt, answer, is_written = _prompt_and_answer(maker, row)
            prompts.append(prompt)
            answers.append(answer)
            ends.append(is_written)
        pairs = language_model.encode_pairs(prompts, answers)
        tokenizer = language_model.tokenizer
        end_mark = tokenizer.eos_token_id
        self._pad = next(
            (mark for mark in (tokenizer.pad_token_id, end_mark) if mark is not None), 0
        )
        self._rows = [
            _cut(
                pair.context,
                [*pair.continuation, *([end_mark] if is_written and end_mark is not None else [])],
                limit=sequence_length + 1,
            )
            for pair, is_written in zip(pairs, ends, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_cut(self) -> int:
        """Rows that were too long."""
        return sum(row.is_cut for row in self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """See :class:`~samara.data.rows.Rows`; t is that of the longest row, padded."""
        chosen = [self._rows[int(row) % len(self)] for row in rows]
        longest = max(len(row.prompt) + len(row.answer) for row in chosen) - 1
        length = _padded(longest, self.sequence_length)
        input_ids = torch.full((len(chosen), length), self._pad)
        targets = torch.full((len(chosen), length), IGNORE_INDEX)
        for place, row in enumerate(chosen):
            tokens = torch.tensor([*row.prompt, *row.answer])
            input_ids[place, : len(tokens) - 1] = tokens[:-1]
            start = len(row.prompt) - 1
            targets[place, start : len(tokens) - 1] = tokens[1 + start :]
        return {"input_ids": input_ids, "targets": targets}


def _padded(longest: int, limit: int) -> int:
    """The length of a batch: the next multiple, but no more than a row may have."""
    return min(limit, -(-longest // LENGTH_STEP) * LENGTH_STEP)


def _prompt_and_answer(maker: ExampleMaker, row: Row) -> tuple[str, str, bool]:
    """A row's prompt, its right answer, and whether an end mark belongs behind it."""
    match maker.make(row):
        case ChoiceExample() as choice:
            gold = choice.gold[0]
            return choice.contexts[gold], choice.continuations[gold], False
        case WrittenExample() as written:
            return written.prompt, written.shot.removeprefix(written.prompt), True
        case TextExample() as text:
            return "", text.text, True


def _cut(prompt: Sequence[int], answer: Sequence[int], *, limit: int) -> EncodedAnswer:
    """Fit a row: the prompt loses its start; only an answer too long by itself loses its end."""
    kept = list(answer[: limit - 1])
    room = limit - len(kept)
    return EncodedAnswer(
        prompt=tuple(prompt[-room:]),
        answer=tuple(kept),
        is_cut=len(prompt) + len(answer) > limit,
    )


# --- labels ---------------------------------------------------------------------------------------


class LabelRows(Rows):
    """Texts with a label each: ``input_ids`` and ``attention_mask`` (b, t), ``targets`` (b,)."""

    def __init__(
        self,
        rows: Sequence[Row],
        config: LabelsConfig,
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
    ) -> None:
        """Tokenise.

        Args:
            rows: Of the task.
            config: Which fields are text and label.
            labels: All labels, in the order of the outputs.
            tokenizer: Of the model.
            sequence_length: Most tokens of a row; longer texts lose their end.

        Raises:
            DataError: If a row lacks its text or has no label of the task.
        """
        self.sequence_length = sequence_length
        key = f"{config.name}.text"
        texts = [fill(config.text, row, key=key) for row in rows]
        self.rows = tuple(rows)
        self.targets = [label_position(row, config, labels) for row in rows]
        full = tokenizer(texts, verbose=False)["input_ids"]
        cut = tokenizer(texts, truncation=True, max_length=sequence_length)["input_ids"]
        self.is_cut = [len(a) > len(b) for a, b in zip(full, cut, strict=True)]
        self._tokens = cut
        marks = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_token_id: int = next((mark for mark in marks if mark is not None), 0)
        empty = next((row for row, own in zip(rows, cut, strict=True) if not own), None)
        if empty is not None:
            raise DataError(f"{empty.origin}: the text has no token")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def num_cut(self) -> int:
        """Texts that were too long."""
        return sum(self.is_cut)

    def batch(self, rows: Sequence[int]) -> Batch:
        """See :class:`~samara.data.rows.Rows`; t is that of the longest row, padded."""
        places = [int(row) % len(self) for row in rows]
        longest = max(len(self._tokens[place]) for place in places)
        length = _padded(longest, self.sequence_length)
        input_ids = torch.full((len(places), length), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for number, place in enumerate(places):
            tokens = self._tokens[place]
            input_ids[number, : len(tokens)] = torch.tensor(tokens)
            mask[number, : len(tokens)] = 1
        targets = torch.tensor([self.targets[place] for place in places])
        return {"input_ids": input_ids, "attention_mask": mask, "targets": targets}


def find_labels(config: LabelsConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of a task, in the order of the head's outputs.

    Raises:
        ConfigError: If there are fewer than two, or one is named twice.
        DataError: If a row has none.
    """
    found = config.labels or _labels_of(rows, config)
    if len(found) < 2 or len(set(found)) < len(found):
        raise ConfigError(
            f"task.labels: a classification needs two different labels or more, got {list(found)}"
        )
    return found


def _labels_of(rows: Sequence[Row], config: LabelsConfig) -> tuple[str, ...]:
    """The most frequent labels, sorted; of equally frequent ones the first by name."""
    counts = Counter(_label(row, config) for row in rows)
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    return tuple(sorted(ranked[: config.max_labels]))


def with_labels(rows: Sequence[Row], config: LabelsConfig, labels: Sequence[str]) -> list[Row]:
    """The rows to work with: all, or those of the labels where the task leaves others out.

    Raises:
        DataError: If a row has no label, or none is left.
    """
    if config.other_labels == "refuse":
        return list(rows)
    known = set(labels)
    kept = [row for row in rows if _label(row, config) in known]
    if not kept:
        raise DataError(
            f"{rows[0].path}: no row has one of the {len(known)} labels, and task.other_labels "
            "leaves out the rest"
        )
    return kept


def _label(row: Row, config: LabelsConfig) -> str:
    value = row.get(config.label)
    if not isinstance(value, (str, int)):
        raise DataError(f"{row.origin}: field '{config.label}' holds {value!r:.60}, not a label")
    return as_text(value)


def label_position(row: Row, config: LabelsConfig, labels: Sequence[str]) -> int:
    """Which of the labels a row has.

    Raises:
        DataError: If it has none, or another one.
    """
    label = _label(row, config)
    if label not in labels:
        raise DataError(
            f"{row.origin}: label '{label}' is none of the task's{did_you_mean(label, labels)}; "
            "name it in task.labels, or leave such rows out with task.other_labels: leave_out"
        )
    return labels.index(label)


def answer_rows(
    rows: Sequence[Row], config: TaskConfig, model: LanguageModel, *, sequence_length: int
) -> AnswerRows:
    """:class:`AnswerRows` of a prompted task."""
    return AnswerRows(rows, ExampleMaker(config, rows), model, sequence_length=sequence_length)
