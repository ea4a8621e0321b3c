"""Tasks from local files: which rows are scored, and which solved examples stand before each.

A task is a task file (YAML, :mod:`samara.measure.tasks_config`), or a bare data file whose fields
say what it is:

    fields                                      kind
    question, choices, answer                   multiple_choice
    context_options, continuation, answer       partial
    good, bad                                   minimal_pairs
    sentence_good, sentence_bad                 minimal_pairs (as BLiMP writes them)
    question, answers [, context]               question
    document | dialogue, summaries | summary    summarization
    text, label                                 classification
    text                                        perplexity

Solved examples are drawn as the lm-evaluation-harness draws them: one generator per task, rows in
the order of the file, so that equal files and seeds give the harness's own prompts.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.config import load_yaml, validate
from samara.errors import ConfigError, DataError, did_you_mean
from samara.measure.task_examples import (
    ChoiceExample,
    Example,
    ExampleMaker,
    TextExample,
    WrittenExample,
    shots_prefix,
)
from samara.measure.task_rows import SUFFIXES, Row, Transform, read_rows, read_task, spread
from samara.measure.tasks_config import (
    KINDS,
    ClassificationConfig,
    MinimalPairsConfig,
    MultipleChoiceConfig,
    PartialConfig,
    PerplexityConfig,
    PromptedConfig,
    QuestionConfig,
    SummarizationConfig,
    TaskConfig,
)

SPLITS = ("train", "dev", "val", "valid", "validation", "test")
DEFAULT_SEED = 1234
"""The harness's seed of few-shot examples."""


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """A task and the files it is read from.

    Attributes:
        config: What the task is.
        data: File of the rows that are scored.
        fewshot_data: File of the solved examples; None: ``data`` without the row itself.
        transform: Applied to the fields of each row first.
        draws_spare: Draw one solved example more than is shown, from a file of their own too.
    """

    config: TaskConfig
    data: Path
    fewshot_data: Path | None = None
    transform: Transform | None = None
    draws_spare: bool = False

    @property
    def has_own_shots(self) -> bool:
        """Whether solved examples are drawn from the scored rows."""
        return self.fewshot_data is None or self.fewshot_data == self.data


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples ready to be scored, in the order of the file.

    Attributes:
        source: Where they come from.
        num_fewshot: Solved examples before each prompt.
        num_rows: Rows of the file; more than the examples if there is a limit.
        examples: Examples with what stands before them.
        labels: Label -> words of a classification; empty for other kinds.
    """

    source: TaskSource
    num_fewshot: int
    num_rows: int
    examples: tuple[Example, ...]
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.source.config.name


# --- finding ----------------------------------------------------------------------------------


def task_source(path: Path) -> TaskSource:
    """The task of a task file, or of a data file by its fields.

    Raises:
        ConfigError: If the task file is malformed; the message names the key.
        DataError: If the data file is malformed or its fields fit no kind of task.
    """
    if path.suffix in (".yaml", ".yml"):
        config = read_task_file(path)
        fewshot = config.fewshot_data if isinstance(config, PromptedConfig) else None
        return TaskSource(
            config=config,
            data=path.parent / config.data,
            fewshot_data=None if fewshot is None else path.parent / fewshot,
        )
    return TaskSource(config=_recognize(path), data=path)


def read_task_file(path: Path) -> TaskConfig:
    """The settings in a task file.

    Raises:
        ConfigError: If the file is missing, no YAML, of unknown kind, or a key is wrong.
    """
    data = load_yaml(path)
    kind = data.get("kind")
    if kind is None:
        raise ConfigError(f"{path}: kind: is required and not given{did_you_mean('', KINDS)}")
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind: unknown value '{kind}'{did_you_mean(str(kind), KINDS)}")
    try:
        return validate(KINDS[kind], data)
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def _recognize(path: Path) -> TaskConfig:
    """The kind of task that a data file's first row fits."""
    fields = set(read_rows(path)[0].fields)
    settings = {"name": _name(path), "data": path.name}
    if {"question", "choices", "answer"} <= fields:
        return MultipleChoiceConfig(**settings)
    if {"context_options", "continuation", "answer"} <= fields:
        return PartialConfig(**settings)
    if {"good", "bad"} <= fields:
        return MinimalPairsConfig(**settings)
    if {"sentence_good", "sentence_bad"} <= fields:
        return MinimalPairsConfig(**settings, good="{sentence_good}", bad="{sentence_bad}")
    if {"question", "answers"} <= fields:
        prompt = "{context}\n" if "context" in fields else ""
        return QuestionConfig(**settings, prompt=prompt + "Question: {question}\nAnswer:")
    for document in ("document", "dialogue"):
        for summaries in ("summaries", "summary"):
            if {document, summaries} <= fields:
                prompt = f"{{{document}}}\nSummary:"
                return SummarizationConfig(**settings, prompt=prompt, summaries=summaries)
    if {"text", "label"} <= fields:
        return ClassificationConfig(**settings)
    if "text" in fields:
        return PerplexityConfig(**settings)
    raise DataError(
        f"{path}: its fields ({', '.join(sorted(map(str, fields)))}) fit no kind of task; write a "
        "task file that says what they are"
    )


