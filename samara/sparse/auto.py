"""`auto`: short trials of several masks; the best by held-out loss is used.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): every mask is trained for a few steps
at a fraction of the density, the worse half is dropped, the rest is trained anew for twice as long,
until one is left. In the first round each mask is tried at several learning rates and keeps its
best. Each trial is undone exactly: weights and random state are as before, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from samara.data.rows import Batch
from samara.errors import ConfigError, NonFiniteLossError
from samara.sparse.attach import Attachment, GradientPath
from samara.sparse.calibration import Calibration
from samara.sparse.config import AutoConfig, ScoreName, SelectionConfig, SparseAdamWConfig
from samara.sparse.selection import select
from samara.sparse.support import Support
from samara.sparse.update import SparseAdamW
from samara.train.checkpoint import TrainingState
from samara.train.loop import train
from samara.train.objective import Objective
from samara.train.parallel import Precision


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """How a trial trains and is judged.

    Attributes:
        objective: From model and micro-batch to summed losses.
        batches: From a number of steps to their batches, the same ones each time.
        evaluate: The held-out loss of the model as it is.
        precision: Of the forward pass.
        clip_grad_norm: As in training.
        gradient_path: As in training.
    """

    objective: Objective
    batches: Callable[[int], Iterable[Sequence[Batch]]]
    evaluate: Callable[[], float]
    precision: Precision = "float32"
    clip_grad_norm: float | None = None
    gradient_path: GradientPath = "auto"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One line of the table: what was tried, for how long, and how it came out (inf: diverged)."""

    score: ScoreName
    lr: float
    steps: int
    entries: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The mask that won.

    Attributes:
        score: Its name.
        trials: All trials, in order.
    """

    score: ScoreName
    trials: tuple[Trial, ...]

    @property
    def table(self) -> list[dict[str, Any]]:
        """The trials as plain data."""
        return [asdict(trial) for trial in self.trials]


def choose_score(
    model: PreTrainedModel,
    config: AutoConfig,
    run: TrialRun,
    *,
    selection: SelectionConfig,
    optimizer: SparseAdamWConfig,
    calibration: Calibration,
    seed: int,
) -> Choice:
    """Try the masks of ``config`` on a model that is left as it was.

    Raises:
        ConfigError: If every trial diverged.
    """
    supports = {
        score: _trial_support(model, config, selection, calibration, score, seed)
        for score in config.scores
    }
    rates = {score: [f * optimizer.lr for f in config.lr_factors] for score in config.scores}
    trials: list[Trial] = []
    left, steps = list(supports), config.steps
    while len(left) > 1:
        best: dict[ScoreName, Trial] = {}
        for score in left:
            tried = [
                _try(model, run, supports[score], optimizer, score=score, lr=lr, steps=steps)
                for lr in rates[score]
            ]
            trials += tried
            best[score] = min(tried, key=lambda trial: trial.loss)
            rates[score] = [best[score].lr]
        ranked = sorted(left, key=lambda score: best[score].loss)
        if math.isinf(best[ranked[0]].loss):
            raise ConfigError("auto: every trial diverged; lower optimizer.lr or auto.lr_factors")
        left, steps = ranked[: len(left) // 2], 2 * steps
    return Choice(score=left[0], trials=tuple(trials))


def _trial_support(
    model: PreTrainedModel,
    config: AutoConfig,
    selection: SelectionConfig,
    calibration: Calibration,
    score: ScoreName,
    seed: int,
) -> Support:
    number = selection.num_entries
    wanted = selection.model_copy(
        update={
            "score": score,
            "exponents": None,
            "density": config.density_share * selection.share(),
            "num_entries": number and max(1, round(config.density_share * number)),
        }
    )
    return select(model, wanted, calibration, seed=seed).support


def _try(
    model: PreTrainedModel,
    run: TrialRun,
    support: Support,
    optimizer: SparseAdamWConfig,
    *,
    score: ScoreName,
    lr: float,
    steps: int,
) -> Trial:
    start = time.perf_counter()
    was_training = model.training
    with (
        _same_random_state(model.device),
        Attachment(model, support, gradient_path=run.gradient_path) as attachment,
    ):
        try:
            train(
                model,
                objective=run.objective,
                optimizer=SparseAdamW(attachment.selected, optimizer),
                learning_rate=lambda _: lr,
                batches=run.batches(steps),
                state=TrainingState(),
                num_steps=steps,
                precision=run.precision,
                clip_grad_norm=run.clip_grad_norm,
            )
            loss = run.evaluate()
        except NonFiniteLossError:
            loss = math.inf
        attachment.restore()
    model.train(was_training)
    return Trial(
        score=score,
        lr=lr,
        steps=steps,
        entries=support.num_entries,
        loss=loss if math.isfinite(loss) else math.inf,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Whatever random numbers are drawn inside, the state afterwards is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
