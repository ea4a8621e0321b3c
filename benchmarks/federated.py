r"""Fine-tuning over clients: layer dropout with a configurator and own layers, and what it beats.

    python benchmarks/federated.py --model MODEL --data ag_news --users shakespeare_speakers \
        --out runs/federated --json federated.json
    python benchmarks/federated.py … --gpus 1 --workers 10 --minutes 9    # for so long
    python benchmarks/federated.py … --size cpu --workers 2               # one alpha, one seed

``--data`` is a folder with ``train`` and ``test`` rows (.jsonl, also .gz) with ``text`` and
``label``, ``--users`` one with ``text`` and ``user``: natural clients, language modelling.

What a batch costs by its number of layers is measured first, on this machine's CPU in one thread,
once for all runs; the virtual clock scales it by device. Each arm is then tried at as many learning
rates as any other, at the first seed of the first situation of its kind; the one with the least
validation loss runs at all seeds in all situations. Arms that drop layers get more rounds, as these
cost less: compare at equal modelled time, which ``benchmarks/federated_findings.py`` does.

The queue goes on where it stopped: a case whose figures are in the file is not run again, an
interrupted run goes on from its checkpoint in ``--out``. Runs side by side slow each other down:
nothing but the measured seconds depends on it. ``benchmarks/results.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from federated_cases import ARMS, CLOCKS, SITUATIONS, SIZES, Case, Setting, carry_out, find_rows
from pool import add_pool_options, collect, open_pool
from record import Record, add_json_option

from samara.errors import SamaraError
from samara.runs import model_folder, read_json

KINDS = ("clock", "memory", "run")


# --- the queue ------------------------------------------------------------------------------------


def first_of_kind(setting: Setting) -> dict[str, str]:
    """Kind of task -> the situation in which it is calibrated and swept."""
    found: dict[str, str] = {}
    for situation in setting.size.arms:
        found.setdefault(SITUATIONS[situation][0], situation)
    return found


def clock_of(setting: Setting, arm: str, situation: str) -> Case | None:
    """The case that measures what a batch of an arm costs; None: each run by itself."""
    key = ARMS[arm].clock
    first = first_of_kind(setting)[SITUATIONS[situation][0]]
    return None if key is None else Case(kind="clock", situation=first, arm=key)


def preparations(setting: Setting) -> Iterator[Case]:
    """Clocks and peaks of memory."""
    wanted = (
        clock_of(setting, arm, own) for own, arms in setting.size.arms.items() for arm in arms
    )
    yield from dict.fromkeys(case for case in wanted if case is not None)
    first = first_of_kind(setting)
    for name in setting.size.memory:
        yield Case(kind="memory", situation=next(iter(first.values())), arm=name)


def run_case(setting: Setting, situation: str, arm: str, *, seed: int, lr: float) -> Case:
    """A run, with as many rounds as its arm gets."""
    size = setting.size
    rounds = math.ceil(size.rounds * size.longer) if ARMS[arm].drops_layers else size.rounds
    return Case(kind="run", situation=situation, arm=arm, seed=seed, lr=lr, rounds=rounds)


def sweep(setting: Setting, situation: str, arm: str) -> list[Case]:
    """The runs that choose an arm's learning rate for all situations of a kind."""
    first, size = first_of_kind(setting)[SITUATIONS[situation][0]], setting.size
    return [run_case(setting, first, arm, seed=size.seeds[0], lr=lr) for lr in size.lrs]


