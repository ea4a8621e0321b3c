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
the tables. Runs side by side on one GPU slow each other down: for times that can be quoted, no more
workers than GPUs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from decision_cases import ARMS, SCALES, Case, Setting, carry_out
from decision_sums import SUMS, sums
from pool import add_pool_options, collect, open_pool
from record import Record, add_json_option

from samara.adapt.config import FinetuneConfig
from samara.errors import SamaraError
from samara.measure.ownership import load_prices
from samara.recipe import load_recipe
from samara.runs import model_folder, read_json

PRICES = Path(__file__).parent / "prices.yaml"
ITEMS = "task_items.jsonl"
KINDS = ("labels", "classification", "multiple_choice", "question", "summarization")


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
    seen: set[str] = set()
    waiting: list[Case] = []
    running: dict[Future[dict[str, Any]], Case] = {}
    with open_pool(options) as pool:

        def begin(cases: Sequence[Case]) -> None:
            known = {row["name"] for row in record.rows}
            new = [case for case in cases if case.name not in seen]
            seen.update(case.name for case in new)
            waiting.extend(case for case in new if not is_done(setting, case, known))
            waiting.sort(key=lambda case: urgency(setting, case))
            while waiting and len(running) < max(1, options.workers):
                case = waiting.pop(0)
                running[pool.submit(carry_out, setting, case)] = case

        def done(case: Case, row: dict[str, Any]) -> None:
            record.rows[:] = [own for own in record.rows if own["name"] != case.name]
            record.add(row)
            print(f"{case.name:60} {row['wall']:6.0f} s", flush=True)
            begin(cases_behind(setting, record.rows))
            drop_losers(setting, record.rows)

        begin([*first_cases(setting), *cases_behind(setting, record.rows)])
        return collect(
            pool, running, minutes=options.minutes, done=done, failed=lambda _: begin(())
        )


def urgency(setting: Setting, case: Case) -> tuple[bool, int, bool]:
    """Where a case stands in the queue: whole tasks one after another, audits when all have run."""
    is_sweep = case.kind == "run" and case.seed == setting.scale.seeds[0]
    return case.kind == "audit", list(setting.recipes).index(case.task), not is_sweep


def lora_weights(base: Path, rank: int) -> int:
    """Weights that LoRA of a rank trains on all linear layers of the trunk."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.pytorch_utils import Conv1D

    from samara.sparse.attach import linear_weights

    config = AutoConfig.from_pretrained(model_folder(base), local_files_only=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    # A trunk's own pooler belongs to the head: tasks train it whole.
    weights = {name: use for name, use in linear_weights(model).items() if "pooler" not in name}
    modules = [use.module for use in weights.values()]
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
