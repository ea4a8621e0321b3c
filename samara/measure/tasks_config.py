r"""What a task file may say: which rows, how they read as a prompt, what counts as right.

A task file is YAML. `kind` chooses the class below, its fields are the keys. Texts with `{field}`
are filled from the row; `{choices[0]}` takes an entry of a list; `{{` is a brace.

    name: ag_news
    kind: classification
    data: ag_news/test.jsonl.gz      # looked for beside the task file
    prompt: "{text}\nTopic:"
    labels: {World: world news, Sports: sports, Business: business, Sci/Tech: technology}

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from samara.config import Config


class TaskConfig(Config):
    """What every task file says."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """What the task is called in the results."""
    data: str
    """The rows: .jsonl, .csv or .tsv, each also with .gz; one line a row."""


class PromptedConfig(TaskConfig):
    """A task whose prompts may begin with solved examples."""

    num_fewshot: NonNegativeInt = 0
    """Solved examples before each prompt."""
    fewshot_data: str | None = None
    """Rows the examples come from. Left out: `data`, without the row itself."""
    fewshot_order: Literal["random", "first"] = "random"
    """`random`: drawn anew for each row, as the harness draws them; `first`: the first rows."""
    fewshot_field: str | None = None
    """Draw only from rows that agree with the row in this field."""
    description: str = ""
    """What stands before the examples."""
    separator: str = "\n\n"
    """What follows an example."""
    delimiter: str = " "
    """What stands between a prompt and its answer."""


class MultipleChoiceConfig(PromptedConfig):
    """One right choice; the likeliest is the model's. Scores: `acc`, `acc_norm` (by character)."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    prompt: str = "Question: {question}\nAnswer:"
    choices: str | tuple[str, ...] = "choices"
    """The field with the list of choices, or the choices themselves (`{field}` is filled)."""
    answer: str = "answer"
    """The field with the right choice: its position from 0, its letter, or its text."""


class TrueSetConfig(PromptedConfig):
    """Several true choices; their share of the probability is the score, `mc2`."""

    kind: Literal["true_set"] = "true_set"
    prompt: str = "Question: {question}\nAnswer:"
    true_choices: str = "correct_answers"
    """The field with the list of true choices."""
    false_choices: str = "incorrect_answers"
    """The field with the list of false choices."""


class PartialConfig(PromptedConfig):
    """One continuation after several contexts, one of them right. Score: `acc`."""

    kind: Literal["partial"] = "partial"
    contexts: str = "context_options"
    """The field with the list of contexts."""
    continuation: str = "{continuation}"
    answer: str = "answer"
    """The field with the position of the right context, from 0."""


class MinimalPairsConfig(PromptedConfig):
    """Two texts that differ in little; the model should prefer the good one."""

    kind: Literal["minimal_pairs"] = "minimal_pairs"
    prompt: str = ""
    good: str = "{good}"
    bad: str = "{bad}"
    delimiter: str = ""
    metric: Literal["acc", "pct_stereotype"] = "acc"
    """`pct_stereotype`: the share is a bias of the model, so that higher is not better."""


class ClassificationConfig(PromptedConfig):
    """One label of a fixed set, each put into words. Scores: `accuracy` and macro averages."""

    kind: Literal["classification"] = "classification"
    prompt: str = "{text}\nLabel:"
    text: str = "{text}"
    """What a text classification model reads in place of the prompt."""
    label: str = "label"
    """The field with the label."""
    labels: dict[str | bool | int, str] | None = None
    """Label -> the words the model chooses among. Left out: the labels of the data as they are."""
    normalize: Literal["none", "characters", "tokens"] = "none"
    """What the log-likelihood of the words is divided by before labels are compared."""


class GeneratedConfig(PromptedConfig):
    """A task that the model answers in its own words."""

    prompt: str
    max_new_tokens: PositiveInt = 32
    """The most tokens of an answer."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end an answer."""


class QuestionConfig(GeneratedConfig):
    """Short answers, compared as SQuAD compares them. Scores: `exact_match`, `f1`."""

    kind: Literal["question"] = "question"
    prompt: str = "{context}\nQuestion: {question}\nAnswer:"
    answers: str = "answers"
    """The field with the accepted answers: a text, a list, or SQuAD's; none: unanswerable."""
    no_answer: str = "unanswerable"
    """The words for "there is no answer", in examples and in what the model writes."""


class SummarizationConfig(GeneratedConfig):
    """Summaries compared with references by ROUGE. Scores: `rouge1`, `rouge2`, `rougeL`."""

    kind: Literal["summarization"] = "summarization"
    prompt: str = "{document}\nSummary:"
    summaries: str = "summaries"
    """The field with the reference, or a list of them (the best match counts)."""
    max_new_tokens: PositiveInt = 64


class PerplexityConfig(TaskConfig):
    """Whole texts. Scores: `perplexity` (by token), `word_perplexity`, `bits_per_byte`."""

    kind: Literal["perplexity"] = "perplexity"
    text: str = "{text}"


KINDS: dict[str, type[TaskConfig]] = {
    "multiple_choice": MultipleChoiceConfig,
    "true_set": TrueSetConfig,
    "partial": PartialConfig,
    "minimal_pairs": MinimalPairsConfig,
    "classification": ClassificationConfig,
    "question": QuestionConfig,
    "summarization": SummarizationConfig,
    "perplexity": PerplexityConfig,
}
