r"""Which score to choose weights by: every preset at an equal number of weights, on one task.

    python benchmarks/sparse_scores.py --base MODEL --train train.jsonl --test test.jsonl \
        --text '{text}' --label label --out runs/scores --json sparse_scores-task.json
    python benchmarks/sparse_scores.py … --workers 8 --gpus 1 --minutes 9      # for so long

The task is classification by a head of its own. All scores get the same targets, shape, budget,
rows in the same order, and a sweep of the same learning rates at the first seed, judged by the loss
on held-out training rows; the best one is run at the other seeds. ``random`` is the baseline:
accuracy on the test rows is compared with its, row by row, with an interval over rows and seeds.

The queue goes on where it stopped: a run whose figures are in the file and whose items are in
``--out`` is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pool import add_pool_options, collect, open_pool
from record import Record, add_json_option

from samara.adapt.config import FinetuneConfig
from samara.adapt.results import ITEMS, read_items
from samara.errors import SamaraError
from samara.lifecycle import run_recipe
from samara.measure.seeds import pooled_difference, score_over_seeds, score_table
from samara.measure.task_metrics import Resampling
from samara.recipe import parse_recipe
from samara.runs import read_json

BASELINE = "random"
SCORES = (
    "grad_fisher",
    "grad",
    "fisher",
    "snip",
    "gallop",
    "newton",
    "magnitude",
    "lift",
    BASELINE,
)
HOW = Resampling(confidence=0.95, seed=0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run."""

    score: str
    density: float
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """A row's name and its run's folder."""
        return f"{self.score}_{self.density:g}_lr{self.lr:g}_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs share; goes to the workers.

    Attributes:
        finetune: Settings of the verb without score, density, rate and seed.
        out: Where the run folders go.
        scores: What is compared.
        densities: Budgets.
        lrs: The sweep.
        seeds: Of data order, selection and head.
    """

    finetune: dict[str, Any]
    out: Path
    scores: tuple[str, ...]
    densities: tuple[float, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    def recipe(self, case: Case) -> dict[str, Any]:
        """The whole recipe of a run."""
        selection = {**self.finetune["method"]["selection"], "score": case.score}
        method = {
            "kind": "sparse",
            "selection": {**selection, "density": case.density},
            "optimizer": {"lr": case.lr},
        }
        settings = {**self.finetune, "seed": case.seed, "method": method}
        return {"schema": 1, "name": case.name, "finetune": settings}


def carry_out(setting: Setting, case: Case) -> dict[str, Any]:
    """Fine-tune and score; the figures of a run."""
    start, folder = time.perf_counter(), setting.out / case.name
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        run_recipe(parse_recipe(setting.recipe(case)), folder, say=lambda _: None)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    results = read_json(folder / "results.json")
    return {
        "name": case.name,
        "kind": "run",
        **asdict(case),
        "accuracy": results["scores"]["accuracy"]["value"],
        "validation_loss": results["validation_loss"],
        "trained": results["trained_parameters"],
        "selection_seconds": results["seconds"]["selection"],
        "wall": time.perf_counter() - start,
    }


# --- the queue ------------------------------------------------------------------------------------


def best_rates(setting: Setting, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float], float]:
    """(score, density) -> the learning rate with the least held-out loss, where the sweep is in."""
    found = {}
    for score in setting.scores:
        for density in setting.densities:
            sweep = [
                row
                for row in rows
                if (row["score"], row["density"]) == (score, density)
                and row["seed"] == setting.seeds[0]
                and row["lr"] in setting.lrs
            ]
            if len(sweep) == len(setting.lrs):
                best = min(sweep, key=lambda row: float(row["validation_loss"]))
                found[score, density] = float(best["lr"])
    return found


def cases_due(setting: Setting, rows: Sequence[dict[str, Any]]) -> Iterator[Case]:
    """The sweeps, and the other seeds of those that are in."""
    best = best_rates(setting, rows)
    for density in setting.densities:
        for score in setting.scores:
            for lr in setting.lrs:
                yield Case(score=score, density=density, lr=lr, seed=setting.seeds[0])
            if (score, density) in best:
                for seed in setting.seeds[1:]:
                    yield Case(score=score, density=density, lr=best[score, density], seed=seed)


def work_off(setting: Setting, options: argparse.Namespace, record: Record) -> bool:
    """Do what has not been done; whether all of it was."""
    seen: set[str] = set()
    running: dict[Future[dict[str, Any]], Case] = {}
    with open_pool(options) as pool:

        def submit() -> None:
            known = {row["name"] for row in record.rows}
            for case in cases_due(setting, record.rows):
                is_done = case.name in known and (setting.out / case.name / ITEMS).exists()
                if case.name not in seen and not is_done:
                    seen.add(case.name)
                    running[pool.submit(carry_out, setting, case)] = case

        def done(case: Case, row: dict[str, Any]) -> None:
            record.rows[:] = [own for own in record.rows if own["name"] != case.name]
            record.add(row)
            found = f"loss {row['validation_loss']:.4f}  accuracy {row['accuracy']:.3f}"
            print(f"{case.name:40} {found}  {row['wall']:6.0f} s", flush=True)
            submit()

        submit()
        return collect(pool, running, minutes=options.minutes, done=done)


def summaries(setting: Setting, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each score and density that ran at all seeds."""
    best, whole = best_rates(setting, rows), {}
    for (score, density), lr in best.items():
        names = {
            Case(score=score, density=density, lr=lr, seed=seed).name for seed in setting.seeds
        }
        own = sorted((row for row in rows if row["name"] in names), key=lambda row: row["seed"])
        if len(own) == len(setting.seeds):
            whole[score, density] = own
    runs = {key: [read_items(setting.out / r["name"]) for r in own] for key, own in whole.items()}
    for (score, density), own in whole.items():
        against = None
        if score != BASELINE and (BASELINE, density) in whole:
            tables = (score_table("accuracy", runs[key, density]) for key in (score, BASELINE))
            model, baseline = tables
            against = asdict(pooled_difference([model], [baseline], HOW))
        lr = best[score, density]
        yield {
            "name": f"summary {score} {density:g}",
            "kind": "summary",
            "score": score,
            "density": density,
            "lr": lr,
            "is_at_edge": lr in (min(setting.lrs), max(setting.lrs)),
            "trained": own[0]["trained"],
            "validation_losses": [row["validation_loss"] for row in own],
            "accuracy": asdict(score_over_seeds("accuracy", runs[score, density], HOW)),
            "against_random": against,
            "selection_seconds": max(row["selection_seconds"] for row in own),
        }


