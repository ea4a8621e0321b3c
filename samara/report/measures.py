"""The figures of an arm: what they are called, where they come from, how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from samara.report import humanize
from samara.report.inputs import Arm
from samara.report.markup import Html, element, together
from samara.report.run_files import Bounds

Kind = Literal["counted", "measured", "estimated"]
Group = Literal["Size", "Work", "On this machine", "Held-out text", "Estimates"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One row of the table of arms."""

    group: Group
    title: str
    kind: Kind
    value: Callable[[Arm], float | None]
    text: Callable[[float, Arm], str]
    better: Literal["less", "more"] | None
    """Which end is the good one; None: neither."""
    bounds: Callable[[Arm], Bounds | None] | None = None
    """The interval, for what is estimated from a sample of documents."""
    places: int = 0
    """Decimals of the interval's ends."""

    def ratio(self, arm: Arm, baseline: Arm) -> float | None:
        """The arm's value over the baseline's."""
        value, base = self.value(arm), self.value(baseline)
        return value / base if value is not None and base else None

    def known_ratio(self, arm: Arm, baseline: Arm) -> float:
        """:meth:`ratio` of two finished arms, in what every finished arm has."""
        ratio = self.ratio(arm, baseline)
        assert ratio is not None
        return ratio


def parameters(arm: Arm) -> float | None:
    """All weights."""
    return arm.summary.parameters if arm.summary else None


def layer_parameters(arm: Arm) -> float | None:
    """Weights outside the vocabulary matrices."""
    return arm.summary.parameters - arm.summary.embedding_parameters if arm.summary else None


def flops_per_token(arm: Arm) -> float | None:
    """Training FLOPs per token: forward and backward."""
    return arm.summary.flops_per_token if arm.summary else None


def head_flops_per_token(arm: Arm) -> float | None:
    """The vocabulary head's part of :func:`flops_per_token`."""
    return arm.budget.head_flops.training if arm.budget else None


def layer_flops_per_token(arm: Arm) -> float | None:
    """The layers' part of :func:`flops_per_token`."""
    total, head = flops_per_token(arm), head_flops_per_token(arm)
    return total - head if total is not None and head is not None else None


def perplexity(arm: Arm) -> float | None:
    """Perplexity on the held-out text of the evaluation."""
    return arm.score.perplexity.value if arm.score else None


def training_loss_at_end(arm: Arm) -> float | None:
    """Validation loss as training measured it, for an arm that was not evaluated since."""
    return arm.summary.validation_loss if arm.summary and arm.score is None else None


def _whole(arm: Arm, own: float | None) -> float | None:
    """An estimate that goes with the time, for ancestors and trials too."""
    if own is None or arm.summary is None or not arm.total.seconds:
        return own
    return own * arm.total.seconds / arm.summary.seconds


PARAMETERS = Measure(
    group="Size",
    title="Parameters",
    kind="counted",
    value=parameters,
    text=lambda value, _: humanize.count(value),
    better="less",
)
LAYER_PARAMETERS = Measure(
    group="Size",
    title="in the layers",
    kind="counted",
    value=layer_parameters,
    text=lambda value, _: humanize.count(value),
    better="less",
)
FLOPS_PER_TOKEN = Measure(
    group="Work",
    title="Training FLOPs per token",
    kind="counted",
    value=flops_per_token,
    text=lambda value, _: humanize.flops(value),
    better="less",
)
SECONDS = Measure(
    group="On this machine",
    title="Training time",
    kind="measured",
    value=lambda arm: (arm.total.seconds or arm.summary.seconds) if arm.summary else None,
    text=lambda value, _: humanize.seconds(value),
    better="less",
)
PEAK_MEMORY = Measure(
    group="On this machine",
    title="Peak memory",
    kind="measured",
    value=lambda arm: arm.summary.peak_memory_bytes if arm.summary else None,
    text=lambda value, _: humanize.size(value),
    better="less",
)
PERPLEXITY = Measure(
    group="Held-out text",
    title="Perplexity",
    kind="measured",
    value=perplexity,
    text=lambda value, _: humanize.significant(value),
    better="less",
    bounds=lambda arm: arm.score.perplexity if arm.score else None,
    places=1,
)

