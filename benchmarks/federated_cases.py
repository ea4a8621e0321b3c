"""One case of the federated benchmark: a clock, a peak of memory, or a whole run."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samara.config import merge, validate
from samara.federated.config import FederateConfig
from samara.runs import RunFolder, environment, read_json

MMAP_THRESHOLD = "131072"
"""Freed blocks of this size go back to the system, so that a peak of resident memory is one."""


# --- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to fine-tune over clients.

    Attributes:
        role: ``baseline``, ``fixed rate`` (layer dropout without a configurator), ``method``,
            ``ablation`` or ``lever`` (something that might help).
        settings: What differs from the benchmark's recipe.
        clock: Key of :data:`CLOCKS`, with what one batch costs; None: the run measures its own.
        needs_head: It trains nothing but a head, so the task must have one.
    """

    role: str
    settings: Mapping[str, Any]
    clock: str | None = "layers"
    needs_head: bool = False

    @property
    def drops_layers(self) -> bool:
        """Whether layers are dropped: such runs get more rounds, which cost less."""
        rates = self.settings.get("configurator", {}).get("rates", (1.0,))
        return self.settings["method"] in ("droppeft", "static_stld") and any(rates)


def arm(role: str, method: str, clock: str | None = "layers", **settings: Any) -> Arm:
    """A line of :data:`ARMS`."""
    return Arm(role=role, settings={"method": method, **settings}, clock=clock)


def fixed(rate: float) -> Arm:
    """Layer dropout at one rate."""
    return arm("fixed rate", "static_stld", layer_dropout={"rate": rate})


ARMS: dict[str, Arm] = {
    "FedLoRA": arm("baseline", "fedlora"),
    "FedLoRA, checkpointing": arm("baseline", "fedlora_checkpointing", "checkpointing"),
    "frozen lower half": arm("baseline", "frozen_depth", "frozen_depth"),
    "head only": Arm(
        role="baseline", settings={"method": "head_only"}, clock="head_only", needs_head=True
    ),
    "FedAdapter": arm("baseline", "fedadapter", None),
    "HetLoRA": arm("baseline", "hetlora", None),
    "full weights": arm("baseline", "fedavg", None, payload="full"),
    "sparse updates": arm("baseline", "fedavg", None, payload="sparse"),
    "fixed rate 0.25": fixed(0.25),
    "fixed rate 0.5": fixed(0.5),
    "fixed rate 0.75": fixed(0.75),
    "DropPEFT": arm("method", "droppeft"),
    "DropPEFT, all layers shared": arm("ablation", "droppeft", sharing={"direction": "all"}),
    "DropPEFT, nothing dropped": arm("ablation", "droppeft", configurator={"rates": [0.0]}),
    "DropPEFT, at one pace": arm("lever", "droppeft", configurator={"pace": 1.0}),
    "DropPEFT, ends protected": arm(
        "lever", "droppeft", layer_dropout={"protect_first": 1, "protect_last": 1}
    ),
    "DropPEFT, scaled by 1/keep": arm(
        "lever",
        "droppeft",
        layer_dropout={"scale": "inverse_keep"},
        configurator={"rates": [0.25, 0.5, 0.7]},
    ),
    "DropPEFT, sparse updates": arm("lever", "droppeft", None, payload="sparse"),
    "DropPEFT, more layers shared": arm("lever", "droppeft", sharing={"max_personal_layers": 2}),
}
"""Every method in one harness. The configurator's ablation is a fixed rate against DropPEFT with
all layers shared."""

CLOCKS: dict[str, dict[str, Any]] = {
    "layers": {"method": "droppeft"},
    "checkpointing": {"method": "fedlora_checkpointing"},
    "frozen_depth": {"method": "frozen_depth"},
    "head_only": {"method": "head_only"},
}
"""What a batch costs is measured once for all runs of a kind: noise then favours none of them."""

MEMORY: dict[str, dict[str, Any]] = {
    "all layers": {"method": "fedlora"},
    **{
        f"dropout {rate}": {"method": "static_stld", "layer_dropout": {"rate": rate}}
        for rate in (0.25, 0.5, 0.75)
    },
    "checkpointing": {"method": "fedlora_checkpointing"},
    "lower half frozen": {"method": "frozen_depth"},
    "head only": {"method": "head_only"},
}
"""Client trainings whose peak is measured."""

SLOW = [
    {"profile": "jetson-tx2", "share": 1},
    {"profile": "jetson-nano", "share": 1},
    {"profile": "raspberry-pi-4b", "share": 3},
]


