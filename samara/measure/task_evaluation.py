"""Evaluate a saved model on suites and local tasks: scores with intervals, and every row.

Equal model, data and settings give equal numbers; only the times differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samara.errors import ConfigError, did_you_mean
from samara.measure.compare import Interval
from samara.measure.language_model_folder import (
    Device,
    Precision,
    SavedLanguageModel,
    open_head,
    open_language_model,
    saved_head,
)
from samara.measure.local_tasks import (
    DEFAULT_SEED,
    Task,
    TaskSource,
    is_task_path,
    load_task,
    task_source,
)
from samara.measure.standard_tasks import missing_reason, standard_source
from samara.measure.suites import SUITES, Suite
from samara.measure.task_metrics import (
    METRICS,
    Item,
    Resampling,
    mean_over_tasks,
    metric_interval,
)
from samara.measure.task_results import SCHEMA, TaskResults, write_results
from samara.measure.task_scoring import num_requests, score_task, task_metrics
from samara.measure.text_classifier import TextClassifier, score_labels
from samara.model.heads import CLASSIFICATION
from samara.progress import ProgressLine
from samara.runs import environment, hash_file, hash_json

Opened = SavedLanguageModel | TextClassifier
"""Who is asked: a language model, by likelihoods and in words, or a classifier, by its labels."""


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A task to be run: its solved examples, and the score that counts for it."""

    source: TaskSource
    num_fewshot: int | None
    metric: str


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be run, and why the rest of the suite is not (task -> reason)."""

    tasks: tuple[_Planned, ...]
    not_run: dict[str, str]

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the score that counts for it."""
        return {item.source.config.name: item.metric for item in self.tasks}


