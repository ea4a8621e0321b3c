"""Verb ``finetune``: a model and a task in; a delta, an adapter or a model out, and its scores.

The run folder gets

    checkpoints/           to go on from: what is trained, not the base model
    metrics.jsonl          the log
    data.json, costs.json  what became of the rows; FLOPs of a token
    results.json           scores with intervals, time, memory, storage
    task_items.jsonl       every scored row with what the model said
    lineage.json           what it was made from, and the compute spent

with ``folds`` also ``folds/``, a run of its own for each; and, by method: ``delta.safetensors``
(with ``support.safetensors`` and ``selection.json``, and ``head.safetensors`` where the base has no
such head), ``adapter/``, or ``model/``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from samara.adapt.config import FinetuneConfig, FullMethod, SparseMethod
from samara.adapt.cross_validation import cross_validate
from samara.adapt.data import TaskRows, read_task_rows
from samara.adapt.methods import Adaptation, FullAdaptation, SparseAdaptation, provenance
from samara.adapt.models import TaskModel, load_task_model
from samara.adapt.results import RESULTS, scores, write_items
from samara.adapt.tasks import Task, scored_file, task_labels
from samara.data.loader import epoch_permutation, training_batches
from samara.data.rows import Batch
from samara.errors import ConfigError, ResourceError
from samara.measure.config import DeviceProfile
from samara.measure.devices import device_profile, estimated_cost
from samara.measure.flop_counter import flop_counter
from samara.measure.task_metrics import Item
from samara.model.modeling import SamaraPreTrainedModel, set_activation_checkpointing
from samara.progress import ProgressLine
from samara.runs import (
    Compute,
    Lineage,
    RunFolder,
    hash_file,
    hash_weights,
    read_json,
    write_json,
)
from samara.sparse.auto import TrialRun
from samara.sparse.calibration import Calibration
from samara.sparse.delta_records import Cost
from samara.train.checkpoint import Checkpoints, TrainingState, sweep
from samara.train.layer_dropout import LayerCosts, dropping_layers
from samara.train.layer_rates import LayerRates
from samara.train.layer_stack import find_layers
from samara.train.loop import AroundPass, Costs, Hooks, Record, Update, train
from samara.train.memory import PeakMemory
from samara.train.parallel import Place, autocast, choose_place, compile_model, uncompiled
from samara.train.schedule import learning_rate
from samara.train.sinks import Sink, open_sinks
from samara.train.stop import StopSignal

COSTS = "costs.json"


def finetune(config: FinetuneConfig, run: RunFolder) -> None:
    """Adapt a model in ``run``; where the folder holds checkpoints, go on from the newest.

    Raises:
        ConfigError: If settings, task and model do not fit each other.
        DataError: If a file or row is missing or malformed.
        CheckpointError: If the model, or what there is to go on from, is damaged or another.
        ResourceError: If memory or disk do not suffice.
        NonFiniteLossError: If the loss stops being a number.
        Stopped: If a signal stopped it, its state saved.
    """
    place = choose_place(config.training.device)
    if place.world_size > 1:
        raise ConfigError(
            f"training: runs in one process, and {place.world_size} were started; start one"
        )
    try:
        folds = None if config.folds is None else cross_validate(config, run, finetune)
        job = Job(config, run, place)
        job.train()
        job.finish(folds)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{place.device.type} ran out of memory; lower training.micro_batch_size or "
            "evaluation_batch_size, or set training.activation_checkpointing: layer"
        ) from error


class Job:
    """One run of the verb, from a fresh or interrupted folder to its results."""

    def __init__(self, config: FinetuneConfig, run: RunFolder, place: Place) -> None:
        self.config, self.run, self.place = config, run, place
        rows = read_task_rows(config)
        self.memory = PeakMemory(place.device)
        loaded = self._load(rows)
        self.task = Task(config, rows, loaded.model, loaded.tokenizer)
        self.folder, self.parents = loaded.folder, self._parents(rows, loaded)
        write_json(run.path / "data.json", self._data_record(rows))
        training = config.training
        self.num_steps = training.num_steps(len(self.task.train))
        self.micro_batch_size = training.micro_batch_size or training.batch_size
        self.layer_rates = self._layer_rates(loaded.model)
        self.profile: DeviceProfile = device_profile(
            config.logging.device_profile, device=place.device.type
        )
        self.base_items = self._scored(loaded.model) if config.score_base else None
        self.adaptation = self._adapt(loaded)
        self.model = self.adaptation.model
        self.preparation_peak = self.memory.peak()
        self.memory.restart()  # what choosing took is no part of what training takes
        self.state = TrainingState()
        self.checkpoints = Checkpoints(
            run.path / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            identity={"task": config.task.name, **self.parents},
        )
        torch.manual_seed(config.seed)
        self._resume()
        if training.compile:
            compile_model(self.model)

    # --- what is adapted, and on what ---------------------------------------------------------

    def _load(self, rows: TaskRows) -> TaskModel:
        config = self.config
        exact = torch.float32 if isinstance(config.method, FullMethod) else None
        loaded = load_task_model(
            config.init_from, labels=task_labels(config, rows), dtype=exact, seed=config.seed
        )
        model: Any = loaded.model
        model.to(self.place.device)
        if config.training.activation_checkpointing == "layer":
            if isinstance(model, SamaraPreTrainedModel):
                set_activation_checkpointing(model, "layer")
            else:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        return loaded

    def _layer_rates(self, model: PreTrainedModel) -> LayerRates | None:
        """How often each layer runs, before anything is chosen or trained; None: in every pass."""
        dropout = self.config.training.layer_dropout
        if dropout is None:
            return None
        with _naming_its_place():
            return dropout.rates(len(find_layers(model).layers))

    def _parents(self, rows: TaskRows, loaded: TaskModel) -> dict[str, str]:
        return {
            "init_from": hash_weights(loaded.folder),
            "data": rows.hash,
            "scored": hash_file(scored_file(self.config)),
        }

    def _data_record(self, rows: TaskRows) -> dict[str, Any]:
        return {
            "schema": 1,
            "hash": rows.hash,
            "train": {"rows": len(self.task.train), "cut": self.task.train.num_cut},
            "validation": {"rows": len(self.task.validation), "cut": self.task.validation.num_cut},
            "left_out": self.task.left_out,
        }

    def _adapt(self, loaded: TaskModel) -> Adaptation:
        config = self.config
        match config.method:
            case FullMethod() as method:
                return FullAdaptation(loaded, method)
            case SparseMethod() as method:
                return SparseAdaptation(
                    loaded,
                    method,
                    run=self.run,
                    calibration=self._calibration(method),
                    trial=self._trial(loaded.model, method),
                    seed=config.seed,
                )
            case method:
                from samara.adapt.peft_methods import PeftAdaptation

                torch.manual_seed(config.seed)
                return PeftAdaptation(loaded, method, seed=config.seed)

    def _calibration(self, method: SparseMethod) -> Calibration:
        """The first training rows in the order of the first epoch, one a sample."""
        order = epoch_permutation(len(self.task.train), seed=self.config.seed, epoch=0)
        chosen = order[: method.selection.num_samples].tolist()
        return Calibration(
            objective=self.task.objective,
            samples=[self.task.train.batch([row]) for row in chosen],
            precision=self.config.training.precision,
        )

    def _trial(self, model: PreTrainedModel, method: SparseMethod) -> TrialRun:
        return TrialRun(
            objective=self.task.objective,
            batches=lambda steps: self._batches(0, steps),
            evaluate=lambda: self._validation_loss(model),
            precision=self.config.training.precision,
            clip_grad_norm=self.config.training.clip_grad_norm,
            gradient_path=method.gradient_path,
        )

    def _batches(self, start: int, number: int) -> Iterable[Sequence[Batch]]:
        return training_batches(
            self.task.train,
            batch_size=self.config.training.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.config.seed,
            start_step=start,
            num_steps=number,
            num_workers=self.config.data.num_workers,
            pin_memory=self.place.device.type == "cuda",
        )

    # --- training -----------------------------------------------------------------------------

    def _resume(self) -> None:
        """Go back to the newest checkpoint, if there is one, and cut the log to it."""
        sweep(self.run.path)
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self.checkpoints.load(checkpoint, self.adaptation.weights, self.adaptation.updater)
            self.state = checkpoint.state
        self.run.truncate_metrics(self.state.step)
        records = self.run.metrics()
        self.adaptation.watch(
            [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
        )

    def train(self) -> None:
        """Run the loop to the last step."""
        training, start = self.config.training, self.state.step
        costs = self._costs()
        with (
            _naming_its_place(),
            StopSignal() as stop,
            open_sinks(self.config.logging.sinks, run=self.run, start_step=start) as sinks,
            ProgressLine(
                f"finetune {self.run.path.name}", total=self.num_steps, unit="steps"
            ) as line,
            dropping_layers(
                self.model,
                training.layer_dropout,
                seed=self.config.seed,
                costs=costs,
                trained=self.adaptation.trained,
            ) as around_pass,
        ):
            train(
                self.model,
                objective=self.task.objective,
                optimizer=self.adaptation.updater,
                learning_rate=self._learning_rate,
                batches=self._batches(start, self.num_steps - start),
                state=self.state,
                num_steps=self.num_steps,
                precision=training.precision,
                clip_grad_norm=training.clip_grad_norm,
                costs=costs(self.layer_rates.keep if self.layer_rates else ()),
                hooks=self._hooks(line, sinks, around_pass),
                stop=stop,
            )

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config.schedule,
            step=step,
            num_steps=self.num_steps,
            peak=self.config.method.optimizer.lr,
        )

    def _costs(self) -> LayerCosts:
        """FLOPs of a token; layer by layer where passes leave some out."""
        path = self.run.path / COSTS
        if not (path.exists() and self.state.step):  # a support that grew would cost more by now
            write_json(path, {"schema": 1, **self._flops_per_token()})
        found = read_json(path)
        layers = found["flops_per_token_by_layer"]
        peak = self.profile.peak_flops[self.config.training.precision]
        return LayerCosts(
            rest=_flat_costs(found["flops_per_token"] - sum(layers), peak),
            layers=tuple(_flat_costs(flops, peak) for flops in layers),
        )

    def _flops_per_token(self) -> dict[str, Any]:
        """Counted over one micro-batch of the first step, in a pass of all layers."""
        batch = {n: t.to(self.place.device) for n, t in next(iter(self._batches(0, 1)))[0].items()}

        def run_pass() -> int:
            loss = self.task.objective(self.model, batch).loss
            torch.autograd.backward(loss)
            return batch["input_ids"].numel()

        devices = [self.place.device] if self.place.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            uncompiled(self.model),
            autocast(self.place.device, self.config.training.precision),
        ):
            self.model.train()
            if self.layer_rates is not None:
                costs = LayerCosts.measured(self.model, run_pass, peak_flops=None)
                layers = [layer.flops_per_token for layer in costs.layers]
                total = costs.rest.flops_per_token + sum(layers)
            else:
                with flop_counter() as counter:
                    tokens = run_pass()
                layers, total = [], counter.get_total_flops() / tokens
        self.adaptation.updater.zero_grad()
        return {"flops_per_token": total, "flops_per_token_by_layer": layers}

    def _hooks(
        self, line: ProgressLine, sinks: list[Sink], around_pass: AroundPass | None
    ) -> Hooks:
        def show(state: TrainingState, lr: float, update: Update) -> None:
            line.update(state.step, loss=f"{update.nll:.3f}", lr=f"{lr:.2e}")

        def log(record: Record) -> None:
            self.run.append_metrics(record)
            for sink in sinks:
                sink.write(record)

        return Hooks(
            around_pass=around_pass,
            on_step=show,
            log=log,
            log_every=self.config.logging.every_steps,
            evaluate=self._evaluate,
            evaluate_every=self.config.training.evaluate_every_steps,
            save=self._save,
            save_every=self.config.checkpoint.every_steps,
            last_saved=self.checkpoints.newest,
            peak_memory=self.memory.peak,
        )

    def _save(self, state: TrainingState) -> None:
        self.checkpoints.save(self.adaptation.weights, self.adaptation.updater, state)

    def _evaluate(self) -> float:
        loss = self._validation_loss(self.model)
        if self.state.step < self.num_steps:
            self.adaptation.observe(loss)
        return loss

    def _validation_loss(self, model: PreTrainedModel) -> float:
        with uncompiled(model):
            return self.task.validation_loss(model, batch_size=self.micro_batch_size)

    # --- the end ------------------------------------------------------------------------------

    def _scored(self, model: PreTrainedModel) -> list[Item]:
        with uncompiled(model):
            return self.task.score(model)

    def finish(self, folds: dict[str, Any] | None = None) -> None:
        """Score, export, and write what it cost, with what cross-validation found."""
        started = time.perf_counter()
        items = self._scored(self.model)
        seconds = time.perf_counter() - started
        write_items(items, self.run.path)
        found = scores(self.config, items)
        base = None if self.base_items is None else scores(self.config, self.base_items)
        recipe = self.config.model_dump(mode="json")
        records = provenance(
            self.folder,
            data_hash=self.parents["data"],
            recipe=recipe,
            seed=self.config.seed,
            task=self.config.task.name,
            scores=found,
            base_scores=base,
            num_items=len(items),
            cost=Cost(
                selection_hours=self.adaptation.preparation_seconds / 3600,
                training_hours=self.state.seconds / 3600,
                evaluation_hours=seconds / 3600,
            ),
        )
        written = self.adaptation.export(self.run, records)
        cost = estimated_cost(self.profile, seconds=self.state.seconds)
        spent = Compute(
            tokens=self.state.tokens,
            flops=self.state.flops,
            seconds=self.state.seconds,
            joules=cost.joules,
        )
        self.run.write_lineage(
            Lineage(parents=self.parents, spent=spent, inherited=_inherited(self.folder))
        )
        write_json(
            self.run.path / RESULTS,
            {
                "schema": 1,
                "task": {"name": self.config.task.name, "kind": self.config.task.kind},
                "method": self.config.method.kind,
                "init_from": str(self.folder.resolve()),
                "labels": self.task.labels,
                "scores": found,
                "base_scores": base,
                "cross_validation": folds,
                "num_items": len(items),
                "left_out": self.task.left_out.get("scored", 0),
                "confidence": self.config.confidence,
                **self._figures(written, scoring_seconds=seconds),
                "energy_kwh": cost.energy_kwh,
                "cost": cost.money,
                "currency": cost.currency,
                "parents": self.parents,
            },
        )

    def _figures(self, written: Sequence[str], *, scoring_seconds: float) -> dict[str, Any]:
        state, adaptation = self.state, self.adaptation
        sizes = {name: _stored_bytes(self.run.path / name) for name in written}
        return {
            "train_loss": state.train_loss,
            "validation_loss": state.validation_loss,
            "steps": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "seconds": {
                "selection": adaptation.preparation_seconds,
                "training": state.seconds,
                "scoring": scoring_seconds,
            },
            "tokens_per_second": state.tokens / state.seconds,
            "peak_memory_bytes": state.peak_memory_bytes,
            "preparation_peak_bytes": self.preparation_peak,
            "optimizer_bytes": adaptation.optimizer_bytes,
            "trained_parameters": adaptation.num_trained,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "storage_bytes": sum(sizes.values()),
            "artefacts": sizes,
            "details": adaptation.details(),
            "layer_dropout": None if self.layer_rates is None else asdict(self.layer_rates),
            "device": self.place.device.type,
            "device_profile": self.profile.name,
        }


@contextmanager
def _naming_its_place() -> Iterator[None]:
    """Complete the key in what is said about layer dropout."""
    try:
        yield
    except ConfigError as error:
        place = "training." if str(error).startswith("layer_dropout") else ""
        raise ConfigError(f"{place}{error}") from error


def _flat_costs(flops: float, peak_flops: float | None) -> Costs:
    return Costs(flops_per_token=flops, useful_flops_per_token=flops, peak_flops=peak_flops)


def _inherited(folder: Path) -> Compute:
    """Compute that the model's own run spent, where it has one."""
    return RunFolder(folder.parent).lineage().total if folder.name == "model" else Compute()


def _stored_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
