"""Does the loss after a short lag foretell which growth operator ends best, and what does it save?

    python benchmarks/growth.py --corpus runs/corpus --out runs/growth --json growth.json
    python benchmarks/growth.py … --workers 32 --minutes 9      # several runs a GPU, for so long

A small model (4 layers) grows to twice its depth by every operator of a pool, each trained to the
full budget on the same batches: a race without losers, so that what a lag would have chosen can be
held against what was best. Beside it the large model from scratch, at a swept learning rate, at the
same total FLOPs and at more. Three objectives: causal language modelling, masked language modelling
and UL2.

The queue goes on where it stopped: a run whose figures are in the file is not run again, and one
that was interrupted goes on from its checkpoint in ``--out``. ``benchmarks/results.py`` makes the
tables.

The corpus is a folder of ``samara prepare``.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pool import add_pool_options, collect, open_pool
from record import Record, add_json_option

from samara.config import validate
from samara.growth.config import GrowConfig
from samara.growth.operator_config import OperatorConfig
from samara.measure.budget import budget
from samara.model.config import ModelConfig
from samara.runs import read_json, write_json

UNITS = 64
"""Groups of validation rows that losses are kept by."""

OPERATORS: dict[str, dict[str, Any]] = {
    "stack": {"depth": {"kind": "stack"}},
    "interpose": {"depth": {"kind": "interpose"}},
    "stack, zeroed": {"depth": {"kind": "stack"}, "new_layers": "zero"},
    "LLaMA-Pro": {"depth": {"kind": "llama_pro"}},
    "random on top": {"depth": {"kind": "random_top"}},
    "random between, zeroed": {"depth": {"kind": "random_interleaved"}, "new_layers": "zero"},
    "averaged neighbours": {"depth": {"kind": "average"}},
    "last layer, four times": {"depth": {"kind": "map", "layers": [0, 1, 2, 3, 3, 3, 3, 3]}},
    "middle layer, four times": {"depth": {"kind": "map", "layers": [0, 1, 1, 1, 1, 1, 2, 3]}},
    "stack, moments reset": {"depth": {"kind": "stack"}, "moments": "reset"},
}
FEW = ("stack", "interpose", "LLaMA-Pro", "random on top", "averaged neighbours")
"""The pool of the objectives that are only checked."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of one benchmark.

    Attributes:
        model: The design but for its depth.
        source_steps: Steps of the small model before growth.
        steps: Steps after growth.
        batch_size: Rows a step.
        sequence_length: Tokens a row.
        rungs: Steps after growth at which losses are measured, besides 0 and the last.
        seeds: By objective.
        lrs: Learning rates that the scratch run is tried at; the source and the grown models take
            the middle one.
        more: Budgets of the scratch runs at the best rate, as multiples of the grown model's FLOPs.
        evaluation_tokens: Of the validation set.
    """

    model: dict[str, Any]
    source_steps: int
    steps: int
    batch_size: int
    sequence_length: int
    rungs: tuple[int, ...]
    seeds: dict[str, tuple[int, ...]]
    lrs: tuple[float, ...]
    more: tuple[float, ...]
    evaluation_tokens: int


SCALES = {
    "8m": Scale(
        model={"hidden_size": 256, "head_dim": 32, "gqa_group_size": 2, "ffn_dim": 704},
        source_steps=800,
        steps=800,
        batch_size=32,
        sequence_length=256,
        rungs=(12, 25, 50, 100, 200, 400),
        seeds={"causal_lm": (1, 2, 3), "masked_lm": (1, 2), "ul2": (1, 2)},
        lrs=(1.5e-3, 3e-3, 6e-3),
        more=(1.0, 1.4),
        evaluation_tokens=131_072,
    ),
    "toy": Scale(
        model={"hidden_size": 32, "head_dim": 16, "gqa_group_size": 1, "ffn_dim": 48},
        source_steps=4,
        steps=8,
        batch_size=2,
        sequence_length=32,
        rungs=(2, 4),
        seeds={"causal_lm": (1,), "masked_lm": (1,), "ul2": (1,)},
        lrs=(1e-3, 3e-3),
        more=(1.0, 1.5),
        evaluation_tokens=4_096,
    ),
}
LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run of the queue.

    Attributes:
        kind: ``source``, ``grown`` or ``scratch``.
        objective: What it learns to predict.
        seed: Of the data order, fresh weights, and what growth draws.
        operator: Of a grown model, a key of :data:`OPERATORS`.
        lr: Learning rate.
        budget: Of a scratch run: its FLOPs as a multiple of source and grown model together.
    """

    kind: str
    objective: str
    seed: int
    lr: float
    operator: str = ""
    budget: float = 1.0

    @property
    def name(self) -> str:
        """A folder's name."""
        parts = [self.kind, self.objective, str(self.seed)]
        if self.kind == "grown":
            parts.append("".join(c if c.isalnum() else "-" for c in self.operator))
        if self.kind == "scratch":
            parts += [f"lr{self.lr:g}", f"x{self.budget:g}"]
        return "_".join(parts)


