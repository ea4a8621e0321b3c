"""The training loop: the only one.

One update, in this order: read the batch, forward and backward over its micro-batches, gradient
norm, clip, finite check, step; then log, evaluate, save, stop, each if due. Everything that happens
around an update is a function in :class:`Hooks`; what differs between verbs is what they put there.

The loss is the sum over all counted targets of a step divided by their number, counted over all
micro-batches of all processes before the first forward pass: 1 micro-batch of 8 rows equals 8 of 1,
on one process or on eight.

The finite check reads loss and gradient norm from the device before the weights are touched. That
is one synchronisation per update, and the only one: it costs the launch of the optimizer's few
fused kernels, and buys weights that a bad batch never reaches.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.errors import NonFiniteLossError, Stopped
from samara.train.checkpoint import TrainingState, Window
from samara.train.objective import Objective, count_targets
from samara.train.optim import Updater
from samara.train.parallel import Place, Precision, Workers, autocast
from samara.train.stop import StopSignal


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a token costs and what the device can do: the basis of the FLOPs and MFU in the log.

    Attributes:
        flops_per_token: Training FLOPs of the model's own work.
        useful_flops_per_token: Those that MFU counts (attention's causal half).
        peak_flops: FLOP/s of the device at this precision; None: no MFU.
    """

    flops_per_token: float = 0.0
    useful_flops_per_token: float = 0.0
    peak_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update saw: sums over its targets, the norm of its gradient before clipping, and the
    FLOPs of its passes.
    """

    loss_sum: float
    nll_sum: float
    grad_norm: float
    num_targets: int
    tokens: int
    flops: float
    useful_flops: float

    @property
    def loss(self) -> float:
        """What is minimised, per target; 0 if nothing was counted."""
        return self.loss_sum / max(1, self.num_targets)

    @property
    def nll(self) -> float:
        """Negative log-likelihood per target; 0 if nothing was counted."""
        return self.nll_sum / max(1, self.num_targets)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


Record = dict[str, Any]

AroundPass = Callable[[int, int], AbstractContextManager[Costs]]
"""Entered around forward and backward of a micro-batch, with the step counted from 0 and the
micro-batch's number in it; gives what that pass costs."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What to do beside training, and after which steps. All are left out by default.

    Each ``…_every`` counts steps; the last step is due for each of them too. None: only the last.

    Attributes:
        around_pass: What holds during a pass, and its costs in place of the ones that hold always.
        on_step: Called after every update with the state, its learning rate and what it saw.
        log: Called with each record, training and validation.
        evaluate: Returns the validation loss.
        save: Makes the state safe, called where ``save_every`` says and before a stop.
        last_saved: Says where the newest saved state is, for the message of a failure.
        peak_memory: Returns the peak in bytes.
    """

    around_pass: AroundPass | None = None
    on_step: Callable[[TrainingState, float, Update], None] | None = None
    log: Callable[[Record], None] | None = None
    log_every: int | None = 1
    evaluate: Callable[[], float] | None = None
    evaluate_every: int | None = None
    save: Callable[[TrainingState], None] | None = None
    save_every: int | None = None
    last_saved: Callable[[], Path | None] | None = None
    peak_memory: Callable[[], int] | None = None


def train(
    model: PreTrainedModel,
    *,
    objective: Objective,
    optimizer: Updater,
    learning_rate: Callable[[int], float],
    batches: Iterable[Sequence[Batch]],
    state: TrainingState,
    num_steps: int,
    precision: Precision = "float32",
    clip_grad_norm: float | None = None,
    costs: Costs = Costs(),
    hooks: Hooks = Hooks(),
    stop: StopSignal | None = None,
    workers: Workers | None = None,
) -> None:
    """Train from ``state.step`` to ``num_steps``, moving ``state`` on.

    Args:
        model: Trained in place, on the device it is on.
        objective: From model and micro-batch to summed losses.
        optimizer: Updates the model's parameters.
        learning_rate: From the step, counted from 0, to the rate of its update.
        batches: One list of micro-batches per update, starting with that of ``state.step``.
        state: Where the run stands; changed in place.
        num_steps: Updates of the whole run.
        precision: ``bfloat16``: autocast in the forward pass.
        clip_grad_norm: Largest norm of all gradients together; larger ones are scaled down to it.
        costs: For FLOPs and MFU.
        hooks: What else to do, and when.
        stop: Entered by the caller; a signal it caught ends training after the update in hand.
        workers: The processes that train the model together; this one alone by default.

    Raises:
        NonFiniteLossError: If a loss or gradient norm is not finite. The weights are as they were
            before that update; its log record is written.
        Stopped: If ``stop`` caught a signal; the state is saved first.
    """
    model.train()
    workers = workers or Workers(model, Place(device=model.device))
    watch = _Watch(state)
    for micro_batches in batches:
        lr = learning_rate(state.step)
        step = _Step(
            micro_batches=micro_batches,
            precision=precision,
            clip_grad_norm=clip_grad_norm,
            around=_in_step(state.step, hooks, costs),
        )
        num_targets, agreed = workers.agree(
            count_targets(micro_batches), stop.number if stop is not None else None
        )
        update = _gradients(workers, model.device, objective, optimizer, step, num_targets)
        _count(state, update)
        if not update.is_finite:
            optimizer.zero_grad()
            watch.read()
            _log(state, update, lr, costs, hooks)
            raise _non_finite(state, update, lr, hooks)
        optimizer.set_lr(lr)
        optimizer.step()
        optimizer.zero_grad()

        last = state.step == num_steps
        if hooks.on_step is not None:
            hooks.on_step(state, lr, update)
        with watch.paused():
            if _is_due(hooks.log_every, state.step, last=last):
                _log(state, update, lr, costs, hooks)
            if hooks.evaluate is not None and _is_due(hooks.evaluate_every, state.step, last=last):
                _evaluate(model, state, hooks.evaluate, hooks)
            caught = agreed  # of several processes: what all of them know of
            if stop is not None and workers.world_size == 1:
                caught = stop.number
            due = _is_due(hooks.save_every, state.step, last=last)
            if hooks.save is not None and (due or caught is not None):
                hooks.save(state)
        if caught is not None and not last:
            raise stopped(state, caught, saved=hooks.save is not None)
    assert state.step == num_steps, f"batches ended at step {state.step} of {num_steps}"


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One update's batch, and how its passes are done."""

    micro_batches: Sequence[Batch]
    precision: Precision
    clip_grad_norm: float | None
    around: Callable[[int], AbstractContextManager[Costs]]


