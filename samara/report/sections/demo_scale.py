"""What figures of demo scale can and cannot say, with this run's own numbers."""

from __future__ import annotations

from samara.report import humanize
from samara.report.charts import Piece, stacked_bar
from samara.report.inputs import Arm, Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import (
    FLOPS_PER_TOKEN,
    LAYER_PARAMETERS,
    PARAMETERS,
    color,
    flops_per_token,
    head_flops_per_token,
    layer_flops_per_token,
    named,
)
from samara.report.section import Section

WIDER = 8
TOKENS_PER_PARAMETER = 20  # about compute-optimal: Hoffmann et al. 2022 (arXiv 2203.15556)


def demo_scale(inputs: Inputs) -> Section | None:
    """The label "demo scale" and what it means here; nothing where the report does not ask."""
    if not inputs.config.demo_scale:
        return None
    aside = paragraph(
        "These models are small enough to train while you wait. "
        "That bends the figures, and this is how."
    )
    arms = inputs.finished
    if not arms:
        body = paragraph("No run has finished, so there is nothing to put in proportion yet.")
        return Section(id="scale", title="Demo scale", aside=aside, body=body)
    text = together(
        paragraph(*_head_share(arms[0])),
        *(paragraph(*_dilution(arm, arms[0])) for arm in arms[1:]),
        paragraph(_wider(arms[0])),
        paragraph(_short(arms)),
    )
    body = element(
        "div",
        element("div", text, class_="prose"),
        element("div", _proportions(arms), class_="proportions"),
        class_="demo",
    )
    return Section(id="scale", title="Demo scale", aside=aside, body=body)


def _head_share(arm: Arm) -> list[Html | str]:
    assert arm.summary is not None
    assert arm.budget is not None
    design, summary = arm.summary.design, arm.summary
    share = summary.embedding_parameters / summary.parameters
    work = _ratio(head_flops_per_token(arm), flops_per_token(arm))
    layers = _ratio(head_flops_per_token(arm), layer_flops_per_token(arm))
    like = f"as much as {humanize.significant(layers * design.num_hidden_layers, 2)} of its "
    like += f"{design.num_hidden_layers} layers"
    dominates = "dominates" if work >= 0.5 else "weighs heavily"
    return [
        f"At a width of {humanize.whole(design.hidden_size)} the vocabulary ",
        element("b", dominates),
        f". Its {humanize.whole(arm.budget.vocab_size)} entries hold {humanize.percent(share)} of "
        "the parameters of ",
        named(arm),
        f", and choosing among them takes {humanize.percent(work)} of the training FLOPs: {like}.",
    ]


def _dilution(arm: Arm, baseline: Arm) -> list[Html | str]:
    """What an arm changes in the layers, beside what is left of it in the total."""
    layer_weights = LAYER_PARAMETERS.known_ratio(arm, baseline)
    layer_work = _ratio(layer_flops_per_token(arm), layer_flops_per_token(baseline))
    weights = humanize.change(PARAMETERS.known_ratio(arm, baseline))
    work = humanize.change(FLOPS_PER_TOKEN.known_ratio(arm, baseline))
    return [
        "In the layers alone, ",
        named(arm),
        f" has {humanize.compared(layer_weights, 'fewer', 'more')} parameters and needs "
        f"{humanize.compared(layer_work, 'fewer', 'more')} FLOPs; over the whole model that is "
        f"{weights} and {work}, since the vocabulary is the same.",
    ]


def _wider(arm: Arm) -> str:
    assert arm.summary is not None
    head = arm.summary.embedding_parameters
    layers = arm.summary.parameters - head
    # Matrices of the layers grow with the square of the width, the vocabulary's only with it.
    share = head * WIDER / (head * WIDER + layers * WIDER**2)
    return (
        f"The same design {WIDER} times as wide, with the same vocabulary, would have about "
        f"{humanize.percent(share)} of its parameters there, so what a design changes in its "
        "layers shows almost in full."
    )


def _short(arms: tuple[Arm, ...]) -> str:
    rates = [arm.summary.tokens / arm.summary.parameters for arm in arms if arm.summary]
    low, high = humanize.significant(min(rates), 2), humanize.significant(max(rates), 2)
    span = low if low == high else f"{low} to {high}"
    each = "Each arm was trained once, with one seed: a" if len(arms) > 1 else "A"
    return (
        f"Training read {span} tokens per parameter; about {TOKENS_PER_PARAMETER} is usual where "
        f"compute is spent well (Hoffmann et al. 2022). {each}nother seed or a longer run may "
        "change small differences, and their sign."
    )


def _proportions(arms: tuple[Arm, ...]) -> Html:
    """Bars that show how much of each arm is vocabulary: weights, then work."""
    rows = []
    for arm in arms:
        assert arm.summary is not None
        weights = arm.summary.embedding_parameters / arm.summary.parameters
        work = _ratio(head_flops_per_token(arm), flops_per_token(arm))
        rows.append(
            element(
                "div",
                paragraph(named(arm)),
                _bar(arm, weights, humanize.count(arm.summary.parameters), "parameters"),
                _bar(arm, work, humanize.flops(arm.summary.flops_per_token), "FLOPs per token"),
            )
        )
    return together(*rows)


def _bar(arm: Arm, share: float, total: str, what: str) -> Html:
    description = f"{arm.name}: {humanize.percent(share)} of {total} {what} in the vocabulary"
    pieces = [
        Piece(share=share, style="vocabulary"),
        Piece(share=1 - share, style=f"s{color(arm)}"),
    ]
    return element(
        "div",
        stacked_bar(pieces, description=description),
        element("span", f"{humanize.percent(share)} vocabulary"),
        element("span", f"{total}{' parameters' if what == 'parameters' else ' per token'}"),
        class_="proportion",
    )


def _ratio(value: float | None, whole: float | None) -> float:
    assert value is not None, "only asked of finished arms"
    assert whole
    return value / whole