def design(scale: Scale, layers: int) -> dict[str, Any]:
    """A model of so many layers."""
    return {**scale.model, "num_hidden_layers": layers, "max_position_embeddings": 1024}


def training_settings(scale: Scale, task: Task, corpus: Path, *, steps: int) -> dict[str, Any]:
    """What source, grown and scratch runs have in common."""
    return {
        "seed": task.seed,
        "data": {"corpus": str(corpus), "sequence_length": scale.sequence_length},
        "objective": {"kind": task.objective},
        "optimizer": {"kind": "adamw", "lr": task.lr},
        "schedule": {
            "kind": "wsd",
            "warmup_steps": min(20, steps // 2),
            # The source is cut off where its rate is still high, as one does before growing.
            "decay_fraction": 0.0 if task.kind == "source" else 0.2,
        },
        "training": {
            "max_steps": steps,
            "batch_size": scale.batch_size,
            "precision": "bfloat16",
            "evaluate_max_tokens": scale.evaluation_tokens,
        },
        "checkpoint": {"keep_last": 1},
        "logging": {"every_steps": 100},
    }


def flops_per_step(scale: Scale, layers: int, vocab_size: int) -> float:
    """Training FLOPs."""
    one = budget(ModelConfig.model_validate(design(scale, layers)).expand(vocab_size=vocab_size))
    tokens = scale.batch_size * scale.sequence_length
    return one.flops_per_token(scale.sequence_length).training * tokens


def scratch_steps(scale: Scale, vocab_size: int) -> float:
    """Steps of the large model that cost what the small one and the grown one cost together."""
    small, large = (flops_per_step(scale, n, vocab_size) for n in (LAYERS, 2 * LAYERS))
    return scale.steps + scale.source_steps * small / large


# --- one run, in a process of its own -------------------------------------------------------------


def carry_out(scale: Scale, task: Task, corpus: Path, out: Path) -> dict[str, Any]:
    """Do one run; its figures."""
    start = time.perf_counter()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        found = _grown(scale, task, corpus, out) if task.kind == "grown" else None
        found = found or _pretrained(scale, task, corpus, out)
    return {"name": task.name, **asdict(task), **found, "wall": time.perf_counter() - start}


def _pretrained(scale: Scale, task: Task, corpus: Path, out: Path) -> dict[str, Any]:
    from samara.data.prepare import PreparedCorpus
    from samara.lifecycle import run_recipe
    from samara.recipe import parse_recipe

    layers, steps = LAYERS, scale.source_steps
    if task.kind == "scratch":
        vocab_size = PreparedCorpus.open(corpus).vocab_size
        layers, steps = 2 * LAYERS, round(task.budget * scratch_steps(scale, vocab_size))
    settings = training_settings(scale, task, corpus, steps=steps)
    recipe = {
        "schema": 1,
        "name": task.name,
        "pretrain": {**settings, "model": design(scale, layers)},
    }
    run_recipe(parse_recipe(recipe), out / task.name, say=lambda _: None)
    summary = read_json(out / task.name / "summary.json")
    keys = ("parameters", "steps", "tokens", "flops", "seconds", "tokens_per_second")
    return {"loss": summary["validation_loss"], **{key: summary[key] for key in keys}}


def _grown(scale: Scale, task: Task, corpus: Path, out: Path) -> dict[str, Any]:
    from samara.data.prepare import open_corpus
    from samara.growth.source import open_source
    from samara.growth.stages import plan_stages
    from samara.growth.trial import EXACTNESS, Trial, TrialJob
    from samara.runs import RunFolder
    from samara.train.checkpoint import TrainingState
    from samara.train.pretrain import cache_folder, open_tokenizer, training_place

    operator = OperatorConfig.model_validate(OPERATORS[task.operator])
    source_task = Task(kind="source", objective=task.objective, seed=task.seed, lr=task.lr)
    config = validate(
        GrowConfig,
        {
            **training_settings(scale, task, corpus, steps=scale.steps),
            "source": str(out / source_task.name),
            "model": design(scale, 2 * LAYERS),
            "candidates": [operator.model_dump(mode="json")],
        },
    )
    run = RunFolder(out / task.name)
    run.path.mkdir(parents=True, exist_ok=True)
    prepared = open_corpus(config.data.corpus, cache=cache_folder())
    tokenizer = open_tokenizer(config.pretraining(config.model), prepared, run)
    source = open_source(config, prepared, tokenizer)
    (stage,) = plan_stages(config, source.design)
    trial = Trial(
        config=config,
        source=source,
        stage=stage,
        before=None,
        history=(),
        operator=operator,
        folder=run.path,
    )
    job = TrialJob(trial, run, place=training_place(config.training))
    measured = {}
    for step in (0, *scale.rungs, scale.steps):
        path = trial.rung_path(step)
        if not path.exists():
            if job.state.step < step:
                job.train(until=step)
            one = job.measure(start=TrainingState(), with_indicators=False)
            path.parent.mkdir(exist_ok=True)
            write_json(path, _in_units(one.losses))
        measured[str(step)] = read_json(path)
    return {
        "exactness": EXACTNESS[one.exactness],
        "loss": mean_loss(measured[str(scale.steps)]),
        "num_targets": measured["0"]["num_targets"],
        "rungs": {step: units["nll_sum"] for step, units in measured.items()},
        "flops_per_step": one.flops_per_step,
        "flops": source.inherited.flops + one.training_flops,
        "seconds": one.seconds,
    }


def _in_units(losses: Any) -> dict[str, str]:
    """Losses by group of rows: enough to pair candidates by, and short enough to keep."""
    import numpy as np

    units = min(UNITS, len(losses.nll_sum))
    return {
        name: " ".join(f"{g.sum():.8g}" for g in np.array_split(getattr(losses, name), units))
        for name in ("nll_sum", "num_targets")
    }


def numbers(text: str) -> list[float]:
    """What :func:`_in_units` wrote."""
    return [float(word) for word in text.split()]


def mean_loss(units: Mapping[str, str]) -> float:
    """Nats per target."""
    return math.fsum(numbers(units["nll_sum"])) / math.fsum(numbers(units["num_targets"]))


# --- the queue ------------------------------------------------------------------------------------


def first_tasks(scale: Scale) -> list[Task]:
    """What can begin at once: the sources, and the sweep of the scratch run's learning rate."""
    lr = middle(scale)
    seeds = [(o, seed) for o, seeds in scale.seeds.items() for seed in seeds]
    sources = [Task(kind="source", objective=o, seed=seed, lr=lr) for o, seed in seeds]
    sweep = [
        Task(kind="scratch", objective="causal_lm", seed=scale.seeds["causal_lm"][0], lr=lr)
        for lr in scale.lrs
    ]
    return [*sorted(sources, key=lambda task: task.seed), *sweep]


def tasks_behind(done: Task) -> list[Task]:
    """What a finished source lets begin."""
    if done.kind != "source":
        return []
    pool = OPERATORS if done.objective == "causal_lm" else FEW
    return [
        Task(kind="grown", objective=done.objective, seed=done.seed, lr=done.lr, operator=operator)
        for operator in pool
    ]


def tasks_at_best_rate(scale: Scale, rows: Sequence[dict[str, Any]]) -> list[Task]:
    """The scratch runs to compare with, once the sweep is in."""
    sweep = [row for row in rows if row["kind"] == "scratch" and row["budget"] == 1.0]
    first = scale.seeds["causal_lm"][0]
    sweep = [row for row in sweep if row["seed"] == first]
    if len(sweep) < len(scale.lrs):
        return []
    best = min(sweep, key=lambda row: row["loss"])["lr"]
    return [
        Task(kind="scratch", objective="causal_lm", seed=seed, lr=best, budget=more)
        for more in scale.more
        for seed in scale.seeds["causal_lm"]
    ]


def whole_queue(scale: Scale, rows: Sequence[dict[str, Any]]) -> list[Task]:
    """Every run there is; those at the best rate only once the sweep is among ``rows``."""
    first = first_tasks(scale)
    grown = [task for source in first for task in tasks_behind(source)]
    # The best rate at equal FLOPs is one of the sweep.
    return list(dict.fromkeys([*first, *grown, *tasks_at_best_rate(scale, rows)]))


def middle(scale: Scale) -> float:
    """The learning rate of sources and grown models."""
    return scale.lrs[len(scale.lrs) // 2]


def work_off(scale: Scale, options: argparse.Namespace, record: Record) -> bool:
    """Run what has not been run; whether all of it was."""
    corpus, out = options.corpus.resolve(), options.out.resolve()
    known = {row["name"] for row in record.rows}
    seen: set[str] = set()
    running: dict[Future[dict[str, Any]], Task] = {}
    with open_pool(options) as pool:

        def submit(tasks: Sequence[Task]) -> None:
            for task in tasks:
                if task.name not in seen:
                    seen.add(task.name)
                    if task.name not in known or not (out / task.name).exists():
                        running[pool.submit(carry_out, scale, task, corpus, out)] = task
                    else:
                        submit(tasks_behind(task))

        def done(task: Task, row: dict[str, Any]) -> None:
            if task.name not in known:
                record.add(row)
                print(f"{task.name:50} loss {row['loss']:.4f}  {row['wall']:5.0f} s", flush=True)
            submit(tasks_behind(task))
            submit(tasks_at_best_rate(scale, record.rows))

        submit(first_tasks(scale))
        submit(tasks_at_best_rate(scale, record.rows))
        return collect(pool, running, minutes=options.minutes, done=done)


def main(arguments: Sequence[str]) -> None:
    """Work the queue off, or as much of it as there is time for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of samara prepare")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"), help="run folders")
    parser.add_argument("--scale", choices=SCALES, default="8m")
    add_pool_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device="cuda" if options.gpus else "cpu",
        settings={"scale": options.scale, "sizes": asdict(SCALES[options.scale])},
    )
    if options.json is not None and options.json.exists():
        record.rows.extend(read_json(options.json)["rows"])
    if work_off(SCALES[options.scale], options, record):
        record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
