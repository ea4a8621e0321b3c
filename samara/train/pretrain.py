"""Verb ``pretrain``: a prepared corpus in, a trained model out.

The run folder gets

    checkpoints/  averages/   to go on from, and the members of the final mean
    metrics.jsonl             the log
    tokenizer/                the corpus' with the special tokens of the objective; none if causal
    model/                    the result: a Hugging Face folder with its tokenizer
    summary.json              what it is, what it cost, how good it became
    lineage.json              what it was made from, and the compute spent, ancestors' included

Of several processes (``torchrun``) each is given a run folder; that of the first is the run's, and
those of the others are thrown away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from samara.data.loader import training_batches
from samara.data.objective_rows import objective_tokenizer
from samara.data.objectives import CausalObjective, MaskedObjective
from samara.data.prepare import PreparedCorpus, open_corpus
from samara.data.tokenizer import FOLDER_FILES, TextTokenizer
from samara.data.training_data import CorpusData, TrainingData
from samara.errors import ConfigError, ResourceError
from samara.measure.budget import Budget, budget
from samara.measure.config import DeviceProfile
from samara.measure.devices import device_profile, estimated_cost, peak_flops
from samara.measure.loss import evaluate_loss
from samara.measure.memory import training_memory
from samara.model.disk_errors import disk_errors
from samara.model.loading import save_model
from samara.model.modeling import set_activation_checkpointing
from samara.progress import ProgressLine
from samara.runs import Compute, Lineage, RunFolder, hash_weights, new_folder, write_json
from samara.train.averaging import Averages, member_steps
from samara.train.checkpoint import Checkpoints, TrainingState, named_weights, sweep
from samara.train.config import InstructConfig, PretrainConfig, TrainingConfig
from samara.train.layer_dropout import LayerCosts, dropping_layers
from samara.train.loop import AroundPass, Costs, Hooks, Record, Update, stopped, train
from samara.train.memory import PeakMemory, check_memory
from samara.train.objective import make_objective
from samara.train.optim import Optimizer
from samara.train.origin import LanguageModel, Origin, find_origin
from samara.train.parallel import (
    Place,
    Workers,
    choose_place,
    compile_model,
    join_processes,
    uncompiled,
)
from samara.train.processes import first_goes_first, is_lost_process, whole
from samara.train.schedule import learning_rate
from samara.train.sinks import Sink, open_sinks
from samara.train.stop import StopSignal


def pretrain(config: PretrainConfig, run: RunFolder) -> None:
    """Train a model in ``run``; where the folder holds checkpoints, go on from the newest.

    Raises:
        ConfigError: If the settings do not fit the corpus or the model to start from.
        DataError: If the corpus is missing or damaged.
        ResourceError: If memory will not do (as a rule before the first step), or the disk is full.
        CheckpointError: If what there is to go on from is damaged or belongs to something else.
        NonFiniteLossError: If the loss stops being a number.
        Stopped: If a signal stopped it, its state saved.
    """
    with join_processes(config.training.device, config.training.parallel) as place:
        with first_goes_first():
            corpus = open_corpus(config.data.corpus, cache=cache_folder())
        tokenizer = open_tokenizer(config, corpus, run)
        origin = find_origin(config, tokenizer)
        data = CorpusData(
            corpus, config.data, objective=config.objective, tokenizer=tokenizer, seed=config.seed
        )
        carry_out(config, run, data, origin, place)


def carry_out(
    config: PretrainConfig | InstructConfig,
    run: RunFolder,
    corpus: TrainingData,
    origin: Origin,
    place: Place,
) -> None:
    """Train a model on what a verb found for it, from the newest checkpoint or from the start.

    Raises:
        The errors of :func:`pretrain`.
    """
    _check_together(config, place)
    share = max(1, config.training.batch_size // place.world_size)
    micro_batch_size = config.training.micro_batch_size or share
    needed = predict_memory(config, origin, place, micro_batch_size=micro_batch_size)
    check_memory(predicted=needed, device=place.device)
    job = Job(config, run, corpus, origin, place, micro_batch_size)
    try:
        job.resume()
        job.train()
        job.finish()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"step {job.state.step + 1}: {place.device.type} ran out of memory; lower "
            f"training.micro_batch_size ({micro_batch_size}), or set "
            "training.activation_checkpointing: layer"
        ) from error
    except RuntimeError as error:
        if place.world_size == 1 or not is_lost_process(error):
            raise
        saved = job.checkpoints.newest() if place.is_first else None
        where = f"the last checkpoint is {saved}; " if saved else ""
        raise ResourceError(
            f"step {job.state.step + 1}: another of the {place.world_size} processes has ended; "
            f"{where}run the same command to go on from the last checkpoint"
        ) from error


def _check_together(config: PretrainConfig | InstructConfig, place: Place) -> None:
    """Refuse what several processes cannot do.

    Raises:
        ConfigError: If the recipe asks for it.
    """
    if place.parallel == "fsdp" and config.optimizer.kind == "muon":
        raise ConfigError(
            "training.parallel: fsdp keeps each matrix in shards, and optimizer.kind: muon needs "
            "it whole; use ddp, or adamw"
        )
    if place.parallel != "none" and config.training.layer_dropout is not None:
        raise ConfigError(
            f"training.layer_dropout: goes with one process, and {place.world_size} were started; "
            "start one, or leave it out"
        )


def training_place(config: TrainingConfig) -> Place:
    """Where a verb trains that does so in one process.

    Raises:
        ConfigError: If several are asked for.
        ResourceError: If there is no such device.
    """
    if config.parallel in ("ddp", "fsdp"):
        raise ConfigError(
            f"training.parallel: {config.parallel} is for pretrain and instruct; this verb runs in "
            "one process, leave it out"
        )
    place = choose_place(config.device)
    if place.world_size > 1:
        raise ConfigError(
            f"training: runs in one process, and {place.world_size} were started; start one"
        )
    return place


def cache_folder() -> Path:
    """Where corpora given inline are prepared, once each."""
    return Path(os.environ.get("SAMARA_CACHE", "~/.cache/samara")).expanduser() / "corpora"


def open_tokenizer(config: PretrainConfig, corpus: PreparedCorpus, run: RunFolder) -> TextTokenizer:
    """The corpus' tokenizer, in the run folder with special tokens where the objective needs any.

    It is made anew each time: the same files come out, and none is half-written.
    """
    if isinstance(config.objective, CausalObjective):
        return TextTokenizer.load(corpus.tokenizer_folder)
    folder = run.path / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    return objective_tokenizer(
        config.objective,
        corpus.tokenizer_folder,
        folder,
        sequence_length=config.data.sequence_length,
    )


def predict_memory(
    config: PretrainConfig | InstructConfig,
    origin: Origin,
    place: Place,
    *,
    micro_batch_size: int,
) -> int:
    """Peak bytes that training will take here, in the worst pass if layers are dropped.

    Under ``fsdp`` the weights and AdamW's moments, 12 bytes a parameter, count by this process's
    share; the gradients count in full.
    """
    rates = config.training.layer_rates(origin.design.num_hidden_layers)
    elsewhere = 0
    if place.parallel == "fsdp":
        all_of_it = 12 * budget(origin.design).parameters.total
        elsewhere = all_of_it - all_of_it // place.world_size
    predicted = training_memory(
        origin.design,
        micro_batch_size=micro_batch_size,
        sequence_length=config.data.sequence_length,
        precision=config.training.precision,
        optimizer=config.optimizer.kind,
        activation_checkpointing=config.training.activation_checkpointing,
        accumulates=micro_batch_size * place.world_size < config.training.batch_size,
        device="cuda" if place.device.type == "cuda" else "cpu",
        active_layers=None if rates is None else rates.active_layers,
    )
    return predicted.total - elsewhere


class Job:
    """One run of the verb, from a fresh or interrupted folder to its summary.

    Attributes:
        first_batch: Batches of the data's order that were read before this run.
    """

    first_batch = 0

    def __init__(
        self,
        config: PretrainConfig | InstructConfig,
        run: RunFolder,
        corpus: TrainingData,
        origin: Origin,
        place: Place,
        micro_batch_size: int,
    ) -> None:
        self.config, self.run, self.corpus, self.origin = config, run, corpus, origin
        self.place, self.micro_batch_size = place, micro_batch_size
        self.num_steps = config.training.num_steps(config.data.sequence_length)
        self.budget: Budget = budget(origin.design)
        self.layer_rates = config.training.layer_rates(origin.design.num_hidden_layers)
        self.profile: DeviceProfile = device_profile(
            config.logging.device_profile, device=place.device.type
        )
        self.peak_flops = place.world_size * peak_flops(
            self.profile, config.training.precision, trained=run.path.name
        )
        self.memory = PeakMemory(place.device)
        self.model = self._build_model()
        self.workers = Workers(self.model, place)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.state = TrainingState()
        self.checkpoints = Checkpoints(
            run.path / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            identity={"corpus": corpus.hash, **origin.parents},
        )
        self.averages = Averages(run.path / "averages", self._average_steps())
        self.training_set = corpus.training_rows()
        self.validation_set = corpus.validation_rows()

    def _build_model(self) -> LanguageModel:
        torch.manual_seed(self.config.seed)
        model = self.origin.build(self.corpus.objective, self.corpus.tokenizer)
        set_activation_checkpointing(model, self.config.training.activation_checkpointing)
        if self.place.parallel != "fsdp":  # which moves a layer at a time, and its shard stays
            model.to(self.place.device)  # type: ignore[arg-type] # transformers wraps it untyped
        if self.config.training.compile:
            compile_model(model)
        return model

    def _average_steps(self) -> tuple[int, ...]:
        settings = self.config.checkpoint
        if settings.average_last == 1:
            return ()
        assert settings.every_steps is not None
        return member_steps(
            num_steps=self.num_steps, every=settings.every_steps, count=settings.average_last
        )

    def resume(self) -> None:
        """Go back to the newest checkpoint, if there is one, and cut the log to it."""
        sweep(self.run.path)
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self.checkpoints.load(checkpoint, self.model, self.optimizer)
            self.state = checkpoint.state
        self.run.truncate_metrics(self.state.step)

    def train(self, *, until: int | None = None) -> None:
        """Run the loop to the last step, or to step ``until`` of the same course."""
        settings = self.config.training
        start, end = self.state.step, self.num_steps if until is None else until
        batches = training_batches(
            self.training_set,
            batch_size=settings.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.config.seed,
            start_step=self.first_batch + start,
            num_steps=end - start,
            rank=self.place.rank,
            world_size=self.place.world_size,
            num_workers=self.config.data.num_workers,
            pin_memory=self.place.device.type == "cuda",
        )
        label = f"train {self.run.path.name}"
        total = end * settings.batch_size * self.config.data.sequence_length
        with (
            StopSignal() as stop,
            open_sinks(self._sinks(), run=self.run, start_step=start) as sinks,
            dropping_layers(
                self.model,
                settings.layer_dropout,
                seed=self.config.seed,
                costs=self._layer_costs(),
            ) as around_pass,
            ProgressLine(label, total=total, unit="tokens") as line,
        ):
            train(
                self.model,
                objective=make_objective(self.corpus.objective, z_loss=settings.z_loss),
                optimizer=self.optimizer,
                learning_rate=self._learning_rate,
                batches=batches,
                state=self.state,
                num_steps=end,
                precision=settings.precision,
                clip_grad_norm=settings.clip_grad_norm,
                costs=self._costs(),
                hooks=self._hooks(line, sinks, around_pass),
                stop=stop,
                workers=self.workers,
            )
        if stop.number is not None and end < self.num_steps:  # caught in the last of these steps
            raise stopped(self.state, stop.number, saved=True)

    def _sinks(self) -> tuple[str, ...]:
        return self.config.logging.sinks if self.place.is_first else ()

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config.schedule,
            step=step,
            num_steps=self.num_steps,
            peak=self.config.optimizer.lr,
        )

    def _costs(self) -> Costs:
        """What a token costs; on average, if layers are dropped."""
        every_layer = (1,) * len(self.budget.layers)
        rates = self.layer_rates
        return self._layer_costs()(every_layer if rates is None else rates.keep)

    def _layer_costs(self) -> LayerCosts:
        return LayerCosts.of(
            self.budget,
            sequence_length=self.config.data.sequence_length,
            # Of a prefix LM the causal half too: what the prefix adds differs from row to row.
            masked=isinstance(self.corpus.objective, MaskedObjective),
            peak_flops=self.peak_flops,
        )

    def _hooks(
        self, line: ProgressLine, sinks: list[Sink], around_pass: AroundPass | None
    ) -> Hooks:
        return Hooks(
            around_pass=around_pass,
            on_step=_progress(line, self.state) if self.place.is_first else None,
            log=lambda record: self._log(record, sinks),
            log_every=self.config.logging.every_steps,
            evaluate=None if self.validation_set is None else self.evaluate,
            evaluate_every=self.config.training.evaluate_every_steps,
            save=self._save,
            save_every=self.config.checkpoint.every_steps,
            last_saved=self.checkpoints.newest,
            peak_memory=self.memory.peak,
        )

    def _log(self, record: Record, sinks: list[Sink]) -> None:
        self.run.append_metrics(record)
        for sink in sinks:
            sink.write(record)

    def evaluate(self) -> float:
        """Validation loss of the weights as they are."""
        assert self.validation_set is not None
        rows = self.validation_set

        def score(model: PreTrainedModel) -> float:
            return evaluate_loss(
                model,
                rows,
                batch_size=self.micro_batch_size,
                device=self.place.device,
                precision=self.config.training.precision,
                max_tokens=self.config.training.evaluate_max_tokens,
                rank=self.place.rank,
                world_size=self.place.world_size,
            ).loss

        with uncompiled(self.model), torch.no_grad():
            loss = self.workers.run(score)
        self.workers.put_away()
        return loss

    def _save(self, state: TrainingState) -> None:
        # The member first: a checkpoint at a step says that the step's member is there.
        self.averages.add(self.model, step=state.step)
        self.checkpoints.save(self.model, self.optimizer, state)

    def finish(self, *, beside: Compute | None = None) -> None:
        """Average, export, and write what was spent; all processes call it, the first one writes.

        Args:
            beside: Compute of this run that is not in its state, as of trials that were dropped.
        """
        averaged = None
        if self._average_steps():
            self.averages.load_mean(self.model)
            averaged = None if self.validation_set is None else self.evaluate()
        weights = whole(named_weights(self.model)) if self.place.parallel == "fsdp" else None
        if not self.place.is_first:
            return
        export(self.model, self.corpus.tokenizer, self.run.path / "model", weights=weights)
        cost = estimated_cost(self.profile, seconds=self.state.seconds * self.place.world_size)
        own = Compute(
            tokens=self.state.tokens,
            flops=self.state.flops,
            seconds=self.state.seconds,
            joules=cost.joules,
        )
        spent = own if beside is None else own + beside
        parents = {"data": self.corpus.hash, **self.origin.parents}
        self.run.write_lineage(
            Lineage(parents=parents, spent=spent, inherited=self.origin.inherited)
        )
        write_json(self.run.path / "summary.json", self._summary(averaged))

    def _summary(self, averaged: float | None) -> dict[str, Any]:
        state, costs, parameters = self.state, self._costs(), self.budget.parameters
        cost = estimated_cost(self.profile, seconds=state.seconds * self.place.world_size)
        speed = state.tokens / state.seconds
        assert costs.peak_flops is not None
        return {
            "schema": 1,
            "objective": self.corpus.objective.kind,
            "parameters": parameters.total,
            "embedding_parameters": parameters.embedding,
            "flops_per_token": costs.flops_per_token,
            "steps": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "seconds": state.seconds,
            "tokens_per_second": speed,
            "peak_memory_bytes": state.peak_memory_bytes,
            "mfu": state.useful_flops / state.seconds / costs.peak_flops,
            "train_loss": state.train_loss,
            "validation_loss": state.validation_loss if averaged is None else averaged,
            "validation_loss_last": state.validation_loss,
            "validation_loss_averaged": averaged,
            "averaged_steps": list(self._average_steps()),
            "energy_kwh": cost.energy_kwh,
            "cost": cost.money,
            "currency": cost.currency,
            "device": self.place.device.type,
            "processes": self.place.world_size,
            "device_profile": self.profile.name,
            "corpus_hash": self.corpus.hash,
            "weights_hash": hash_weights(self.run.path / "model"),
            "design": self.origin.design.model_dump(mode="json"),
            "layer_dropout": None if self.layer_rates is None else asdict(self.layer_rates),
        }


def export(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder with its tokenizer, complete or absent.

    Args:
        model: What to write.
        tokenizer: Written beside it.
        folder: Where.
        weights: As in :func:`samara.model.loading.save_model`.

    Raises:
        ResourceError: If the disk is full.
    """
    with new_folder(folder) as staging:
        with disk_errors():
            save_model(model, staging, weights=weights)
        for name in FOLDER_FILES:
            if (tokenizer.folder / name).exists():
                shutil.copyfile(tokenizer.folder / name, staging / name)


def _progress(
    line: ProgressLine, start: TrainingState
) -> Callable[[TrainingState, float, Update], None]:
    """Show loss, speed since the start of this process, and learning rate."""
    tokens, seconds = start.tokens, start.seconds

    def show(state: TrainingState, lr: float, update: Update) -> None:
        passed = state.seconds - seconds
        speed = f"{(state.tokens - tokens) / passed:,.0f}" if passed > 0 else "…"
        line.update(state.tokens, loss=f"{update.nll:.3f}", lr=f"{lr:.2e}", **{"tok/s": speed})

    return show
