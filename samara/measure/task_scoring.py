"""Ask a model the examples of a task and note, row by row, what it said and what that scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from samara.measure.language_model import ContinuationScore, LanguageModel
from samara.measure.local_tasks import Task
from samara.measure.task_examples import ChoiceExample, Example, TextExample, WrittenExample
from samara.measure.task_metrics import Item
from samara.measure.tasks_config import (
    ClassificationConfig,
    GeneratedConfig,
    MinimalPairsConfig,
    MultipleChoiceConfig,
    PartialConfig,
    QuestionConfig,
    SummarizationConfig,
    TaskConfig,
    TrueSetConfig,
)
from samara.measure.text_scores import (
    ROUGE,
    RougeScorer,
    exact_match,
    normalize_answer,
    token_f1,
)

Progress = Callable[[int], None]


def task_metrics(config: TaskConfig) -> tuple[str, ...]:
    """The scores of a task, the main one first."""
    match config:
        case MultipleChoiceConfig():
            return ("acc", "acc_norm")
        case TrueSetConfig():
            return ("mc2",)
        case PartialConfig():
            return ("acc",)
        case MinimalPairsConfig():
            return (config.metric,)
        case ClassificationConfig():
            return ("accuracy", "macro_f1", "macro_precision", "macro_recall")
        case QuestionConfig():
            return ("f1", "exact_match")
        case SummarizationConfig():
            return ROUGE
        case _:
            return ("perplexity", "word_perplexity", "bits_per_byte")


def score_task(task: Task, model: LanguageModel, *, on_progress: Progress) -> list[Item]:
    """Score all examples of a task, in their order.

    Args:
        task: A loaded task; it has at least one example.
        model: Who is asked.
        on_progress: Called with the number of requests done (a choice is a request).

    Raises:
        ConfigError: If a package that scores the answers is missing, or the answers leave no room
            for the prompts.
        DataError: If something to score does not fit into the model's context.
    """
    config = task.source.config
    match task.examples[0]:
        case ChoiceExample():
            choices = [example for example in task.examples if isinstance(example, ChoiceExample)]
            return _score_choices(config, choices, list(task.labels), model, on_progress)
        case WrittenExample():
            assert isinstance(config, GeneratedConfig)
            prompts = [example for example in task.examples if isinstance(example, WrittenExample)]
            return _score_written(config, prompts, model, on_progress)
        case TextExample():
            texts = [example for example in task.examples if isinstance(example, TextExample)]
            return _score_texts(texts, model, on_progress)


def num_requests(examples: Sequence[Example]) -> int:
    """How many requests a task makes of a model."""
    return sum(
        len(example.contexts) if isinstance(example, ChoiceExample) else 1 for example in examples
    )


# --- choices ----------------------------------------------------------------------------------


def _score_choices(
    config: TaskConfig,
    examples: Sequence[ChoiceExample],
    labels: Sequence[str],
    model: LanguageModel,
    on_progress: Progress,
) -> list[Item]:
    scores = model.loglikelihood(
        [context for example in examples for context in example.contexts],
        [continuation for example in examples for continuation in example.continuations],
        on_progress=on_progress,
    )
    ends = accumulate((len(example.contexts) for example in examples), initial=0)
    return [
        _choice_item(config, example, labels, scores[start:stop])
        for example, (start, stop) in zip(examples, pairwise(ends), strict=True)
    ]


def _choice_item(
    config: TaskConfig,
    example: ChoiceExample,
    labels: Sequence[str],
    scores: Sequence[ContinuationScore],
) -> Item:
    likelihoods = np.array([score.loglikelihood for score in scores])
    characters = np.array([max(len(name), 1) for name in example.names])
    names = labels or example.names
    chosen = int(likelihoods.argmax())
    right = example.gold[0]
    match config:
        case MultipleChoiceConfig():
            numbers = {
                "acc": float(chosen == right),
                "acc_norm": float((likelihoods / characters).argmax() == right),
            }
        case TrueSetConfig():
            share = np.exp(likelihoods - np.logaddexp.reduce(likelihoods))
            numbers = {"mc2": float(share[list(example.gold)].sum())}
        case MinimalPairsConfig():
            # A tie prefers neither.
            numbers = {config.metric: float(likelihoods[0] > likelihoods[1])}
        case ClassificationConfig():
            tokens = np.array([score.num_tokens for score in scores])
            divisor = {"none": 1.0, "characters": characters, "tokens": tokens}[config.normalize]
            chosen = int((likelihoods / divisor).argmax())
            numbers = {"accuracy": float(chosen == right)}
        case _:
            numbers = {"acc": float(chosen == right)}
    return _item(
        example,
        scores=numbers,
        gold=tuple(names[place] for place in example.gold),
        prediction=names[chosen],
        is_truncated=any(score.is_truncated for score in scores),
        details={"loglikelihoods": likelihoods.tolist()},
    )


# --- answers in words -------------------------------------------------------------------------


def _score_written(
    config: GeneratedConfig,
    examples: Sequence[WrittenExample],
    model: LanguageModel,
    on_progress: Progress,
) -> list[Item]:
    rouge = RougeScorer() if isinstance(config, SummarizationConfig) else None
    answers = model.generate_until(
        [example.prompt for example in examples],
        stop=config.stop,
        max_new_tokens=config.max_new_tokens,
        on_progress=on_progress,
    )
    items = []
    for example, answer in zip(examples, answers, strict=True):
        text = answer.text.strip()
        if rouge is not None:
            numbers = rouge.score(text, example.references)
        else:
            assert isinstance(config, QuestionConfig)
            numbers = _question_scores(config, text, example.references)
        items.append(
            _item(
                example,
                scores=numbers,
                gold=example.references,
                prediction=text,
                is_truncated=answer.is_truncated,
            )
        )
    return items


def _question_scores(
    config: QuestionConfig, answer: str, references: Sequence[str]
) -> dict[str, float]:
    if normalize_answer(answer) == normalize_answer(config.no_answer):
        answer = ""
    return {
        "exact_match": exact_match(answer, references),
        "f1": token_f1(answer, references),
    }


# --- whole texts ------------------------------------------------------------------------------


def _score_texts(
    examples: Sequence[TextExample], model: LanguageModel, on_progress: Progress
) -> list[Item]:
    texts = [example.text for example in examples]
    items = []
    scores = model.loglikelihood_rolling(texts, on_progress=on_progress)
    for example, score in zip(examples, scores, strict=True):
        nll = -score.loglikelihood
        items.append(
            _item(
                example,
                sums={
                    "perplexity": (nll, float(score.num_tokens)),
                    "word_perplexity": (nll, float(len(example.text.split()))),
                    "bits_per_byte": (nll / math.log(2), float(len(example.text.encode()))),
                },
                details={"loglikelihood": score.loglikelihood},
            )
        )
    return items


def _item(
    example: Example,
    *,
    scores: dict[str, float] | None = None,
    sums: dict[str, tuple[float, float]] | None = None,
    gold: tuple[str, ...] = (),
    prediction: str = "",
    is_truncated: bool = False,
    details: dict[str, Any] | None = None,
) -> Item:
    return Item(
        line=example.row.line,
        id=example.row.id,
        scores=scores or {},
        sums=sums or {},
        gold=gold,
        prediction=prediction,
        is_truncated=is_truncated,
        details=details or {},
    )
