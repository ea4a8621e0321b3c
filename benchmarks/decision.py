r"""Which method to adapt a model with: every method on every task, beside full fine-tuning.

    python benchmarks/decision.py --base MODEL --task classify.yaml --task summarize.yaml \
        --task answer.yaml --text held-out.jsonl --out runs/decision --json decision.json
    python benchmarks/decision.py … --workers 8 --gpus 1 --minutes 9     # for so long

A task is a recipe of ``samara finetune``; base model, method, learning rate and seed are set here,
everything else is the recipe's, the same for every method. Each method gets a sweep of as many
learning rates, at the first seed, judged by the validation loss; the best one is run at the other
seeds. Runs at the best rate are audited: forgetting on ``--text`` (text the base knows), and at the
first seed bias, stability and the time that switching to the version takes.

The queue goes on where it stopped: a run whose figures are in the file and whose items are in
``--out`` is not run again, an interrupted one goes on from its checkpoint. The sums at the end are
made anew each time, so that other ``--prices`` cost no training. ``benchmarks/results.py`` makes
the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from decision_sums import SUMS, sums
from pool import add_pool_options, open_pool, stop_pool
from record import Record, add_json_option

from samara.adapt.config import FinetuneConfig
from samara.config import merge
from samara.errors import SamaraError
from samara.measure.ownership import load_prices
from samara.recipe import load_recipe, parse_recipe
from samara.runs import read_json

PRICES = Path(__file__).parent / "prices.yaml"
ITEMS = "task_items.jsonl"
KINDS = ("labels", "classification", "multiple_choice", "question", "summarization")


def sparse(**selection: Any) -> dict[str, Any]:
    """Sparse training with a selection."""
    return {"kind": "sparse", "selection": selection}


ARMS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "sparse": sparse(),
    "sparse, grad": sparse(score="grad"),
    "sparse, fisher": sparse(score="fisher"),
    "sparse, snip": sparse(score="snip"),
    "sparse, gallop": sparse(score="gallop"),
    "sparse, newton": sparse(score="newton", num_samples=256),
    "sparse, magnitude": sparse(score="magnitude"),
    "sparse, lift": sparse(score="lift"),
    "sparse, random": sparse(score="random"),
    "sparse, 4x4 blocks": sparse(granularity="block4"),
    "sparse, columns": sparse(granularity="column"),
    "sparse, two-level": sparse(granularity="two_level"),
    "sparse, as many as LoRA": sparse(),
    "lora": {"kind": "lora"},
    "dora": {"kind": "dora"},
    "shira": {"kind": "shira"},
}
"""Methods by name. Adapters get the scale's rank, ``as many as LoRA`` its number of weights."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of one benchmark.

    Attributes:
        arms: Methods, keys of :data:`ARMS`.
        seeds: Of data order, selection and new weights.
        lrs: Learning rates by kind of method, the same number for each.
        rank: Of LoRA, DoRA and SHiRA.
        audit: Sizes of the audits.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: dict[str, tuple[float, ...]]
    rank: int
    audit: dict[str, Any]


def _rates(*rates: float, full: float) -> dict[str, tuple[float, ...]]:
    """The sweep of the methods that train few weights, and for ``full`` the same by a factor."""
    kinds = ("sparse", "lora", "dora", "shira")
    return {"full": tuple(full * rate for rate in rates), **dict.fromkeys(kinds, rates)}


