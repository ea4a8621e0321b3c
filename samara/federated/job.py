"""Everything a federated run is made of: model, data, devices, both sides, and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from samara.adapt.data import TaskRows
from samara.adapt.methods import SUPPORT
from samara.adapt.models import TaskModel, load_task_model
from samara.adapt.tasks import LabelLoss, causal_objective
from samara.data.rows import Batch
from samara.errors import ConfigError
from samara.federated.accounting import require_round
from samara.federated.calibration import calibrate, measure_flops
from samara.federated.client import Trainer
from samara.federated.config import FederateConfig, GivenClock
from samara.federated.configurator import make_arms
from samara.federated.devices import CostModel, assign_devices, by_trained_layers
from samara.federated.driver import unprotected
from samara.federated.inputs import with_files
from samara.federated.payload import make_payload
from samara.federated.protection import Protection
from samara.federated.randomness import Secrets, require_packages
from samara.federated.results import results
from samara.federated.run_rows import RunRows, read_run_rows
from samara.federated.server import Server
from samara.federated.server_state import Scores
from samara.federated.store import Store
from samara.federated.task_data import FederatedData
from samara.progress import say
from samara.registry.records import Evaluation
from samara.runs import (
    Compute,
    Lineage,
    RunFolder,
    hash_file,
    hash_weights,
    read_json,
    write_json,
)
from samara.sparse.delta_records import Provenance, Train
from samara.sparse.support import Support
from samara.train.layer_dropout import LayerDropout
from samara.train.layer_rates import LayerDropoutConfig
from samara.train.objective import Objective
from samara.train.parallel import choose_place

CLOCK, SHARING, RESULTS = "clock.json", "sharing.json", "results.json"
FIT_WANTED = 0.99
"""R² of the fitted time below which the user is told."""


class Job:
    """Everything a run is made of, whoever drives it."""

    def __init__(self, config: FederateConfig, run: RunFolder) -> None:
        config = with_files(config, run)
        self.config, self.run = config, run
        require_packages(config.privacy)
        read = read_run_rows(config)
        secrets = Secrets(run.path, config.privacy, seed=config.seed)
        self.trainer, loaded = make_trainer(config, read, run=run, secrets=secrets)
        self.folder = loaded.folder
        self.parents = self._parents(read.rows, loaded)
        batch = self._first_batch()
        self.trainer.flops = measure_flops(self.trainer, batch, drops=self._drops)
        costs = self._costs(batch)
        protection = None
        here = self.trainer.data.parts  # of a deployment's server: none
        if config.privacy.records is not None and here:
            budgets = (self.trainer.record_budget(client) for client in here)
            require_round(budgets, key="privacy.records")
        if config.privacy.is_on:
            protection = Protection(
                config,
                layout=self.trainer.layout,
                num_clients=self.trainer.data.num_clients,
                secrets=secrets,
            )
        self.server = Server(
            config,
            layout=self.trainer.layout,
            devices=assign_devices(
                config.clients.devices, num_clients=self.trainer.data.num_clients, seed=config.seed
            ),
            costs=costs,
            arm_layers=self._arm_layers(),
            tensors=self.trainer.tensors(),
            protection=protection,
        )
        start = config.clients.personal_from
        self.store = Store(
            run.path,
            identity=self._identity(),
            start=None if start is None else Path(start).expanduser(),
        )
        self._check_start()

    @property
    def _drops(self) -> bool:
        """Whether batches differ in the layers that cost something."""
        return self.config.method in ("droppeft", "static_stld", "fedadapter")

    def _parents(self, rows: TaskRows, loaded: TaskModel) -> dict[str, str]:
        return {
            "init_from": hash_weights(loaded.folder),
            "data": rows.hash,
            "test": hash_file(Path(self.config.task.data).expanduser()),
        }

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint has to be of, to go on from it here."""
        found: dict[str, Any] = {"method": self.config.method, "payload": self.config.payload}
        found |= self.parents
        if self.server.protection is not None:
            found["privacy"] = self.server.protection.kinds()
        if self.config.payload == "sparse":
            found["support"] = Support.load(self.run.path / SUPPORT).support_id
        return found

    def _check_start(self) -> None:
        """Check the layers that clients begin with, before anything else happens.

        Raises:
            ConfigError: If the folder is missing.
            CheckpointError: If a client's is damaged, or of another model.
        """
        if self.store.start is None:
            return
        if not self.store.start.is_dir():
            raise ConfigError(
                f"clients.personal_from: no folder {self.store.start}; write one with "
                "`samara personal export RUN FOLDER`"
            )
        for client in range(self.trainer.data.num_clients):
            self.trainer.local_values({}, self.store.load_client(client))

    def _first_batch(self) -> Batch:
        """Of the server's rows, since the clients' may be elsewhere."""
        rows = self.trainer.data.validation
        size = self.config.local.batch_size
        numbers = [number % len(rows) for number in range(size)]
        return {name: t.to(self.trainer.model.device) for name, t in rows.batch(numbers).items()}

    def _costs(self, batch: Batch) -> CostModel:
        """What a batch costs: given, or measured once and kept for when the run goes on."""
        path, clock = self.run.path / CLOCK, self.config.clock
        if isinstance(clock, GivenClock):
            costs = CostModel(
                seconds_fixed=clock.seconds_fixed,
                seconds_per_layer=clock.seconds_per_layer,
                bytes_fixed=clock.bytes_fixed,
                bytes_per_layer=clock.bytes_per_layer,
                r_squared=None,
                basis="modelled",
                source=clock.source,
            )
            if self.config.method == "fedadapter":
                costs = by_trained_layers(costs, self.trainer.num_layers)
        elif path.exists():
            return CostModel.from_dict(read_json(path))
        else:
            costs = calibrate(self.trainer, batch, drops=self._drops, repetitions=clock.repetitions)
            if costs.r_squared is not None and costs.r_squared < FIT_WANTED:
                say(
                    f"clock: the time of a batch is not quite linear in its layers here (R² "
                    f"{costs.r_squared:.3f}); raise clock.repetitions, or free the machine"
                )
        write_json(path, costs.to_dict())
        return costs

    def _arm_layers(self) -> list[int]:
        """The most layers that a batch runs, per arm; of another method, one number.

        Raises:
            ConfigError: If a rate does not fit the number of layers.
        """
        config, num_layers = self.config, self.trainer.num_layers
        if config.method == "static_stld":
            return [self._most_layers(config.layer_dropout)]
        if config.method != "droppeft":
            return [num_layers]
        found = []
        for arm in make_arms(config.configurator):
            if arm.rate == 0:
                found.append(num_layers)
                continue
            update = {"rate": arm.rate, "shape": arm.shape}
            try:
                found.append(self._most_layers(config.layer_dropout.model_copy(update=update)))
            except ConfigError as error:
                raise ConfigError(f"configurator.rates: arm {arm.name}: {error}") from error
        return found

    def _most_layers(self, settings: LayerDropoutConfig) -> int:
        """The most layers that a batch runs; attached for once, so that what does not fit shows."""
        with LayerDropout(self.trainer.model, settings, seed=self.config.seed) as dropout:
            return dropout.rates.budget or self.trainer.num_layers

    def _records(self, scores: Scores) -> Provenance:
        """What a delta file says about where it came from."""
        config = self.config
        found = {"loss": scores.loss, "accuracy": scores.accuracy}
        return Provenance(
            model_id=self.folder.name,
            config_sha256=hash_file(self.folder / "config.json"),
            train=Train(
                data_sha256=self.parents["data"],
                recipe=config.model_dump(mode="json"),
                seed=config.seed,
            ),
            eval=[
                Evaluation(
                    task=config.task.name,
                    metric=metric,
                    value=value,
                    n=len(self.trainer.data.test),
                )
                for metric, value in found.items()
                if value is not None
            ],
        )

    # --- the end ----------------------------------------------------------------------------------

    def finish(self, clients: Sequence[Mapping[str, Any]]) -> None:
        """Score, export, and write what it cost.

        Args:
            clients: Scores of each; see :meth:`samara.federated.driver.Driver.score_clients`.
        """
        server, trainer = self.server, self.trainer
        state = server.state
        last = trainer.score_values(state.tensors, trainer.data.test)
        best = trainer.score_values(state.best_tensors, trainer.data.test)
        # The best values are in the model now.
        trainer.payload.export(self.run, self._records(best))
        write_json(
            self.run.path / SHARING, {**state.audit.to_dict(), "holders": state.audit.holders()}
        )
        totals = state.totals
        spent = Compute(
            tokens=int(totals["tokens"]),
            flops=totals["flops"],
            seconds=state.measured_cpu_seconds,
            joules=totals["modelled_joules"],
        )
        if self.config.privacy.client is not None:
            spent = self._expected_compute()
        self.run.write_lineage(Lineage(parents=self.parents, spent=spent))
        found = results(
            server, trainer, best=best, last=last, clients=clients, parents=self.parents
        )
        if server.protection is not None:
            write_json(unprotected(self.run).path / RESULTS, found)
            costs = server.expected_costs()
            found = server.protection.public_results(found, costs, state.round)
        write_json(self.run.path / RESULTS, found)

    def _expected_compute(self) -> Compute:
        """What the rounds cost on average over who may be drawn, at full depth.

        What they did cost would tell how many took part, which is not to be known.
        """
        trainer, local, rounds = self.trainer, self.config.local, self.server.state.round
        tokens = local.steps * local.batch_size * self.config.data.sequence_length
        tokens *= rounds * min(self.config.clients.per_round, trainer.data.num_clients)
        flops = trainer.flops.fixed + trainer.num_layers * trainer.flops.per_layer
        joules = rounds * self.server.expected_costs()["modelled_joules"]
        return Compute(tokens=tokens, flops=tokens * flops, seconds=0.0, joules=joules)