def _gradients(
    workers: Workers,
    device: torch.device,
    objective: Objective,
    optimizer: Updater,
    step: _Step,
    num_targets: int,
) -> Update:
    """Leave the clipped gradient of the mean loss of the step, and read what it was made from."""
    # A batch of padding alone: loss and gradients are 0. The wrappers of several processes take the
    # mean over these; dividing by the share of one makes it the sum.
    divisor = max(1, num_targets) / workers.world_size
    sums: list[Tensor] = []
    tokens, flops, useful_flops = 0, 0.0, 0.0
    for number, batch in enumerate(step.micro_batches):
        on_device = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
        is_last = number == len(step.micro_batches) - 1

        def work(model: PreTrainedModel, batch: Batch = on_device) -> tuple[Tensor, Tensor]:
            result = objective(model, batch)
            return result.loss, result.nll

        with step.around(number) as costs, workers.passing(is_last=is_last):
            with autocast(device, step.precision):
                loss, nll = workers.run(work)
            torch.autograd.backward(loss / divisor)
        tokens += batch["input_ids"].numel()
        flops += batch["input_ids"].numel() * costs.flops_per_token
        useful_flops += batch["input_ids"].numel() * costs.useful_flops_per_token
        sums.append(torch.stack([loss.detach(), nll.detach()]))
    parameters = optimizer.parameters
    norm = workers.norm(parameters)
    if step.clip_grad_norm is not None:
        clip_grads_with_norm_(parameters, step.clip_grad_norm, norm)
    total = workers.sum(torch.stack(sums).sum(dim=0))
    loss_sum, nll_sum, grad_norm = torch.cat([total, norm.to(total).reshape(1)]).tolist()
    return Update(
        loss_sum=loss_sum,
        nll_sum=nll_sum,
        grad_norm=grad_norm,
        num_targets=num_targets,
        # Every process has as many rows.
        tokens=tokens * workers.world_size,
        flops=flops * workers.world_size,
        useful_flops=useful_flops * workers.world_size,
    )