SCALES = {
    "real": Scale(
        arms=tuple(ARMS),
        seeds=(1, 2, 3),
        lrs=_rates(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, full=0.1),
        rank=16,
        audit={},
    ),
    "toy": Scale(
        arms=("full", "sparse", "sparse, as many as LoRA", "lora"),
        seeds=(1, 2),
        lrs=_rates(1e-3, 1e-2, full=0.3),
        rank=2,
        audit={
            "bootstrap_samples": 200,
            "stability": {"batch_sizes": [1, 8], "repeats": 1, "max_new_tokens": 2},
            "forgetting": {"sequence_length": 16},
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the queue.

    Attributes:
        kind: ``base`` (scored as it is), ``run`` (fine-tuned and scored) or ``audit`` (of a run).
        task: The recipe's name.
        arm: A key of :data:`ARMS`; ``base`` of the base.
        seed: Of the run.
        lr: Learning rate; 0 of the base.
    """

    kind: str
    task: str
    arm: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """A row's name; a run's is its folder's, too."""
        arm = "".join(c if c.isalnum() else "-" for c in self.arm)
        return f"{self.kind}_{self.task}_{arm}_{self.seed}_lr{self.lr:g}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs share; goes to the workers.

    Attributes:
        scale: Sizes.
        base: The model.
        recipes: Task -> settings of verb ``finetune``.
        out: Where the run folders go.
        text: Files with text the base knows.
        templates: Sentences of the bias and stability audits; None: the package's.
        device: ``cpu`` or ``cuda``.
        lora_weights: Weights that LoRA of the scale's rank trains.
    """

    scale: Scale
    base: Path
    recipes: dict[str, dict[str, Any]]
    out: Path
    text: tuple[Path, ...]
    templates: Path | None
    device: str
    lora_weights: int

    def settings(self, case: Case) -> dict[str, Any]:
        """The whole recipe of a run."""
        method = dict(ARMS.get(case.arm, ARMS["full"]))
        if case.arm == "sparse, as many as LoRA":
            method = sparse(num_entries=self.lora_weights)
        if method["kind"] in ("lora", "dora", "shira"):
            method["rank"] = self.scale.rank
        if case.lr:
            method["optimizer"] = {"lr": case.lr}
        own = {
            "seed": case.seed,
            "init_from": str(self.base),
            "score_base": False,
            "training": {"device": self.device},
        }
        kept = {key: value for key, value in self.recipes[case.task].items() if key != "method"}
        settings = {**merge(kept, own), "method": method}
        return {"schema": 1, "name": case.name, "finetune": settings}

    def config(self, case: Case) -> FinetuneConfig:
        """The settings of a run, checked."""
        config = parse_recipe(self.settings(case)).stages[0].config({})
        assert isinstance(config, FinetuneConfig)
        return config


# --- one case, in a process of its own ------------------------------------------------------------


def carry_out(setting: Setting, case: Case) -> dict[str, Any]:
    """Do one case; its figures."""
    start = time.perf_counter()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        found = {"base": _base, "run": _run, "audit": _audit}[case.kind](setting, case)
    return {"name": case.name, **asdict(case), **found, "wall": time.perf_counter() - start}


def _base(setting: Setting, case: Case) -> dict[str, Any]:
    """Score the model as it is (under a random head where the task needs one that it has not)."""
    from samara.adapt.data import read_task_rows
    from samara.adapt.models import load_task_model
    from samara.adapt.results import scores, write_items
    from samara.adapt.tasks import Task, task_labels

    config = setting.config(case)
    rows = read_task_rows(config.data)
    loaded = load_task_model(
        config.init_from, labels=task_labels(config, rows), dtype=None, seed=config.seed
    )
    model: Any = loaded.model
    model.to(setting.device)
    items = Task(config, rows, model, loaded.tokenizer).score(model)
    folder = setting.out / case.name
    folder.mkdir(parents=True, exist_ok=True)
    write_items(items, folder)
    found = scores(config, items)
    return {"scores": found, "num_items": len(items)}


FIGURES = (
    "scores",
    "num_items",
    "validation_loss",
    "steps",
    "tokens",
    "flops",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "optimizer_bytes",
    "trained_parameters",
    "parameters",
    "storage_bytes",
)


def _run(setting: Setting, case: Case) -> dict[str, Any]:
    from samara.lifecycle import run_recipe

    folder = setting.out / case.name
    run_recipe(parse_recipe(setting.settings(case)), folder, say=lambda _: None)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    results = read_json(folder / "results.json")
    return {key: results[key] for key in FIGURES}


def _audit(setting: Setting, case: Case) -> dict[str, Any]:
    """Audit a run; at the first seed by all suites, at the others for forgetting."""
    from samara.adapt.audits.audit import Change, Plan, Suite, audit
    from samara.adapt.audits.config import AuditConfig
    from samara.adapt.audits.forgetting import read_texts
    from samara.adapt.audits.subject import model_kind
    from samara.adapt.audits.templates import load_templates
    from samara.runs import model_folder

    run = setting.out / replace(case, kind="run").name
    is_first = case.seed == setting.scale.seeds[0]
    has_labels = setting.recipes[case.task]["task"]["kind"] == "labels"
    keeps_head = has_labels == (model_kind(model_folder(setting.base)) == "labels")
    suites: list[Suite] = ["bias", "stability"] if is_first else []
    if setting.text and (keeps_head or (run / "delta.safetensors").exists()):
        suites.append("forgetting")
    found: dict[str, Any] = {"audits": []}
    if suites:
        plan = Plan(
            suites=tuple(suites),
            templates=load_templates(setting.templates),
            texts=read_texts(corpus=None, files=setting.text) if setting.text else (),
            config=AuditConfig.model_validate(setting.scale.audit),
            device="cuda" if setting.device == "cuda" else "cpu",
        )
        evidence = audit(setting.base, Change(tuned=run), plan).evidence
        found["audits"] = [row.model_dump(mode="json") for row in evidence.audits]
    if is_first:
        found["switch_seconds"] = _switch_seconds(setting, run)
    return found


def _switch_seconds(setting: Setting, run: Path) -> float:
    """The least time of three changes to a version on a device that has its base loaded.

    A delta is read and applied to the loaded model, an adapter put around it; a whole model is
    loaded in the place of the one that serves.
    """
    import torch

    from samara.adapt.models import load_task_model
    from samara.sparse.delta import Delta
    from samara.sparse.delta_apply import delta_stack
    from samara.sparse.tensor_files import CheckpointFiles

    results = read_json(run / "results.json")
    labels, method = results["labels"], results["method"]

    def load(folder: Path) -> Any:
        loaded = load_task_model(folder, labels=labels, dtype=None, seed=0)
        model: Any = loaded.model
        return model.to(setting.device)

    model = load(setting.base)
    stack = delta_stack(model, base_root=CheckpointFiles(_folder(setting.base)).root())
    found = []
    for _ in range(3):
        start = time.perf_counter()
        if method == "sparse":
            stack.apply(Delta.load(run / "delta.safetensors"))
        elif method == "full":
            load(run / "model")
        else:
            import peft

            peft.PeftModel.from_pretrained(model, str(run / "adapter"))
        if setting.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        if method == "sparse":
            stack.revert()
        elif method != "full":
            model = load(setting.base)
    return min(found)


def _folder(path: Path) -> Path:
    from samara.runs import model_folder

    return model_folder(path)


# --- the queue ------------------------------------------------------------------------------------


def first_cases(setting: Setting) -> list[Case]:
    """The base, and the sweep of every method."""
    seed = setting.scale.seeds[0]
    cases = [Case(kind="base", task=t, arm="base", seed=seed, lr=0.0) for t in setting.recipes]
    return cases + [
        Case(kind="run", task=task, arm=arm, seed=seed, lr=lr)
        for task in setting.recipes
        for arm in setting.scale.arms
        for lr in setting.scale.lrs[ARMS[arm]["kind"]]
    ]


def best_rates(setting: Setting, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(task, arm) -> the learning rate with the least validation loss, where the sweep is in."""
    found = {}
    for task in setting.recipes:
        for arm in setting.scale.arms:
            rates = setting.scale.lrs[ARMS[arm]["kind"]]
            sweep = [
                row
                for row in rows
                if (row["kind"], row["task"], row["arm"]) == ("run", task, arm)
                and row["seed"] == setting.scale.seeds[0]
                and row["lr"] in rates
                and row["validation_loss"] is not None
            ]
            if len(sweep) == len(rates):
                best = min(sweep, key=lambda row: float(row["validation_loss"]))
                found[task, arm] = float(best["lr"])
    return found


def cases_behind(setting: Setting, rows: Sequence[dict[str, Any]]) -> list[Case]:
    """What finished sweeps let begin: the other seeds, and the audits of what is finished."""
    names = {row["name"] for row in rows}
    cases = []
    for (task, arm), lr in best_rates(setting, rows).items():
        for seed in setting.scale.seeds:
            run = Case(kind="run", task=task, arm=arm, seed=seed, lr=lr)
            cases.append(replace(run, kind="audit") if run.name in names else run)
    return cases


def drop_losers(setting: Setting, rows: Sequence[dict[str, Any]]) -> None:
    """Remove the models of the rates that were not the best: items and figures are enough."""
    best = best_rates(setting, rows)
    for row in rows:
        if row["kind"] == "run" and best.get((row["task"], row["arm"]), row["lr"]) != row["lr"]:
            for name in ("model", "adapter"):
                shutil.rmtree(setting.out / row["name"] / name, ignore_errors=True)


def is_done(setting: Setting, case: Case, known: set[str]) -> bool:
    """Whether its figures are in, and what the sums need of it is there."""
    has_items = case.kind == "audit" or (setting.out / case.name / ITEMS).exists()
    return case.name in known and has_items


def work_off(setting: Setting, options: argparse.Namespace, record: Record) -> bool:
    """Do what has not been done; whether all of it was."""
    deadline = time.monotonic() + 60 * options.minutes
    seen: set[str] = set()
    running: dict[Future[dict[str, Any]], Case] = {}
    failed = False
    with open_pool(options) as pool:

        def submit(cases: Sequence[Case]) -> None:
            known = {row["name"] for row in record.rows}
            for case in cases:
                if case.name not in seen and not is_done(setting, case, known):
                    seen.add(case.name)
                    running[pool.submit(carry_out, setting, case)] = case

        submit(first_cases(setting))
        submit(cases_behind(setting, record.rows))
        while running:
            left = deadline - time.monotonic()
            done, _ = wait(running, timeout=max(0.0, left), return_when=FIRST_COMPLETED)
            if not done:
                stop_pool(pool)
                return False
            for future in done:
                case, error = running.pop(future), future.exception()
                if error is not None:
                    failed = True
                    print(f"{case.name:60} failed: {error}", flush=True)
                    continue
                row = future.result()
                record.rows[:] = [own for own in record.rows if own["name"] != case.name]
                record.add(row)
                print(f"{case.name:60} {row['wall']:6.0f} s", flush=True)
            submit(cases_behind(setting, record.rows))
            drop_losers(setting, record.rows)
    return not failed


def lora_weights(base: Path, rank: int) -> int:
    """Weights that LoRA of a rank trains on all linear layers of the trunk."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    from samara.sparse.attach import linear_weights

    config = AutoConfig.from_pretrained(_folder(base), local_files_only=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    modules = [use.module for use in linear_weights(model).values()]
    kinds = (torch.nn.Linear, Conv1D)
    return rank * sum(sum(m.weight.shape) for m in modules if isinstance(m, kinds))


def read_tasks(paths: Sequence[Path], base: Path) -> dict[str, dict[str, Any]]:
    """Task -> settings, of recipes of ``samara finetune``."""
    found = {}
    for path in paths:
        recipe = load_recipe(path, [f"init_from={base}"])
        config = recipe.stages[0].config({})
        if not isinstance(config, FinetuneConfig):
            sys.exit(f"{path}: is no recipe of `samara finetune`")
        if config.task.kind not in KINDS:
            sys.exit(f"{path}: task.kind {config.task.kind}: give one of {', '.join(KINDS)}")
        if config.task.name in found:
            sys.exit(f"{path}: another task is named '{config.task.name}', too")
        found[config.task.name] = config.model_dump(mode="json", by_alias=True)
    return found


def main(arguments: Sequence[str]) -> None:
    """Work the queue off, or as much of it as there is time for, and sum up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="a model folder or its run")
    parser.add_argument(
        "--task", type=Path, action="append", required=True, help="a recipe of samara finetune"
    )
    parser.add_argument("--text", type=Path, action="append", help="text that the base knows")
    parser.add_argument("--templates", type=Path, help="sentences of the audits")
    parser.add_argument("--arm", action="append", choices=ARMS, help="only these methods")
    parser.add_argument("--prices", type=Path, default=PRICES, help="for the ownership sheet")
    parser.add_argument("--out", type=Path, default=Path("runs/decision"), help="run folders")
    parser.add_argument("--scale", choices=SCALES, default="real")
    add_pool_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    scale, base = SCALES[options.scale], options.base.resolve()
    if options.arm:
        scale = replace(scale, arms=tuple(dict.fromkeys(["full", *options.arm])))
    device = "cuda" if options.gpus else "cpu"
    try:
        prices = load_prices(options.prices)
        setting = Setting(
            scale=scale,
            base=base,
            recipes=read_tasks(options.task, base),
            out=options.out.resolve(),
            text=tuple(path.resolve() for path in options.text or ()),
            templates=options.templates and options.templates.resolve(),
            device=device,
            lora_weights=lora_weights(base, scale.rank),
        )
    except SamaraError as error:
        sys.exit(str(error))
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=device,
        settings={
            "scale": options.scale,
            "sizes": asdict(scale),
            "tasks": setting.recipes,
            "prices": prices.model_dump(),
        },
    )
    if options.json is not None and options.json.exists():
        rows = read_json(options.json)["rows"]
        record.rows.extend(row for row in rows if row["kind"] not in SUMS)
    is_complete = work_off(setting, options, record)
    rates = {arm: scale.lrs[ARMS[arm]["kind"]] for arm in scale.arms}
    best = best_rates(setting, record.rows)
    found = sums(
        list(record.rows), setting.out, best, seeds=scale.seeds, rates=rates, prices=prices
    )
    for row in found:
        record.add(row)
    if is_complete:
        record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
