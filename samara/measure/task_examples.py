"""Rows as examples: what a model is asked, and what would be right.

Three forms are enough for every task: choices are scored by likelihood, answers are written by the
model, texts are scored whole. Each example also knows how it reads once solved (`shot`), so that it
can stand before another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from samara.errors import ConfigError, DataError, did_you_mean
from samara.measure.task_rows import Row, as_text, fill
from samara.measure.tasks_config import (
    ClassificationConfig,
    GeneratedConfig,
    MinimalPairsConfig,
    MultipleChoiceConfig,
    PartialConfig,
    PerplexityConfig,
    PromptedConfig,
    QuestionConfig,
    SummarizationConfig,
    TaskConfig,
    TrueSetConfig,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class ChoiceExample:
    """Options, each a context and its continuation, and which of them are right.

    Attributes:
        row: Where it comes from.
        contexts: One for each option; usually all the same.
        continuations: What is scored after each context.
        names: The options without what joins them to their contexts; `acc_norm` divides by their
            characters.
        gold: Positions of the right options.
    """

    row: Row
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    names: tuple[str, ...]
    gold: tuple[int, ...]

    @property
    def shot(self) -> str:
        return self.contexts[self.gold[0]] + self.continuations[self.gold[0]]

    def after(self, prefix: str) -> ChoiceExample:
        """The same example with ``prefix`` before each context."""
        joined = {context: prefix + context for context in self.contexts}  # long; held once
        return replace(self, contexts=tuple(joined[context] for context in self.contexts))


@dataclass(frozen=True, kw_only=True)
class WrittenExample:
    """A prompt to answer in words, the accepted answers, and what joins the two when solved."""

    row: Row
    prompt: str
    references: tuple[str, ...]
    shot: str

    def after(self, prefix: str) -> WrittenExample:
        """The same example with ``prefix`` before its prompt."""
        return replace(self, prompt=prefix + self.prompt)


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """A text to score whole."""

    row: Row
    text: str


Example = ChoiceExample | WrittenExample | TextExample


class ExampleMaker:
    """Makes the examples of one task from its rows."""

    def __init__(self, config: TaskConfig, rows: Sequence[Row]) -> None:
        """Look at all rows of the task first: a classification's labels may come from them.

        Args:
            config: The task.
            rows: Its rows and those of its solved examples.

        Raises:
            ConfigError: If a classification has fewer than two labels.
            DataError: If a row lacks the label.
        """
        self.config = config
        self.labels: dict[str, str] = {}
        if isinstance(config, ClassificationConfig):
            self.labels = _labels(config, rows)

    def make(self, row: Row) -> Example:
        """The example of one row.

        Raises:
            ConfigError: If a template of the task is malformed.
            DataError: If the row lacks what the task asks for; the message names its line.
        """
        match self.config:
            case MultipleChoiceConfig() as config:
                return _multiple_choice(config, row)
            case TrueSetConfig() as config:
                return _true_set(config, row)
            case PartialConfig() as config:
                return _partial(config, row)
            case MinimalPairsConfig() as config:
                return _minimal_pair(config, row)
            case ClassificationConfig() as config:
                return self._classification(config, row)
            case QuestionConfig() as config:
                return _written(config, row, _answers(row, config.answers), config.no_answer)
            case SummarizationConfig() as config:
                return _written(config, row, _summaries(row, config.summaries), "")
            case PerplexityConfig() as config:
                return _text(config, row)
            case other:
                raise AssertionError(f"no examples of kind {type(other).__name__}")

    def _classification(self, config: ClassificationConfig, row: Row) -> ChoiceExample:
        label = _label(row, config.label)
        if label not in self.labels:
            raise DataError(
                f"{row.origin}: label '{label}' is none of the task's"
                f"{did_you_mean(label, self.labels)}"
            )
        gold = list(self.labels).index(label)
        return _choices(config, row, tuple(self.labels.values()), (gold,))


def _key(config: TaskConfig, field: str) -> str:
    return f"{config.name}.{field}"


def _choices(
    config: MultipleChoiceConfig | TrueSetConfig | ClassificationConfig,
    row: Row,
    choices: tuple[str, ...],
    gold: tuple[int, ...],
) -> ChoiceExample:
    """Several continuations of one prompt."""
    empty = next((place for place, choice in enumerate(choices) if not choice.strip()), None)
    if empty is not None:
        raise DataError(f"{row.origin}: choice {empty} is empty: nothing to score")
    prompt = fill(config.prompt, row, key=_key(config, "prompt"))
    return ChoiceExample(
        row=row,
        contexts=(prompt,) * len(choices),
        continuations=tuple(config.delimiter + choice for choice in choices),
        names=choices,
        gold=gold,
    )


def _multiple_choice(config: MultipleChoiceConfig, row: Row) -> ChoiceExample:
    if isinstance(config.choices, str):
        choices = tuple(row.texts(config.choices))
    else:
        key = _key(config, "choices")
        choices = tuple(fill(choice, row, key=key) for choice in config.choices)
    return _choices(config, row, choices, (_position(row, config.answer, choices),))


def _true_set(config: TrueSetConfig, row: Row) -> ChoiceExample:
    true = list(dict.fromkeys(row.texts(config.true_choices)))
    false = list(dict.fromkeys(row.texts(config.false_choices)))
    if not true or not false:
        raise DataError(f"{row.origin}: needs at least one true and one false choice")
    return _choices(config, row, (*true, *false), tuple(range(len(true))))


def _partial(config: PartialConfig, row: Row) -> ChoiceExample:
    contexts = tuple(row.texts(config.contexts))
    continuation = fill(config.continuation, row, key=_key(config, "continuation"))
    if not continuation.strip():
        raise DataError(f"{row.origin}: the continuation is empty: nothing to score")
    return ChoiceExample(
        row=row,
        contexts=contexts,
        continuations=(config.delimiter + continuation,) * len(contexts),
        names=contexts,
        gold=(_position(row, config.answer, contexts),),
    )


def _minimal_pair(config: MinimalPairsConfig, row: Row) -> ChoiceExample:
    prompt = fill(config.prompt, row, key=_key(config, "prompt"))
    good = fill(config.good, row, key=_key(config, "good"))
    bad = fill(config.bad, row, key=_key(config, "bad"))
    if not good.strip() or not bad.strip():
        raise DataError(f"{row.origin}: one of the two texts is empty: nothing to score")
    return ChoiceExample(
        row=row,
        contexts=(prompt, prompt),
        continuations=(config.delimiter + good, config.delimiter + bad),
        names=(good, bad),
        gold=(0,),
    )


def _written(
    config: GeneratedConfig, row: Row, references: tuple[str, ...], no_answer: str
) -> WrittenExample:
    prompt = fill(config.prompt, row, key=_key(config, "prompt"))
    solution = references[0] or no_answer
    return WrittenExample(
        row=row,
        prompt=prompt,
        references=references,
        shot=prompt + config.delimiter + solution,
    )


def _text(config: PerplexityConfig, row: Row) -> TextExample:
    text = fill(config.text, row, key=_key(config, "text"))
    if not text.strip():
        raise DataError(f"{row.origin}: the text is empty: nothing to score")
    return TextExample(row=row, text=text)


# --- fields that come in several forms --------------------------------------------------------


def _position(row: Row, field: str, choices: Sequence[str]) -> int:
    """The right choice, given by position, truth, letter or text."""
    value = row.get(field)
    place: int | None = None
    if isinstance(value, (bool, int)):
        place = int(value)
    elif isinstance(value, str) and value in choices:
        place = choices.index(value)
    elif isinstance(value, str) and value.isdecimal():
        place = int(value)
    elif isinstance(value, str) and len(value) == 1 and value in LETTERS:
        place = LETTERS.index(value)
    if place is None or not 0 <= place < len(choices):
        raise DataError(
            f"{row.origin}: field '{field}' holds {value!r:.60}, which is none of the "
            f"{len(choices)} choices; write its position (0 to {len(choices) - 1}), letter or text"
        )
    return place


def _label(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, (str, int)):
        raise DataError(f"{row.origin}: field '{field}' holds {value!r:.60}, not a label")
    return as_text(value)


def _labels(config: ClassificationConfig, rows: Sequence[Row]) -> dict[str, str]:
    if config.labels is not None:
        labels = {as_text(label): words for label, words in config.labels.items()}
    else:
        labels = {label: label for label in sorted({_label(row, config.label) for row in rows})}
    if len(labels) < 2:
        raise ConfigError(
            f"{_key(config, 'labels')}: a classification needs two labels or more, "
            f"this one has {len(labels)}"
        )
    return labels


def _answers(row: Row, field: str) -> tuple[str, ...]:
    """Accepted answers; ``("",)`` where there is none. SQuAD writes {"text": …} entries."""
    value: Any = row.get(field)
    if isinstance(value, dict):
        value = value.get("text", value)
    entries = value if isinstance(value, list) else [value]
    texts = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
    answers = [as_text(text) for text in texts if isinstance(text, (str, int, float))]
    if len(answers) < len(texts):
        raise DataError(f"{row.origin}: field '{field}' holds {value!r:.60}, not answers")
    return tuple(dict.fromkeys(answers)) or ("",)


def _summaries(row: Row, field: str) -> tuple[str, ...]:
    texts = [text for text in row.texts(field) if text.strip()]
    if not texts:
        raise DataError(f"{row.origin}: field '{field}' holds no summary")
    return tuple(texts)


def shots_prefix(config: PromptedConfig, row: Row, shots: Sequence[str]) -> str:
    """What stands before a row's prompt: the description and the solved examples."""
    description = fill(config.description, row, key=_key(config, "description"))
    return description + "".join(shot + config.separator for shot in shots)