def _name(path: Path) -> str:
    """The file's name without its ending; a split's name alone says too little."""
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    full = f"{path.resolve().parent.name}_{stem}" if stem in SPLITS else stem
    return re.sub(r"[^\w.-]+", "_", full)


def is_task_path(name: str) -> bool:
    """Whether a task is named by a file and not by a standard name."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix in (".yaml", ".yml", *SUFFIXES)


# --- loading ----------------------------------------------------------------------------------


def load_task(
    source: TaskSource,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
) -> Task:
    """Read a task's rows and make its examples.

    Args:
        source: The task.
        num_fewshot: Solved examples before each prompt. Left out: as the task says.
        limit: Score this many rows, evenly spread over the file (many files are sorted by label
            or subject). Left out: as the task says.
        seed: Of the solved examples drawn.

    Raises:
        ConfigError: If the task's templates are malformed, or it asks for more solved examples
            than there are.
        DataError: If a file or a row is not what the task asks for; the message names the line.
    """
    config = source.config
    rows = read_task(source.data, config, source.transform)
    shots = _num_shots(config, num_fewshot)
    pool = rows
    if shots and not source.has_own_shots:
        assert source.fewshot_data is not None
        pool = read_task(source.fewshot_data, config, source.transform)
    maker = ExampleMaker(config, rows if pool is rows else [*rows, *pool])
    chosen = set(spread(len(rows), config.limit if limit is None else limit))
    examples: list[Example] = []
    shots_of_rows = _drawn_shots(source, rows, pool, count=shots, seed=seed) if shots else None
    for index, row in enumerate(rows):
        # Drawn for every row, so that a limit changes no row's examples.
        drawn = [] if shots_of_rows is None else next(shots_of_rows)
        if index in chosen:
            examples.append(_with_prefix(config, maker, row, drawn))
    return Task(
        source=source,
        num_fewshot=shots,
        num_rows=len(rows),
        examples=tuple(examples),
        labels=maker.labels,
    )


def _num_shots(config: TaskConfig, override: int | None) -> int:
    if not isinstance(config, PromptedConfig):
        return 0
    return config.num_fewshot if override is None else override


def _with_prefix(
    config: TaskConfig, maker: ExampleMaker, row: Row, shots: Sequence[Row]
) -> Example:
    example = maker.make(row)
    if isinstance(example, TextExample) or not isinstance(config, PromptedConfig):
        return example
    solved = []
    for shot in shots:
        made = maker.make(shot)
        assert isinstance(made, (ChoiceExample, WrittenExample))
        solved.append(made.shot)
    return example.after(shots_prefix(config, row, solved))


def _drawn_shots(
    source: TaskSource,
    rows: Sequence[Row],
    pool: Sequence[Row],
    *,
    count: int,
    seed: int,
) -> Iterator[list[Row]]:
    """The solved examples of each row, in order."""
    config = source.config
    assert isinstance(config, PromptedConfig)
    field = config.fewshot_field
    groups: dict[Any, list[Row]] = defaultdict(list)
    for candidate in pool:
        groups[None if field is None else candidate.get(field)].append(candidate)
    generators: dict[Any, random.Random] = defaultdict(lambda: random.Random(seed))
    needed = count + (pool is rows)  # one more, in case the row itself is drawn
    for row in rows:
        group = None if field is None else row.get(field)
        candidates = groups[group]
        if len(candidates) < needed:
            where = "" if field is None else f" with {field} '{group}'"
            raise ConfigError(
                f"{config.name}.num_fewshot: {count} examples were asked for, "
                f"{pool[0].path} holds {len(candidates) - needed + count}{where}"
            )
        spare = source.draws_spare and len(candidates) > needed == count
        if config.fewshot_order == "first":
            drawn = candidates[:needed]
        else:
            drawn = generators[group].sample(candidates, needed + spare)
        yield [shot for shot in drawn if shot is not row][:count]