def make_trainer(
    config: FederateConfig,
    read: RunRows,
    *,
    run: RunFolder,
    secrets: Secrets,
    only_client: int | None = None,
) -> tuple[Trainer, TaskModel]:
    """Load the model, say what of it is trained, and give it the rows of this machine.

    Args:
        config: The recipe.
        read: The rows.
        run: Where a choice of weights is kept.
        secrets: The keys of the clients on this machine.
        only_client: All training rows are this client's; left out: they are dealt out.

    Raises:
        ConfigError: If settings, task and model do not fit each other.
        DataError: If the rows do not fit the task.
        CheckpointError: If the model is damaged.
    """
    # A delta is to the weights as they are stored; the values that change are float32 anyway.
    dtype = None if config.payload == "sparse" else torch.float32
    loaded = load_task_model(config.init_from, labels=read.labels, dtype=dtype, seed=config.seed)
    device: Any = choose_place(config.local.device).device
    loaded.model.to(device)
    data = FederatedData(
        config,
        read.rows,
        read.test,
        labels=read.labels,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        only_client=only_client,
    )
    objective: Objective = LabelLoss() if read.labels else causal_objective(loaded.model)
    payload = make_payload(
        config, loaded, run=run, rows=lambda: data.validation, objective=objective
    )
    return Trainer(config, payload, data=data, objective=objective, secrets=secrets), loaded