TABLE: tuple[Measure, ...] = (
    PARAMETERS,
    LAYER_PARAMETERS,
    FLOPS_PER_TOKEN,
    Measure(
        group="Work",
        title="in the layers",
        kind="counted",
        value=layer_flops_per_token,
        text=lambda value, _: humanize.flops(value),
        better="less",
    ),
    Measure(
        group="Work",
        title="Tokens read",
        kind="counted",
        value=lambda arm: (arm.total.tokens or arm.summary.tokens) if arm.summary else None,
        text=lambda value, _: humanize.count(value),
        better=None,
    ),
    Measure(
        group="Work",
        title="Training FLOPs",
        kind="counted",
        value=lambda arm: (arm.total.flops or arm.summary.flops) if arm.summary else None,
        text=lambda value, _: humanize.flops(value),
        better="less",
    ),
    SECONDS,
    Measure(
        group="On this machine",
        title="Tokens per second",
        kind="measured",
        value=lambda arm: arm.summary.tokens_per_second if arm.summary else None,
        text=lambda value, _: humanize.prefixed(value),
        better="more",
    ),
    Measure(
        group="On this machine",
        title="Share of peak FLOP/s (MFU)",
        kind="estimated",
        value=lambda arm: arm.summary.mfu if arm.summary else None,
        text=lambda value, _: humanize.percent(value),
        better="more",
    ),
    PEAK_MEMORY,
    Measure(
        group="Held-out text",
        title="Loss, nats per token",
        kind="measured",
        value=lambda arm: arm.score.loss.value if arm.score else None,
        text=lambda value, _: humanize.fixed(value),
        better="less",
        bounds=lambda arm: arm.score.loss if arm.score else None,
        places=3,
    ),
    PERPLEXITY,
    Measure(
        group="Held-out text",
        title="Bits per byte",
        kind="measured",
        value=lambda arm: arm.score.bits_per_byte.value if arm.score else None,
        text=lambda value, _: humanize.fixed(value),
        better="less",
        bounds=lambda arm: arm.score.bits_per_byte if arm.score else None,
        places=3,
    ),
    Measure(
        group="Held-out text",
        title="Loss at the end of training",
        kind="measured",
        value=training_loss_at_end,
        text=lambda value, _: humanize.fixed(value),
        better="less",
    ),
    Measure(
        group="Estimates",
        title="Energy",
        kind="estimated",
        value=lambda arm: _whole(arm, arm.summary.energy_kwh) if arm.summary else None,
        text=lambda value, _: humanize.energy(value),
        better="less",
    ),
    Measure(
        group="Estimates",
        title="Cost",
        kind="estimated",
        value=lambda arm: _whole(arm, arm.summary.cost) if arm.summary else None,
        text=lambda value, arm: humanize.money(value, arm.summary.currency if arm.summary else ""),
        better="less",
    ),
)
"""The rows of the table of arms, in order."""


def best(measure: Measure, arms: tuple[Arm, ...]) -> frozenset[str]:
    """Names of the arms to mark as best in a row; empty where there is nothing to win.

    A score of documents wins only where its difference is resolved: an arm that the paired
    comparison cannot tell from the best is marked with it.
    """
    values = {arm.name: measure.value(arm) for arm in arms}
    known = {name: value for name, value in values.items() if value is not None}
    if measure.better is None or len(known) < 2 or len({f"{v:.6g}" for v in known.values()}) < 2:
        return frozenset()
    pick = min if measure.better == "less" else max
    top = pick(known.values())
    winners = {name for name, value in known.items() if value == top}
    if measure.group == "Held-out text":
        winners |= _unresolved_with(winners, arms)
    return frozenset(winners) if len(winners) < len(known) else frozenset()


def _unresolved_with(winners: set[str], arms: tuple[Arm, ...]) -> set[str]:
    unresolved = {a.name for a in arms if a.comparison and a.comparison.verdict == "unresolved"}
    baseline = arms[0].name
    if baseline in winners:
        return unresolved
    return {baseline} if winners & unresolved else set()


def interval_text(bounds: Bounds, places: int, *, sign: bool = False) -> str:
    """``[4.081, 4.160]``, or empty where there is no interval."""
    if bounds.low is None or bounds.high is None:
        return ""
    low = humanize.fixed(bounds.low, places, sign=sign)
    high = humanize.fixed(bounds.high, places, sign=sign)
    return f"[{low}, {high}]"


def named(arm: Arm) -> Html:
    """The arm's name in its colour."""
    return element("b", arm.name, class_=f"arm s{color(arm)}")


def key(arms: Sequence[Arm]) -> Html:
    """The names in their colours, in a row: for where a narrow page drops labels at curves."""
    return element("p", *(together(named(arm), " ") for arm in arms), class_="key")


def color(arm: Arm) -> int:
    """Which of the page's eight series colours the arm has."""
    return arm.index % 8