def _dirichlet(alpha: float, **clients: Any) -> dict[str, Any]:
    return {"partition": {"kind": "dirichlet", "alpha": alpha, "min_rows": 20}, **clients}


SITUATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha 1": ("labels", _dirichlet(1.0)),
    "alpha 0.1": ("labels", _dirichlet(0.1)),
    "alpha 10": ("labels", _dirichlet(10.0)),
    "slow devices": ("labels", _dirichlet(1.0, devices=SLOW)),
    "users": ("text", {"partition": {"kind": "key", "field": "user", "min_rows": 10}}),
}
"""Name -> kind of task, and who the clients are."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of one benchmark.

    Attributes:
        arms: By situation; the first of each kind of task is where learning rates are swept.
        seeds: Of partition, devices, clients drawn, new weights and data order.
        lrs: Learning rates that each arm is tried at, at the first seed.
        rounds: Of an arm that drops nothing.
        longer: Times as many rounds for those that drop.
        clients, per_round: How many there are, and are asked.
        steps, batch_size, sequence_length: Of a client's training.
        max_rows: Of the training file.
        test_rows: Scored at the end.
        validation: Share of the rows that the server keeps and scores after every round.
        memory: Keys of :data:`MEMORY`.
        recipe: More settings, the same for all.
    """

    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    rounds: int
    longer: float
    clients: int
    per_round: int
    steps: int
    batch_size: int
    sequence_length: int
    max_rows: int | None
    test_rows: int | None
    validation: float
    memory: tuple[str, ...] = tuple(MEMORY)
    recipe: dict[str, Any] = field(default_factory=dict)


_MAIN = tuple(name for name in ARMS if ARMS[name].role in ("baseline", "method"))
_SHORT = ("FedLoRA", "frozen lower half", "fixed rate 0.5", "DropPEFT")
_RATES = {"configurator": {"rates": [0.25, 0.5, 0.75], "shapes": ["incremental"]}}