def evaluate_tasks(
    model: Path,
    *,
    out: Path,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    num_fewshot: int | None = None,
    seed: int = DEFAULT_SEED,
    device: Device = "auto",
    precision: Precision = "float32",
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Score a model and write ``task_results.json`` and ``task_items.jsonl``.

    Args:
        model: A model folder, or the folder of a run that holds one: a causal language model, or
            for classification tasks Samara's text classification model.
        out: Folder for the results.
        tasks: Standard names (as ``arc_easy``), task files (.yaml) or data files.
        suite: One of :data:`~samara.measure.suites.SUITES`; its tasks without files are listed as
            not run.
        data_dir: Folder with the files of standard tasks
            (layout: :mod:`samara.measure.standard_tasks`).
        limit: Rows per task, evenly spread over its file. Left out: all.
        batch_size: Rows at a time.
        num_fewshot: Solved examples for every task. Left out: as the suite or task says.
        seed: Of the solved examples and of the intervals.
        device: ``auto``: CUDA if there is one.
        precision: Of the weights.
        confidence: Of the intervals.

    Returns:
        What ``task_results.json`` holds.

    Raises:
        SamaraError: One clear line for whatever of this is missing or malformed.
    """
    _check(tasks=tasks, suite=suite, limit=limit, batch_size=batch_size, num_fewshot=num_fewshot)
    chosen = None if suite is None else _suite(suite)
    plan = _plan(tasks, chosen, data_dir, num_fewshot)
    classifies = _is_classifier(model, num_fewshot)
    # All files are read before the model is: a mistake in the last one shows at once.
    loaded = [
        load_task(
            item.source,
            num_fewshot=0 if classifies else item.num_fewshot,
            limit=limit,
            seed=seed,
        )
        for item in plan.tasks
    ]
    opened: Opened
    if classifies:
        head = open_head(model, CLASSIFICATION, device=device, precision=precision)
        opened = TextClassifier(head, batch_size=batch_size)
    else:
        opened = open_language_model(
            model, device=device, precision=precision, batch_size=batch_size
        )
    how = Resampling(confidence=confidence, seed=seed)
    seconds: dict[str, float] = {}
    items = {task.name: _score(task, opened, seconds) for task in loaded}
    metrics = plan.metrics
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "model": _model_record(model, opened, precision),
        "suite": suite,
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "confidence": confidence,
        "bootstrap_samples": how.samples,
        "tasks": {
            task.name: _task_record(task, metrics[task.name], items[task.name], seed, how)
            for task in loaded
        },
        "averages": {} if chosen is None else _averages(chosen, metrics, items, how),
        "not_run": plan.not_run,
        "seconds": seconds,
        "environment": environment(),
    }
    write_results(TaskResults(summary=summary, items=items), out)
    return summary


def _is_classifier(model: Path, num_fewshot: int | None) -> bool:
    if saved_head(model) is not CLASSIFICATION:
        return False
    if num_fewshot:
        raise ConfigError(
            f"num_fewshot: {model} is a text classification model and reads no solved examples; "
            "leave it out"
        )
    return True


def _check(
    *,
    tasks: Sequence[str],
    suite: str | None,
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> None:
    if not tasks and suite is None:
        raise ConfigError(f"give a suite ({', '.join(SUITES)}) or at least one task")
    for name, value, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: must be {least} or more, got {value}")


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise ConfigError(f"suite '{name}': unknown{did_you_mean(name, SUITES)}")
    return SUITES[name]


def _plan(
    tasks: Sequence[str], suite: Suite | None, data_dir: Path | None, num_fewshot: int | None
) -> _Plan:
    planned: list[_Planned] = []
    not_run: dict[str, str] = {}
    for item in suite.tasks if suite else ():
        folder = _data_folder(item.task, data_dir)
        source = standard_source(item.task, folder)
        if source is None:
            not_run[item.task] = missing_reason(item.task, folder)
        else:
            shots = item.num_fewshot if num_fewshot is None else num_fewshot
            planned.append(_Planned(source=source, num_fewshot=shots, metric=item.metric))
    for name in tasks:
        source = _named_source(name, data_dir)
        metric = task_metrics(source.config)[0]
        planned.append(_Planned(source=source, num_fewshot=num_fewshot, metric=metric))
    names = [item.source.config.name for item in planned]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"task '{twice}': asked for twice; give one of them another name")
    if not planned:
        raise ConfigError(f"data_dir: {data_dir} holds the files of none of the suite's tasks")
    return _Plan(tasks=tuple(planned), not_run=not_run)


def _named_source(name: str, data_dir: Path | None) -> TaskSource:
    if is_task_path(name):
        return task_source(Path(name))
    folder = _data_folder(name, data_dir)
    source = standard_source(name, folder)
    if source is None:
        raise ConfigError(f"task '{name}': {missing_reason(name, folder)}")
    return source


def _data_folder(task: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        # An unknown name is the likelier mistake.
        standard_source(task, Path())
        raise ConfigError(f"task '{task}': give the folder with its files (data_dir)")
    if not data_dir.is_dir():
        raise ConfigError(f"data_dir: {data_dir}: no such folder")
    return data_dir


def _score(task: Task, opened: Opened, seconds: dict[str, float]) -> list[Item]:
    """The items of a task; the time it took is noted in ``seconds``."""
    started = time.monotonic()
    classifies = isinstance(opened, TextClassifier)
    total = len(task.examples) if classifies else num_requests(task.examples)
    with ProgressLine(task.name, total=total, unit="requests") as line:
        if isinstance(opened, TextClassifier):
            items = score_labels(task, opened, on_progress=line.update)
        else:
            items = score_task(task, opened.language_model, on_progress=line.update)
    seconds[task.name] = round(time.monotonic() - started, 3)
    return items


def _model_record(model: Path, opened: Opened, precision: str) -> dict[str, Any]:
    asked = opened if isinstance(opened, TextClassifier) else opened.language_model
    saved = opened.saved if isinstance(opened, TextClassifier) else opened
    return {
        "path": str(model),
        "weights_hash": saved.weights_hash,
        "num_parameters": asked.model.num_parameters(),
        "max_length": asked.max_length,
        "precision": precision,
        "device": str(asked.device),
    }


def _task_record(
    task: Task, metric: str, items: Sequence[Item], seed: int, how: Resampling
) -> dict[str, Any]:
    source = task.source
    shots = None if source.has_own_shots or not task.num_fewshot else source.fewshot_data
    record = {
        "kind": source.config.model_dump()["kind"],
        "num_fewshot": task.num_fewshot,
        "data": {"path": str(source.data), "hash": hash_file(source.data)},
        "fewshot_data": None if shots is None else {"path": str(shots), "hash": hash_file(shots)},
        "num_rows": task.num_rows,
        "num_items": len(items),
        "num_truncated": sum(item.is_truncated for item in items),
        "metric": metric,
    }
    others = [name for name in task_metrics(source.config) if name != metric]
    scores = {
        name: {**_bounds(metric_interval(name, items, how)), "better": METRICS[name].better}
        for name in [metric, *others]
    }
    return {**record, "task_hash": _task_hash(task, items, seed), "scores": scores}


def _task_hash(task: Task, items: Sequence[Item], seed: int) -> str:
    """Equal for two models that were asked exactly the same."""
    source = task.source
    asked = {
        "config": source.config.model_dump(mode="json", exclude={"data", "fewshot_data"}),
        "data": hash_file(source.data),
        "fewshot_data": None
        if source.has_own_shots or not task.num_fewshot
        else hash_file(_present(source.fewshot_data)),
        "num_fewshot": task.num_fewshot,
        "seed": seed if task.num_fewshot else None,
        "lines": [item.line for item in items],
    }
    return hash_json(asked)


def _present(path: Path | None) -> Path:
    assert path is not None
    return path


def _averages(
    suite: Suite, metrics: Mapping[str, str], items: Mapping[str, Sequence[Item]], how: Resampling
) -> dict[str, dict[str, Any]]:
    averages = {}
    for name, wanted in suite.averages.items():
        run = [task for task in wanted if task in items]
        if run:
            interval = mean_over_tasks([(metrics[task], items[task]) for task in run], how)
            missing = [task for task in wanted if task not in items]
            averages[name] = {**_bounds(interval), "tasks": run, "missing": missing}
    return averages


def _bounds(interval: Interval) -> dict[str, float | None]:
    """A score as it is saved; an end that is not finite becomes None."""
    ends = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in ends.items()}
