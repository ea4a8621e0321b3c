"""k-fold cross-validation: every row is scored by a model that did not see it.

For small data, where one test file says little. Each fold is a fine-tuning run of its own in
``folds/NUMBER``, with the rows it trains on and the rows it is scored on as files; a fold that is
finished is not run again. Equal rows fall into one fold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samara.adapt.config import FinetuneConfig
from samara.adapt.results import RESULTS, read_items, scores
from samara.errors import DataError
from samara.measure.task_rows import Row, read_rows
from samara.runs import RunFolder, hash_json, read_json, write_text

Verb = Callable[[FinetuneConfig, RunFolder], None]


def fold_of_rows(rows: Sequence[Row], folds: int) -> list[int]:
    """The fold of each row: rows in the order of their contents' hashes are dealt out in turn."""
    hashes = [hash_json(dict(row.fields)) for row in rows]
    place = {content: rank for rank, content in enumerate(sorted(set(hashes)))}
    return [place[content] % folds for content in hashes]


def cross_validate(config: FinetuneConfig, run: RunFolder, verb: Verb) -> dict[str, Any]:
    """Run all folds.

    Args:
        config: Of the whole run; ``folds`` says how many.
        run: Its folder.
        verb: Runs one fold.

    Returns:
        Scores over the pooled rows with intervals, and those of each fold, as plain data.

    Raises:
        DataError: If there are fewer different rows than folds.
        And what the verb raises.
    """
    assert config.folds is not None
    path = Path(config.data.train).expanduser()
    rows = read_rows(path)
    places = fold_of_rows(rows, config.folds)
    if len(set(places)) < config.folds:
        raise DataError(
            f"folds: {path} holds {len(set(places))} different rows, fewer than {config.folds} "
            "folds; take fewer folds"
        )
    pooled, by_fold = [], []
    for fold in range(config.folds):
        part = RunFolder(run.path / "folds" / str(fold))
        if not (part.path / RESULTS).exists():
            part.path.mkdir(parents=True, exist_ok=True)
            verb(_fold_config(config, part, rows, places, fold), part)
        pooled += read_items(part.path)
        by_fold.append(read_json(part.path / RESULTS)["scores"])
    return {
        "folds": config.folds,
        "num_items": len(pooled),
        "scores": scores(config, pooled),
        "scores_by_fold": [
            {name: score["value"] for name, score in own.items()} for own in by_fold
        ],
    }


def _fold_config(
    config: FinetuneConfig, part: RunFolder, rows: Sequence[Row], places: Sequence[int], fold: int
) -> FinetuneConfig:
    """The settings of one fold, with its rows written into its folder."""
    for name, is_held_out in (("train", False), ("scored", True)):
        own = [row for row, p in zip(rows, places, strict=True) if (p == fold) == is_held_out]
        lines = [json.dumps(dict(row.fields), ensure_ascii=False) + "\n" for row in own]
        write_text(part.path / f"{name}.jsonl", "".join(lines))
    data = config.data.model_copy(update={"train": str(part.path / "train.jsonl")})
    task = config.task.model_copy(update={"data": str(part.path / "scored.jsonl")})
    return config.model_copy(update={"data": data, "task": task, "folds": None})