SIZES = {
    "gpu": Size(
        arms={
            "alpha 1": tuple(ARMS),
            "alpha 0.1": (*_MAIN, "fixed rate 0.5", "DropPEFT, all layers shared"),
            "alpha 10": (*_MAIN, "fixed rate 0.5"),
            "slow devices": (*_SHORT, "head only"),
            "users": _SHORT,
        },
        seeds=(1, 2, 3),
        lrs=(3e-4, 1e-3, 3e-3),
        rounds=30,
        longer=1.5,
        clients=100,
        per_round=10,
        steps=5,
        batch_size=16,
        sequence_length=64,
        max_rows=None,
        test_rows=2000,
        validation=0.05,
        recipe=_RATES,
    ),
    "cpu": Size(
        arms={"alpha 1": (*_MAIN, "fixed rate 0.5", "DropPEFT, all layers shared")},
        seeds=(1,),
        lrs=(1e-3, 3e-3),
        rounds=20,
        longer=1.5,
        clients=100,
        per_round=10,
        steps=5,
        batch_size=8,
        sequence_length=64,
        max_rows=8000,
        test_rows=500,
        validation=0.04,
        recipe=_RATES,
    ),
    "smoke": Size(
        arms={"alpha 1": ("FedLoRA", "DropPEFT"), "users": ("FedLoRA",)},
        seeds=(1, 2),
        lrs=(1e-3, 1e-2),
        rounds=2,
        longer=1.5,
        clients=5,
        per_round=2,
        steps=1,
        batch_size=4,
        sequence_length=32,
        max_rows=120,
        test_rows=8,
        validation=0.1,
        memory=("dropout 0.5",),
        recipe=merge(_RATES, {"lora": {"rank": 2}}),
    ),
}


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One piece of work.

    Attributes:
        kind: ``clock``, ``memory`` or ``run``.
        situation: A key of :data:`SITUATIONS`.
        arm: A key of :data:`CLOCKS`, :data:`MEMORY` or :data:`ARMS`.
        seed, lr, rounds: Of a run.
    """

    kind: str
    situation: str
    arm: str
    seed: int = 1
    lr: float = 1e-3
    rounds: int = 1

    @property
    def name(self) -> str:
        """A row's name; a run's is its folder's, too."""
        words = [self.kind, self.situation, self.arm]
        if self.kind == "run":
            words += [f"s{self.seed}", f"lr{self.lr:g}", f"r{self.rounds}"]
        return "_".join("".join(c if c.isalnum() or c == "." else "-" for c in w) for w in words)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share; goes to the workers.

    Attributes:
        size: Sizes.
        model: The base.
        rows: Folder with train and test rows, by kind of task.
        out: Where the run folders go.
        device: ``cpu`` or ``cuda``.
    """

    size: Size
    model: Path
    rows: Mapping[str, Path]
    out: Path
    device: str

    def config(
        self, case: Case, *, clock: Mapping[str, Any] | None = None, device: str = ""
    ) -> FederateConfig:
        """The whole recipe of a case.

        Args:
            case: Which.
            clock: What a batch costs; None: measured.
            device: Another one than that of the runs.
        """
        size, (kind, clients) = self.size, SITUATIONS[case.situation]
        own: Mapping[str, Any] = {
            "run": ARMS[case.arm].settings if case.kind == "run" else {},
            "clock": CLOCKS.get(case.arm, {}),
            "memory": MEMORY.get(case.arm, {}),
        }[case.kind]
        train, test = (find_rows(self.rows[kind], split) for split in ("train", "test"))
        device = device or self.device
        task = {"kind": "labels"} if kind == "labels" else {"kind": "perplexity"}
        common = {
            "seed": case.seed,
            "init_from": str(self.model),
            "task": {**task, "name": kind, "data": str(test), "limit": size.test_rows},
            "data": {
                "train": str(train),
                "max_rows": size.max_rows,
                "validation_fraction": size.validation,
                "sequence_length": size.sequence_length,
            },
            "layer_dropout": {"rate": 0.5},
            "clients": {
                "number": size.clients,
                "per_round": size.per_round,
                "validation_fraction": 0.1,
                "test_fraction": 0.2,
                **clients,
            },
            "local": {
                "steps": size.steps,
                "batch_size": size.batch_size,
                "optimizer": {"kind": "adamw", "lr": case.lr},
                "precision": "bfloat16" if device == "cuda" else "float32",
                "device": device,
            },
            "server": {"rounds": case.rounds, "evaluation_batch_size": 128},
            "clock": dict(clock) if clock else {"kind": "calibrated", "repetitions": 3},
        }
        settings = merge(merge(common, size.recipe), dict(own))
        return validate(FederateConfig, settings, path=case.name)


def find_rows(folder: Path, split: str) -> Path:
    """A file of rows, packed or not; held-out rows may be called ``valid``.

    Raises:
        SystemExit: If there is none.
    """
    names = [split] if split == "train" else [split, "valid"]
    for name in names:
        for ending in (".jsonl.gz", ".jsonl"):
            if (folder / f"{name}{ending}").exists():
                return folder / f"{name}{ending}"
    raise SystemExit(f"{folder}: holds no {split}.jsonl or {split}.jsonl.gz")


# --- one case, in a process of its own ------------------------------------------------------------


def carry_out(setting: Setting, case: Case, clock: Mapping[str, Any] | None) -> dict[str, Any]:
    """Do one case; its figures."""
    start = time.perf_counter()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        if case.kind == "run":
            found = _run(setting, case, clock)
        else:
            found = {"clock": _clock, "memory": _memory_alone}[case.kind](setting, case)
    return {"name": case.name, **asdict(case), **found, "wall": time.perf_counter() - start}


def _clock(setting: Setting, case: Case) -> dict[str, Any]:
    """What a batch costs by its layers, in CPU time of this machine, wherever the runs run."""
    from samara.federated.job import Job

    run = _fresh_folder(setting.out / case.name)
    costs = Job(setting.config(case, device="cpu"), run).server.costs
    figures = costs.to_dict()
    names = ("seconds_fixed", "seconds_per_layer", "bytes_fixed", "bytes_per_layer")
    given = {name: figures[name] for name in names}
    source = f"measured once, on {environment()['cpu']}: {costs.source}"
    return {
        "clock": {"kind": "given", **given, "source": source},
        "r_squared": costs.r_squared,
    }


def _memory_alone(setting: Setting, case: Case) -> dict[str, Any]:
    """The peak of one training; on CPU where nothing ran before."""
    if setting.device == "cuda":
        return _memory(setting, case)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = MMAP_THRESHOLD
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            return fresh.submit(_memory, setting, case).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _memory(setting: Setting, case: Case) -> dict[str, Any]:
    import torch

    from samara.federated.job import Job
    from samara.federated.messages import ClientState
    from samara.train.memory import PeakMemory

    device = torch.device(setting.device)
    _forget(setting.device)
    whole = PeakMemory(device)
    given = {"seconds_fixed": 0, "seconds_per_layer": 1, "bytes_fixed": 0, "bytes_per_layer": 1}
    clock = {"kind": "given", "source": "not used", **given}
    job = Job(setting.config(case, clock=clock), _fresh_folder(setting.out / case.name))
    (instruction, *_) = job.server.plan().instructions
    values, trainer = job.server.state.tensors, job.trainer
    trainer.load(values)
    held = torch.cuda.memory_allocated() if setting.device == "cuda" else 0
    above = PeakMemory(device)
    reply, _ = trainer.train(instruction, values, ClientState())
    return {
        "active_layers": max(reply.active_layers),
        "num_layers": trainer.num_layers,
        "peak_bytes": whole.peak(),
        "peak_bytes_above_loaded": above.peak() - held,
    }


def _run(setting: Setting, case: Case, clock: Mapping[str, Any] | None) -> dict[str, Any]:
    import torch

    from samara.federated.driver import InProcessDriver
    from samara.federated.job import Job

    class TimedDriver(InProcessDriver):
        """Notes how long clients and scoring take; the rest of a round is the strategy's."""

        asking = scoring = whole = 0.0
        rounds = 0

        def ask(self, instructions: Any) -> Any:
            start = time.perf_counter()
            replies = super().ask(instructions)
            self.asking += time.perf_counter() - start
            return replies

        def evaluate(self, tensors: Any) -> Any:
            start = time.perf_counter()
            scores = super().evaluate(tensors)
            self.scoring += time.perf_counter() - start
            return scores

        def run_round(self) -> Any:
            before, start = self.scoring, time.perf_counter()
            record = super().run_round()
            self.whole += time.perf_counter() - start - (self.scoring - before)
            self.rounds += 1
            return record

    _forget(setting.device)
    run = RunFolder(setting.out / case.name)
    run.path.mkdir(parents=True, exist_ok=True)
    job = Job(setting.config(case, clock=clock), run)
    driver = TimedDriver(job.server, job.trainer, job.store, run)
    driver.resume()
    driver.run()
    peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else None
    job.finish(driver.score_clients())
    timed = max(1, driver.rounds)
    return {
        **figures(run),
        "num_layers": job.trainer.num_layers,
        "measured_peak_bytes": peak,
        "client_seconds_per_round": driver.asking / timed,
        "strategy_seconds_per_round": (driver.whole - driver.asking) / timed,
    }


