"""What candidates are ranked by, how well a ranking foretells later ones, and when it has settled.

All metrics are read off curves of losses by step (and indicators measured beside them); lower is
better for each:

``loss``           the validation loss at the last rung: the paper's.
``loss_drop``      minus what the last doubling of the steps gained.
``extrapolation``  the loss at the end of training, by the power law ``a + b·k^-c`` through the last
                   three rungs. With rungs that double this is a geometric series of drops.
``gradient_norm``  of the mean loss over fixed rows.
``sharpness``      curvature of the loss along the optimizer's next update.

``auto`` takes the one whose ranking agreed best with the losses of later rungs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

Metric = Literal["loss", "extrapolation", "loss_drop", "gradient_norm", "sharpness"]
METRICS: tuple[Metric, ...] = get_args(Metric)
"""Of several that foretell equally well, ``auto`` takes the first in this order."""

SETTLED_TAU = 0.9
"""Ranks agree where Kendall's tau-b is at least this much."""
STEEPEST_DECAY = 0.95
"""A power law's drops shrink at least so much per doubling, or it would fall for ever."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What was measured of one candidate, by step since growth.

    Attributes:
        loss: Mean validation loss.
        indicators: By name (``gradient_norm``, ``sharpness``): the value by step.
    """

    loss: Mapping[int, float]
    indicators: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def score(metric: Metric, curve: Curve, *, step: int, horizon: int) -> float | None:
    """A candidate's score at a rung; None where the metric cannot be told from what was measured.

    Args:
        metric: Which one.
        curve: The candidate's; only what was measured up to ``step`` is looked at.
        step: The rung.
        horizon: Steps of the whole training.
    """
    if metric == "loss":
        return curve.loss.get(step)
    if metric in ("gradient_norm", "sharpness"):
        return curve.indicators.get(metric, {}).get(step)
    rungs = [rung for rung in sorted(curve.loss) if 0 < rung <= step]
    if not rungs or rungs[-1] != step:
        return None
    if metric == "loss_drop":
        return None if len(rungs) < 2 else -_drop_per_doubling(curve, *rungs[-2:])
    return _extrapolated(curve, rungs, horizon=horizon)


def _drop_per_doubling(curve: Curve, before: int, now: int) -> float:
    return (curve.loss[before] - curve.loss[now]) / math.log2(now / before)


def _extrapolated(curve: Curve, rungs: Sequence[int], *, horizon: int) -> float | None:
    """The power law through three rungs, followed to the horizon."""
    if len(rungs) < 3:
        return None
    first, middle, last = rungs[-3:]
    earlier, later = (
        _drop_per_doubling(curve, first, middle),
        _drop_per_doubling(curve, middle, last),
    )
    if later <= 0.0:
        return curve.loss[last]
    decay = min(STEEPEST_DECAY, later / earlier) if earlier > 0.0 else STEEPEST_DECAY
    doublings = math.log2(horizon / last)
    still: float = decay * (1.0 - decay**doublings) / (1.0 - decay)
    return curve.loss[last] - later * still


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b, which allows for ties; None where one side is all ties, or one value."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(_sign(x[i] - x[j]), _sign(y[i] - y[j])) for i, j in pairs]
    untied_x, untied_y = sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)
    if not untied_x or not untied_y:
        return None
    return sum(a * b for a, b in signs) / math.sqrt(untied_x * untied_y)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None as in tau-b."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    norm = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / norm if norm else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    return np.asarray(below + (equal - 1) / 2, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the losses of two rungs rank the candidates that were measured at both.

    Attributes:
        first: The earlier rung.
        second: The later rung.
        num_candidates: Measured at both.
        tau_b: Kendall's; None with fewer than two, or all equal.
        spearman: Spearman's, likewise.
        same_leader: Whether the best of them is the same one.
    """

    first: int
    second: int
    num_candidates: int
    tau_b: float | None
    spearman: float | None
    same_leader: bool


def agreement(curves: Mapping[str, Curve], first: int, second: int) -> Agreement:
    """Compare the rankings of two rungs."""
    names = sorted(n for n, c in curves.items() if first in c.loss and second in c.loss)
    x = [curves[name].loss[first] for name in names]
    y = [curves[name].loss[second] for name in names]
    leaders = [min(zip(values, names, strict=True)) for values in (x, y)] if names else []
    return Agreement(
        first=first,
        second=second,
        num_candidates=len(names),
        tau_b=kendall_tau_b(x, y),
        spearman=spearman(x, y),
        same_leader=bool(leaders) and leaders[0][1] == leaders[1][1],
    )


def settled_at(curves: Mapping[str, Curve]) -> int | None:
    """The rung from which on the ranking stays what it is: the phase transition.

    The earliest rung from which on any two rungs agree on those that were measured at both: same
    leader, and tau-b of at least :data:`SETTLED_TAU`. None where only the last rung is left: then
    it may not have settled at all.
    """
    rungs = sorted({step for curve in curves.values() for step in curve.loss})
    settled = None
    for place, rung in reversed(list(enumerate(rungs[:-1]))):
        found = [agreement(curves, rung, later) for later in rungs[place + 1 :]]
        if not all(_agree(one) for one in found):
            break
        settled = rung
    return settled


def _agree(found: Agreement) -> bool:
    if found.num_candidates < 2:
        return True
    return found.same_leader and (found.tau_b is None or found.tau_b >= SETTLED_TAU)


@dataclass(frozen=True, kw_only=True)
class Foretelling:
    """How well a metric's ranking at a rung agreed with the losses of later rungs.

    Attributes:
        tau_b: Mean Kendall's tau-b over pairs of a rung and a later one.
        loss_tau_b: The same of the loss itself, over the same pairs: a metric that only says
            something late, when all is easy, gains nothing by that.
        num_pairs: How many pairs.
    """

    tau_b: float
    loss_tau_b: float
    num_pairs: int


def foretelling(curves: Mapping[str, Curve], *, horizon: int) -> dict[Metric, Foretelling]:
    """Judge each metric by pairs of rungs with at least three candidates.

    Metrics that have no such pair are left out.
    """
    rungs = sorted({step for curve in curves.values() for step in curve.loss})
    found: dict[Metric, Foretelling] = {}
    for metric in METRICS:
        taus = []
        for rung, later in itertools.combinations(rungs, 2):
            own = _foretold(metric, curves, rung, later, horizon)
            of_loss = _foretold("loss", curves, rung, later, horizon)
            if own is not None and of_loss is not None:
                taus.append((own, of_loss))
        if taus:
            found[metric] = Foretelling(
                tau_b=sum(own for own, _ in taus) / len(taus),
                loss_tau_b=sum(of_loss for _, of_loss in taus) / len(taus),
                num_pairs=len(taus),
            )
    return found


def _foretold(
    metric: Metric, curves: Mapping[str, Curve], rung: int, later: int, horizon: int
) -> float | None:
    pairs = [
        (value, curve.loss[later])
        for curve in curves.values()
        if later in curve.loss
        and (value := score(metric, curve, step=rung, horizon=horizon)) is not None
    ]
    if len(pairs) < 3:
        return None
    return kendall_tau_b([x for x, _ in pairs], [y for _, y in pairs])


def best_metric(found: Mapping[Metric, Foretelling]) -> Metric:
    """The metric that gained most on the loss; ``loss`` where none did."""
    gains = {metric: round(one.tau_b - one.loss_tau_b, 9) for metric, one in found.items()}
    best: Metric = max(gains, key=lambda metric: gains[metric], default="loss")
    return best if gains.get(best, 0.0) > 0.0 else "loss"
