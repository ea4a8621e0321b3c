"""The client's side of a round: take the global values, train on its own rows, send what is shared.

One model in memory plays every client: what a client is lies in its rows, in what it keeps
(:class:`~samara.federated.messages.ClientState`) and in random numbers that depend on seed, client
and round alone. The loop is that of all training (:mod:`samara.train.loop`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from samara.adapt.tasks import mean_loss, predict
from samara.data.draws import Draws, Purpose
from samara.data.loader import training_batches
from samara.data.rows import Batch
from samara.errors import CheckpointError, NonFiniteLossError
from samara.federated.accounting import Budget, make_budget
from samara.federated.aggregation import HEAD, Layout, Tensor
from samara.federated.config import FederateConfig
from samara.federated.importance import ImportanceMeter
from samara.federated.messages import ClientState, Instruction, Reply, hash_of, is_sound
from samara.federated.mixed_ranks import truncate, widen
from samara.federated.payload import Payload
from samara.federated.proximal import ProximalTerm
from samara.federated.randomness import Secrets
from samara.federated.record_privacy import (
    PrivateOptimizer,
    SumPerRow,
    poisson_batches,
    row_gradients,
    training_key,
)
from samara.federated.server_state import Scores
from samara.federated.sharing import SharingState, update_importance, update_personal
from samara.federated.store import to_numpy
from samara.federated.task_data import ChosenRows, FederatedData
from samara.train.checkpoint import TrainingState
from samara.train.layer_dropout import LayerDropout
from samara.train.layer_stack import find_layers
from samara.train.loop import Costs, Hooks, train
from samara.train.objective import Objective
from samara.train.optim import Updater


@dataclass(frozen=True, kw_only=True)
class PassFlops:
    """FLOPs per token of a pass with k active layers: fixed + k · per layer."""

    fixed: float = 0.0
    per_layer: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Tools:
    """What the loop trains with."""

    objective: Objective
    optimizer: Updater
    batches: Iterator[list[Batch]]


class Trainer:
    """Plays the clients.

    Attributes:
        payload: What is trained.
        model: That it is of.
        layout: Its tensors.
        num_layers: Layers of the model.
    """

    def __init__(
        self,
        config: FederateConfig,
        payload: Payload,
        *,
        data: FederatedData,
        objective: Objective,
        flops: PassFlops = PassFlops(),
        secrets: Secrets | None = None,
    ) -> None:
        """Take a model over.

        Args:
            config: The recipe.
            payload: What is trained, in a model on its device.
            data: Of all clients.
            objective: The loss of the task.
            flops: Of a pass, for the record.
            secrets: The clients' keys, where their rows are protected.
        """
        self.secrets = secrets
        self.config, self.payload, self.data = config, payload, data
        self.model, self._trained = payload.model, payload.parameters
        self.objective, self.flops = objective, flops
        self.layout = make_layout(payload)
        self.num_layers = self.layout.num_layers

    def tensors(self) -> dict[str, Tensor]:
        """The trained values as they are in the model."""
        return to_numpy(self._trained)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put trained values into the model."""
        self.payload.load(tensors)

    def local_values(self, tensors: Mapping[str, Tensor], state: ClientState) -> dict[str, Tensor]:
        """The values that a client works with: the global ones, and its own where it keeps any.

        Raises:
            CheckpointError: If what it keeps is no part of this model.
        """
        for name, value in state.personal.items():
            wanted = self.layout.shapes.get(name)
            if value.shape != wanted:
                here = f"{wanted}" if wanted else "not trained"
                raise CheckpointError(
                    f"what a client keeps does not fit this run: {name} is {value.shape}, here "
                    f"{here}; take it from a run with the same method and lora settings"
                )
        return {**tensors, **state.personal}

    # --- training ---------------------------------------------------------------------------------

    def train(
        self, instruction: Instruction, tensors: Mapping[str, Tensor], state: ClientState
    ) -> tuple[Reply, ClientState]:
        """One client's part in a round.

        Args:
            instruction: Of the server.
            tensors: The global values, or the part of them that the instruction is about.
            state: What the client keeps.

        Returns:
            The reply, and what the client keeps from now on. A training that failed is a reply too,
            without tensors, and changes nothing.

        Raises:
            CheckpointError: If what the client keeps is no part of this model.
        """
        started = time.process_time()
        rows = self.data.client(instruction.client)
        key = None
        if self.config.privacy.records is not None:
            key = self._charge(instruction, tensors, state)
            if key is None:
                message = "its privacy budget would be passed"
                return self._failed(instruction, "error", message, []), state
        if instruction.lora_rank is not None:
            tensors = widen(tensors, self.layout.shapes)
        self.load(self.local_values(tensors, state))
        before = self.score(rows.validation)
        meter = ImportanceMeter(self.config.sharing.importance, self._groups())
        active: list[int] = []
        progress = TrainingState()
        try:
            self._run_loop(instruction, rows.train, meter, active, progress, key)
        except NonFiniteLossError as error:
            return self._failed(instruction, "not_finite", str(error), active), state
        except (torch.OutOfMemoryError, MemoryError) as error:
            return self._failed(instruction, "out_of_memory", str(error), active), state
        trained = self.tensors()
        if not is_sound(trained):
            return self._failed(instruction, "not_finite", "a weight is not finite", active), state
        after = self.score(rows.validation)
        if not math.isfinite(after.loss - before.loss):
            message = f"validation loss {before.loss:g} before and {after.loss:g} after"
            return self._failed(instruction, "not_finite", message, active), state
        sharing = self._share(instruction, state.sharing, meter)
        kept = {n: v for n, v in trained.items() if self._is_kept(self.layout.groups[n], sharing)}
        reply = Reply(
            round=instruction.round,
            client=instruction.client,
            num_examples=len(rows.train),
            tensors=self._to_send(instruction, trained, sharing, meter),
            active_layers=tuple(active),
            loss_before=before.loss,
            loss_after=after.loss,
            accuracy_before=before.accuracy,
            accuracy_after=after.accuracy,
            sharing=sharing,
            personal_hash=hash_of(kept) if kept else None,
            tokens=progress.tokens,
            flops=progress.flops,
            cpu_seconds=time.process_time() - started,
        )
        return reply, ClientState(sharing=sharing, personal=kept)

    def _charge(
        self, instruction: Instruction, tensors: Mapping[str, Tensor], state: ClientState
    ) -> bytes | None:
        """Charge the client's budget for this training: its key, or None if that would pass it."""
        assert self.secrets is not None
        client = instruction.client
        own = [state.personal[name] for name in sorted(state.personal)]
        key = training_key(self.secrets.client(client), instruction, tensors, own)
        fits = self.secrets.charge(client, key, self.record_budget(client))
        return key if fits else None

    def record_budget(self, client: int) -> Budget:
        """What a client has to give of its rows' privacy."""
        promise, local = self.config.privacy.records, self.config.local
        assert promise is not None
        return make_budget(
            promise,
            rate=min(1.0, local.batch_size / len(self.data.client(client).train)),
            steps=local.steps,
            rounds=self.config.server.rounds,
            key="privacy.records",
        )

    def _run_loop(
        self,
        instruction: Instruction,
        rows: ChosenRows,
        meter: ImportanceMeter,
        active: list[int],
        progress: TrainingState,
        key: bytes | None,
    ) -> None:
        local = self.config.local
        client, round = instruction.client, instruction.round
        torch.manual_seed(_seed(self.config.seed, client, round + 1))
        self.payload.clear()  # of a client that ran out of memory in the middle of a pass
        pull = ProximalTerm(local.proximal, self._trained.values())
        with ExitStack() as stack:
            stack.enter_context(self.only_upper(instruction.trained_layers))
            gates = self._gates(instruction, stack)
            tools = self._tools(instruction, rows, stack, key)

            @contextmanager
            def around(step: int, number: int) -> Iterator[Costs]:
                assert number == 0, "a step is one pass"
                with gates(step) as runs:
                    count = sum(runs)
                    paid = instruction.trained_layers or count
                    flops = self.flops.fixed + paid * self.flops.per_layer
                    yield Costs(flops_per_token=flops, useful_flops_per_token=flops)
                active.append(count)
                meter.add(runs)
                pull.add()

            meter.start()
            train(
                self.model,
                objective=tools.objective,
                optimizer=tools.optimizer,
                learning_rate=lambda _: local.optimizer.lr,
                batches=tools.batches,
                state=progress,
                num_steps=local.steps,
                precision=local.precision,
                clip_grad_norm=local.clip_grad_norm,
                hooks=Hooks(around_pass=around, log_every=None),
            )
            meter.finish()

    def _tools(
        self, instruction: Instruction, rows: ChosenRows, stack: ExitStack, key: bytes | None
    ) -> _Tools:
        """Batches in their order and a plain optimizer, or those that protect the rows."""
        local = self.config.local
        if key is None:
            batches = training_batches(
                rows,
                batch_size=local.batch_size,
                micro_batch_size=local.batch_size,
                seed=_seed(self.config.seed, instruction.client, 0),
                start_step=instruction.round * local.steps,
                num_steps=local.steps,
            )
            return _Tools(
                objective=self.objective,
                optimizer=self.payload.optimizer(),
                batches=batches,
            )
        promise, budget = self.config.privacy.records, self.record_budget(instruction.client)
        assert promise is not None
        stack.enter_context(row_gradients(self.model))
        return _Tools(
            objective=SumPerRow(self.objective),
            optimizer=PrivateOptimizer(
                self.model,
                local.optimizer,
                budget=budget,
                clip=promise.clip,
                batch_size=local.batch_size,
                key=key,
            ),
            batches=poisson_batches(rows, rate=budget.rate, steps=local.steps, key=key),
        )

    def _gates(
        self, instruction: Instruction, stack: ExitStack
    ) -> Callable[[int], AbstractContextManager[tuple[bool, ...]]]:
        """What holds the gates of a step; at rate 0 nothing is attached and all layers run."""
        if instruction.rate == 0:
            return lambda _: _nothing_dropped(self.num_layers)
        settings = self.config.layer_dropout.model_copy(
            update={"rate": instruction.rate, "shape": instruction.shape}
        )
        dropout = stack.enter_context(
            LayerDropout(self.model, settings, seed=self.config.seed, node=instruction.client)
        )
        return lambda step: dropout.hold(batch=step, round=instruction.round)

    @contextmanager
    def only_upper(self, count: int | None) -> Iterator[None]:
        """Freeze what is trained below the uppermost layers; None: nothing."""
        lowest = 0 if count is None else self.num_layers - count
        groups = self.layout.groups
        frozen = [
            parameter
            for name, parameter in self._trained.items()
            if groups[name] != HEAD and int(groups[name]) < lowest
        ]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _groups(self) -> list[dict[str, nn.Parameter]]:
        """Per layer its trained parameters."""
        return [
            {name: self._trained[name] for name in self.layout.names(layer)}
            for layer in range(self.num_layers)
        ]

    # --- what is kept and what is sent ------------------------------------------------------------

    def _share(
        self, instruction: Instruction, before: SharingState, meter: ImportanceMeter
    ) -> SharingState:
        """The client's choice of layers; without layer sharing it keeps none."""
        settings = self.config.sharing
        if self.config.method != "droppeft":
            return SharingState()
        importance = update_importance(
            meter.sums, meter.active_batches, before=before.importance, memory=settings.memory
        )
        return update_personal(
            before, importance, population=instruction.population, config=settings
        )

    def _is_kept(self, group: str, sharing: SharingState) -> bool:
        if group == HEAD:
            return self.config.method == "droppeft" and self.config.sharing.head == "personal"
        return int(group) in sharing.personal

    def _to_send(
        self,
        instruction: Instruction,
        trained: Mapping[str, Tensor],
        sharing: SharingState,
        meter: ImportanceMeter,
    ) -> dict[str, Tensor]:
        """What is not kept, and what the server insists on; of it what had a chance to change."""
        chosen: dict[str, Tensor] = {}
        trained_layers = instruction.trained_layers or self.num_layers
        for name, value in trained.items():
            group = self.layout.groups[name]
            wanted = not self._is_kept(group, sharing)
            if group != HEAD:
                wanted |= int(group) in instruction.must_share
                wanted &= meter.active_batches[int(group)] > 0
                wanted &= int(group) >= self.num_layers - trained_layers
            if wanted:
                chosen[name] = value
        if instruction.lora_rank is not None:
            return truncate(chosen, instruction.lora_rank)
        return chosen

    def _failed(
        self, instruction: Instruction, verdict: Any, message: str, active: list[int]
    ) -> Reply:
        return Reply(
            round=instruction.round,
            client=instruction.client,
            verdict=verdict,
            message=message.partition("\n")[0],
            active_layers=tuple(active),
        )

    # --- scores -----------------------------------------------------------------------------------

    def score(self, rows: ChosenRows) -> Scores:
        """Loss and accuracy of the values that are in the model; all layers run."""
        size, precision = self.config.server.evaluation_batch_size, self.config.local.precision
        if self.config.task.kind == "labels":
            logits_rn = predict(self.model, rows, batch_size=size, precision=precision)
            targets_r = torch.tensor(rows.targets)
            right = (logits_rn.argmax(dim=1) == targets_r).double().mean()
            return Scores(loss=float(cross_entropy(logits_rn, targets_r)), accuracy=float(right))
        loss = mean_loss(self.model, self.objective, rows, batch_size=size, precision=precision)
        return Scores(loss=loss)

    def score_values(self, tensors: Mapping[str, Tensor], rows: ChosenRows) -> Scores:
        """Put values into the model and score them."""
        self.load(tensors)
        return self.score(rows)


@contextmanager
def _nothing_dropped(num_layers: int) -> Iterator[tuple[bool, ...]]:
    yield (True,) * num_layers


def make_layout(payload: Payload) -> Layout:
    """Which trained tensor belongs to which layer."""
    layers = find_layers(payload.model).layers
    owner = {id(p): str(n) for n, layer in enumerate(layers) for p in layer.parameters()}
    return Layout(
        shapes={name: tuple(values.shape) for name, values in payload.parameters.items()},
        groups={name: owner.get(id(home), HEAD) for name, home in payload.homes.items()},
        num_layers=len(layers),
    )


def _seed(seed: int, client: int, number: int) -> int:
    """A seed of a client's own for its order of rows (number 0) and each round's dropout."""
    draws = Draws(seed=seed, purpose=Purpose.CLIENT_TRAINING, draw=number, row=client)
    return int(draws.integers(1, below=2**53)[0])
