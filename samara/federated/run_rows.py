"""The rows of a run as they are read: all of them, or those of a server or a client alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from samara.adapt.config import LabelsConfig
from samara.adapt.data import TaskRows, find_labels, read_task_rows, with_labels
from samara.federated.config import FederateConfig
from samara.measure.task_rows import Row, read_task
from samara.runs import hash_file


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Rows to work with.

    Attributes:
        rows: To train on and to validate with; a server of a deployment has none of the former, a
            client none of the latter.
        test: Scored at the end; a client's machine has none.
        labels: Of a task that has any, in the order of the head's outputs.
    """

    rows: TaskRows
    test: Sequence[Row]
    labels: tuple[str, ...] | None


def read_run_rows(config: FederateConfig) -> RunRows:
    """Read the rows of a run on one machine, or those that the server of a deployment has.

    Raises:
        ConfigError: If the labels do not do for a classification.
        DataError: If a file is missing or malformed, or there are too few rows.
    """
    if config.engine == "superlink":
        assert config.data.validation is not None, "checked with the settings"
        path = Path(config.data.validation).expanduser()
        held_out = tuple(read_task(path, config.task))
        rows = TaskRows(train=(), validation=held_out, hash=hash_file(path))
    else:
        rows = read_task_rows(config)
    return _with_labels(config, rows, read_task(Path(config.task.data).expanduser(), config.task))


def read_own_rows(config: FederateConfig) -> RunRows:
    """Read the rows of one client, all that its machine has.

    Raises:
        DataError: If the file is missing or malformed.
    """
    path = Path(config.data.train).expanduser()
    own = tuple(read_task(path, config.task))
    rows = TaskRows(train=own, validation=(), hash=hash_file(path))
    return _with_labels(config, rows, ())


def _with_labels(config: FederateConfig, rows: TaskRows, test: Sequence[Row]) -> RunRows:
    task = config.task
    if not isinstance(task, LabelsConfig):
        return RunRows(rows=rows, test=test, labels=None)
    labels = find_labels(task, [*rows.train, *rows.validation])

    def kept(own: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(with_labels(own, task, labels)) if own else ()

    rows = replace(rows, train=kept(rows.train), validation=kept(rows.validation))
    return RunRows(rows=rows, test=kept(test), labels=labels)