def _forget(device: str) -> None:
    """A worker's case before this one is none of its memory."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _fresh_folder(path: Path) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    (path / "clock.json").unlink(missing_ok=True)
    return RunFolder(path)


# --- what is kept of a run ------------------------------------------------------------------------


def figures(run: RunFolder) -> dict[str, Any]:
    """The figures of a finished run: its curves, and its totals."""
    log, results = run.metrics(), read_json(run.path / "results.json")
    asked = [own for record in log[1:] for own in record["clients"] if "modelled_seconds" in own]
    peaks = [own["modelled_peak_bytes"] for own in asked]
    late = [own for record in log[1 + len(log) // 2 :] for own in record["clients"]]
    total = log[-1]
    return {
        "curve": {
            "seconds": _short(record["modelled_seconds"] for record in log),
            "joules": _short(record["modelled_joules"] for record in log),
            "bytes": _short(record["bytes_down"] + record["bytes_up"] for record in log),
            "loss": _short(record["validation_loss"] for record in log),
            "accuracy": _short(record["validation_accuracy"] for record in log),
        },
        "test": results["test"],
        "clients": {name: results["clients"][name] for name in ("global", "personal")},
        "validation_loss": results["validation_loss_best"],
        "modelled_seconds": total["modelled_seconds"],
        "modelled_joules": total["modelled_joules"],
        "bytes": total["bytes_down"] + total["bytes_up"],
        "cpu_seconds": results["measured"]["cpu_seconds"],
        "flops": results["measured"]["flops"],
        "modelled_peak_bytes": {"max": max(peaks), "mean": sum(peaks) / len(peaks)},
        "arms": _arm_counts(late),
        "refused": sum(own["verdict"] != "ok" for r in log[1:] for own in r["clients"]),
        "rolled_back": sum(record["rolled_back"] for record in log[1:]),
        "trained_parameters": results["trained_parameters"],
    }


def _short(values: Any) -> list[float | None]:
    """Six digits are enough for a curve."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def _arm_counts(clients: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Device -> how many trainings had which mean rate."""
    found: dict[str, dict[str, int]] = {}
    for own in clients:
        counts = found.setdefault(own["device"], {})
        counts[f"{own['rate']:g}"] = counts.get(f"{own['rate']:g}", 0) + 1
    return found
