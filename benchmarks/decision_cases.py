"""One case of the decision table: a run, the base as it is, or the audit of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from samara.adapt.config import FinetuneConfig
from samara.config import merge
from samara.recipe import parse_recipe
from samara.runs import model_folder, read_json


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
        lrs=_rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, full=0.1),
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
    rows = read_task_rows(config)
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
    from samara.adapt.audits.audit import Change, Plan, audit
    from samara.adapt.audits.config import AuditConfig, Suite
    from samara.adapt.audits.forgetting import read_texts
    from samara.adapt.audits.subject import model_kind
    from samara.adapt.audits.templates import load_templates

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
            templates=load_templates(setting.templates or "english"),
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
    stack = delta_stack(model, base_root=CheckpointFiles(model_folder(setting.base)).root())
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
