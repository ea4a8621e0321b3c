"""Learning rates: pure functions of the step, so that a resumed run needs no state for them.

The step counts from 0: the first update uses ``learning_rate(…, step=0)``, the last one
``step=num_steps - 1``.
"""

from __future__ import annotations

import math

from samara.train.config import Cosine, Schedule, WarmupStableDecay

DEFAULT_WARMUP_FRACTION = 0.02


def learning_rate(schedule: Schedule, *, step: int, num_steps: int, peak: float) -> float:
    """The learning rate of one update.

    Args:
        schedule: The shape.
        step: Updates done before this one, from 0.
        num_steps: Updates of the whole run.
        peak: The highest rate.

    Returns:
        The rate: linear from ``initial_lr`` to ``peak`` during warm-up, then what the shape says.
    """
    warmup = warmup_steps(schedule, num_steps=num_steps)
    if step < warmup:
        return schedule.initial_lr + step * (peak - schedule.initial_lr) / warmup
    if isinstance(schedule, Cosine):
        return _cosine(schedule, step=step, num_steps=num_steps, peak=peak, warmup=warmup)
    return _stable_decay(schedule, step=step, num_steps=num_steps, peak=peak, warmup=warmup)


def warmup_steps(schedule: Schedule, *, num_steps: int) -> int:
    """The number of warm-up updates; where the recipe names none, 2 % of all."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return round(DEFAULT_WARMUP_FRACTION * num_steps)


def _cosine(schedule: Cosine, *, step: int, num_steps: int, peak: float, warmup: int) -> float:
    """Half a cosine. The ``+ 1`` is OpenELM's (arXiv 2404.14619, reference code)."""
    floor = schedule.final_fraction * peak
    progress = (step - warmup) / (num_steps - warmup + 1)
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * progress))


def _stable_decay(
    schedule: WarmupStableDecay, *, step: int, num_steps: int, peak: float, warmup: int
) -> float:
    """Constant, then down to the floor, reached one step after the last update.

    ``sqrt`` is the ``1 - sqrt`` shape of arXiv 2405.18392: fast at first, slow at the end.
    """
    floor = schedule.final_fraction * peak
    decay = min(round(schedule.decay_fraction * num_steps), num_steps - warmup)
    done = step - (num_steps - decay)
    if done <= 0:
        return peak
    progress = min(done / decay, 1.0)
    fallen = math.sqrt(progress) if schedule.shape == "sqrt" else progress
    return floor + (peak - floor) * (1.0 - fallen)