def best_rate(cases: Sequence[Case], rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The rate of a sweep with the least validation loss; None: the sweep is not in."""
    if any(case.name not in rows for case in cases):
        return None
    losses = [rows[case.name]["validation_loss"] for case in cases]
    scored = [math.inf if loss is None else float(loss) for loss in losses]
    return cases[scored.index(min(scored))].lr


def runs_behind(setting: Setting, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Case]:
    """The runs that may begin: sweeps whose clock is in, and what finished sweeps allow."""
    ready: list[tuple[str, str]] = []
    for situation, arms in setting.size.arms.items():
        for arm in arms:
            clock = clock_of(setting, arm, situation)
            if clock is None or clock.name in rows:
                ready.append((situation, arm))
    for situation, arm in ready:
        yield from sweep(setting, situation, arm)
    for seed in setting.size.seeds:
        for situation, arm in ready:
            lr = best_rate(sweep(setting, situation, arm), rows)
            if lr is not None:
                yield run_case(setting, situation, arm, seed=seed, lr=lr)


def work_off(setting: Setting, options: argparse.Namespace, record: Record) -> bool:
    """Do what has not been done; whether all of it was."""
    seen: set[str] = set()
    running: dict[Future[dict[str, Any]], Case] = {}
    with open_pool(options) as pool:

        def submit(cases: Iterator[Case]) -> None:
            rows = {row["name"]: row for row in record.rows}
            for case in cases:
                if case.name in seen or case.name in rows or case.kind not in options.only:
                    continue
                seen.add(case.name)
                clock = None
                if case.kind == "run":
                    timed = clock_of(setting, case.arm, case.situation)
                    clock = rows[timed.name]["clock"] if timed else None
                running[pool.submit(carry_out, setting, case, clock)] = case

        def submit_runs() -> None:
            submit(runs_behind(setting, {row["name"]: row for row in record.rows}))

        def done(case: Case, row: dict[str, Any]) -> None:
            record.add(row)
            shutil.rmtree(setting.out / case.name, ignore_errors=True)
            print(f"{case.name:70} {told(row)} {row['wall']:6.0f} s", flush=True)
            submit_runs()

        submit(preparations(setting))
        submit_runs()
        return collect(pool, running, minutes=options.minutes, done=done)


def told(row: Mapping[str, Any]) -> str:
    """The figure that one looks at while waiting."""
    if row["kind"] == "clock":
        return f"{row['clock']['seconds_per_layer']:8.4f} s a layer"
    if row["kind"] == "memory":
        return f"{row['peak_bytes_above_loaded'] / 1e6:8.0f} MB"
    accuracy = row["test"]["last"]["accuracy"]
    return f"loss {row['validation_loss']:.4f}" if accuracy is None else f"accuracy {accuracy:.4f}"


# --- the command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="any model folder, or its run")
    parser.add_argument("--data", type=Path, required=True, help="folder with labelled rows")
    parser.add_argument("--users", type=Path, help="folder with rows of natural users")
    parser.add_argument("--out", type=Path, default=Path("runs/federated"), help="run folders")
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--rounds", type=int, help="of arms that drop nothing")
    parser.add_argument("--steps", type=int, help="of a client; left out: the size's")
    parser.add_argument("--seeds", type=int, nargs="+", help="left out: the size's")
    parser.add_argument("--situation", action="append", choices=SITUATIONS, help="only these")
    parser.add_argument("--arm", action="append", choices=ARMS, help="only these")
    parser.add_argument("--only", action="append", choices=KINDS, help="only such cases")
    add_pool_options(parser)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    options.only = options.only or list(KINDS)
    return options


def make_setting(options: argparse.Namespace) -> Setting:
    """What all cases share."""
    size = SIZES[options.size]
    arms = {}
    for situation, own in size.arms.items():
        kind = SITUATIONS[situation][0]
        wanted = options.situation is None or situation in options.situation
        if not wanted or (kind == "text" and options.users is None):
            continue
        kept = [arm for arm in own if options.arm is None or arm in options.arm]
        arms[situation] = tuple(a for a in kept if kind == "labels" or not ARMS[a].needs_head)
    changes = {"rounds": options.rounds, "steps": options.steps, "seeds": options.seeds}
    given = {name: value for name, value in changes.items() if value}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    rows = {"labels": options.data.resolve()}
    if options.users is not None:
        rows["text"] = options.users.resolve()
    for folder in rows.values():
        find_rows(folder, "train"), find_rows(folder, "test")
    return Setting(
        size=replace(size, arms=arms, **given),
        model=options.model.resolve(),
        rows=rows,
        out=options.out.resolve(),
        device="cuda" if options.gpus else "cpu",
    )


def main(arguments: Sequence[str]) -> None:
    """Work the queue off, or as much of it as there is time for."""
    options = parse(arguments)
    setting = make_setting(options)
    try:
        model_folder(setting.model)
    except SamaraError as error:
        sys.exit(str(error))
    record = Record(
        options.json,
        script=__file__,
        arguments=arguments,
        device=setting.device,
        settings={
            "size": options.size,
            "sizes": asdict(setting.size),
            "model": str(options.model),
            "data": options.data.name,
            "arms": {name: {"role": a.role, **a.settings} for name, a in ARMS.items()},
            "clocks": CLOCKS,
        },
    )
    if options.json is not None and options.json.exists():
        record.rows.extend(read_json(options.json)["rows"])
    if work_off(setting, options, record) and set(options.only) == set(KINDS):
        record.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