# --- the command ----------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace) -> Setting:
    """The settings of all runs, checked.

    Raises:
        SamaraError: If the verb refuses them.
    """
    setting = Setting(
        finetune={
            "init_from": str(options.base.resolve()),
            "task": {
                "kind": "labels",
                "name": "scores",
                "data": str(options.test.resolve()),
                "text": options.text,
                "label": options.label,
                "other_labels": "leave_out",
            },
            "data": {
                "train": str(options.train.resolve()),
                "max_rows": options.max_rows,
                "sequence_length": options.length,
            },
            "method": {
                "selection": {"num_samples": options.samples, "granularity": options.granularity}
            },
            "training": {
                "device": "cuda" if options.gpus else "cpu",
                "max_steps": options.steps,
                "batch_size": options.batch,
                "precision": "bfloat16" if options.gpus else "float32",
            },
            "checkpoint": {"every_steps": max(1, options.steps // 2), "keep_last": 1},
            "score_base": False,
        },
        out=options.out.resolve(),
        scores=tuple(dict.fromkeys([*options.scores, BASELINE])),
        densities=tuple(options.density),
        lrs=tuple(options.lr),
        seeds=tuple(range(1, options.seeds + 1)),
    )
    for case in cases_due(setting, []):
        config = parse_recipe(setting.recipe(case)).stages[0].config({})
        assert isinstance(config, FinetuneConfig)
    return setting


def main(arguments: Sequence[str]) -> None:
    """Work the queue off, or as much of it as there is time for, and sum up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="a model folder or its run")
    parser.add_argument("--train", type=Path, required=True, help="rows to train on, .jsonl")
    parser.add_argument("--test", type=Path, required=True, help="rows that are scored")
    parser.add_argument("--text", default="{text}", help="what the model reads of a row")
    parser.add_argument("--label", default="label", help="the field with the label")
    parser.add_argument("--max-rows", type=int, help="of the training rows; left out: all")
    parser.add_argument("--length", type=int, default=128, help="most tokens of a row")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=SCORES)
    parser.add_argument("--density", type=float, nargs="+", default=[0.0005, 0.005])
    parser.add_argument("--granularity", default="element")
    parser.add_argument("--samples", type=int, default=256, help="that the scores see")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/scores"), help="run folders")
    add_pool_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    try:
        setting = settings_of(options)
    except SamaraError as error:
        sys.exit(str(error))
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device="cuda" if options.gpus else "cpu",
        settings={**asdict(setting), "out": str(setting.out)},
    )
    if options.json is not None and options.json.exists():
        rows = read_json(options.json)["rows"]
        record.rows.extend(row for row in rows if row["kind"] == "run")
    is_complete = work_off(setting, options, record)
    for row in list(summaries(setting, list(record.rows))):
        record.add(row)
    if is_complete:
        record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
