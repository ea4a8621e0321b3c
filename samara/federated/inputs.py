"""Rows from wherever they are: files as they are, prepared corpora, datasets.

A recipe names its rows by one text each. A file is used as it is. The folder of a ``samara
prepare`` stands for the documents of its splits. Anything else is a dataset of ``datasets``: its
split is written into the run folder once, as JSON Lines, so that a run that goes on sees the same
rows without the network.

    inputs/train.jsonl  inputs/train.source.json      which dataset it was made from
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from samara.data.config import HubDataset
from samara.data.hub import iterate_rows, open_dataset
from samara.data.prepare import CORPUS_FILE
from samara.errors import DataError
from samara.federated.config import FederateConfig
from samara.measure.task_rows import SUFFIXES
from samara.runs import RunFolder, read_json, write_bytes, write_json

Split = Literal["train", "validation", "test"]


def with_files(config: FederateConfig, run: RunFolder) -> FederateConfig:
    """The recipe with a file in each place that names rows.

    Raises:
        DataError: If a dataset cannot be read, or holds what is no JSON.
    """
    data = {"train": _file(config, run, config.data.train, "train")}
    if config.data.validation is not None:
        data["validation"] = _file(config, run, config.data.validation, "validation")
    test = _file(config, run, config.task.data, "test")
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "task": config.task.model_copy(update={"data": test}),
        }
    )


def _file(config: FederateConfig, run: RunFolder, name: str, split: Split) -> str:
    path = Path(name).expanduser()
    if path.is_file() or Path(path.name.removesuffix(".gz")).suffix in SUFFIXES:
        return name
    if (path / CORPUS_FILE).is_file():
        return str(path / "documents" / f"{split}.jsonl")
    options = config.data.dataset
    key = "task.data" if split == "test" else f"data.{split}"
    wanted = HubDataset(
        name=name,
        config=options.config,
        revision=options.revision,
        split={
            "train": options.train_split,
            "validation": options.validation_split,
            "test": options.test_split,
        }[split],
    )
    return str(_written(wanted, run.path / "inputs" / f"{split}.jsonl", key))


def _written(wanted: HubDataset, path: Path, key: str) -> Path:
    """The file of a dataset's rows; written unless it is there already."""
    note, source = path.with_suffix(".source.json"), wanted.model_dump(mode="json")
    if path.exists() and note.exists() and read_json(note) == source:
        return path
    dataset = open_dataset(wanted, key=key)
    names = _label_names(dataset)
    lines = []
    for number, row in enumerate(iterate_rows(dataset, wanted, key=key), start=1):
        try:
            lines.append(json.dumps(_plain(row, names), default=_text, ensure_ascii=False) + "\n")
        except TypeError as error:
            raise DataError(
                f"{key}: row {number} of dataset '{wanted.name}' holds what is no text, number or "
                f"list: {error}; give a dataset without it, or a file of rows"
            ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, "".join(lines).encode())
    write_json(note, source)  # last: where it is, the rows are whole
    return path


def _label_names(dataset: Any) -> dict[str, list[str]]:
    """Of each field that holds labels as numbers, their names."""
    features = dataset.features or {}
    return {field: kind.names for field, kind in features.items() if hasattr(kind, "int2str")}


def _plain(row: Mapping[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    plain = dict(row)
    for field, own in names.items():
        if isinstance(plain[field], int) and plain[field] >= 0:  # -1: without a label
            plain[field] = own[plain[field]]
    return plain


def _text(value: object) -> str:
    """Dates as texts; nothing else that JSON does not know."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise TypeError(type(value).__name__)