def _in_step(
    step: int, hooks: Hooks, costs: Costs
) -> Callable[[int], AbstractContextManager[Costs]]:
    """What is entered around each micro-batch of a step."""
    around_pass = hooks.around_pass
    if around_pass is None:
        return lambda _: nullcontext(costs)
    return lambda number: around_pass(step, number)


def _count(state: TrainingState, update: Update) -> None:
    state.step += 1
    state.tokens += update.tokens
    state.flops += update.flops
    state.useful_flops += update.useful_flops
    state.window.nll_sum += update.nll_sum
    state.window.num_targets += update.num_targets
    state.window.tokens += update.tokens
    state.window.useful_flops += update.useful_flops


def _is_due(every: int | None, step: int, *, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def _log(state: TrainingState, update: Update, lr: float, costs: Costs, hooks: Hooks) -> None:
    """Write the record of the steps since the last one, and start the next window."""
    window = state.window
    state.window = Window()
    state.train_loss = window.nll_sum / max(1, window.num_targets)
    speed, mfu = None, None
    if window.seconds > 0:
        speed = window.tokens / window.seconds
        if costs.peak_flops is not None:
            mfu = window.useful_flops / window.seconds / costs.peak_flops
    if hooks.peak_memory is not None:
        state.peak_memory_bytes = max(state.peak_memory_bytes, hooks.peak_memory())
    if hooks.log is not None:
        hooks.log(
            {
                "step": state.step,
                "tokens": state.tokens,
                "flops": state.flops,
                "loss": state.train_loss,
                "lr": lr,
                "grad_norm": update.grad_norm,
                "tokens_per_second": speed,
                "mfu": mfu,
                "memory_bytes": state.peak_memory_bytes,
                "seconds": state.seconds,
            }
        )


def _evaluate(
    model: PreTrainedModel, state: TrainingState, evaluate: Callable[[], float], hooks: Hooks
) -> None:
    state.validation_loss = evaluate()
    model.train()
    if hooks.log is not None:
        hooks.log(
            {
                "step": state.step,
                "tokens": state.tokens,
                "flops": state.flops,
                "validation_loss": state.validation_loss,
            }
        )


def _non_finite(
    state: TrainingState, update: Update, lr: float, hooks: Hooks
) -> NonFiniteLossError:
    what, value = ("loss", update.loss)
    if math.isfinite(update.loss):
        what, value = ("gradient norm", update.grad_norm)
    saved = hooks.last_saved() if hooks.last_saved is not None else None
    where = f"the last checkpoint is {saved}" if saved else "no checkpoint was saved yet"
    return NonFiniteLossError(
        f"step {state.step}: the {what} is {value} at learning rate {lr:.3g}; this step was not "
        f"applied, {where}; lower optimizer.lr, or lengthen schedule.warmup_steps"
    )


def stopped(state: TrainingState, number: int, *, saved: bool) -> Stopped:
    """What to raise after a signal.

    Args:
        state: Where the run stands.
        number: The signal's.
        saved: Whether running it again goes on from there.
    """
    name = signal.Signals(number).name
    then = "saved; run the same command to go on" if saved else "nothing is saved"
    return Stopped(f"stopped by {name} after step {state.step}; {then}", signal_number=number)


class _Watch:
    """Adds the time of training to the state; evaluation, logging and saving are left out."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._since = time.perf_counter()

    def read(self) -> None:
        """Add the time since the last reading."""
        now = time.perf_counter()
        self._state.seconds += now - self._since
        self._state.window.seconds += now - self._since
        self._since = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        self.read()
        yield
        self._since = time.perf_counter()
