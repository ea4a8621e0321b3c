"""What each arm writes after the same prompts."""

from __future__ import annotations

import re

from samara.report.inputs import Arm, Inputs, Sample
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import color, named
from samara.report.section import Section, missing

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n){2,}")


def samples(inputs: Inputs) -> Section | None:
    """Prompts down, arms across."""
    if inputs.evaluation is None:
        return None
    shown = tuple(arm for arm in inputs.arms if arm.score is not None and arm.score.samples)
    who = "Samples from tiny models" if inputs.config.demo_scale else "Samples"
    aside = paragraph(
        f"{who}: read them for flavour, not for facts. One draw each, none picked. "
        "The prompt is bold; runs of blank lines are closed up."
    )
    prompts = list(dict.fromkeys(s.prompt for arm in shown if arm.score for s in arm.score.samples))
    if not prompts:
        body = missing("The evaluation sampled no text.")
        return Section(id="samples", title="What they write", aside=aside, body=body)
    body = element("div", *(_prompt(prompt, shown) for prompt in prompts), class_="samples")
    return Section(id="samples", title="What they write", aside=aside, body=body)


def _prompt(prompt: str, shown: tuple[Arm, ...]) -> Html:
    cells = [
        _cell(arm, sample)
        for arm in shown
        if arm.score
        for sample in arm.score.samples
        if sample.prompt == prompt
    ]
    return element("div", *cells, class_="prompt")


def _cell(arm: Arm, sample: Sample) -> Html:
    # Some models give the prompt back with the text; show it once.
    continuation = _BLANK_LINES.sub("\n\n", sample.text.removeprefix(sample.prompt)).rstrip()
    return element(
        "figure",
        element("figcaption", named(arm)),
        element(
            "blockquote",
            together(element("b", sample.prompt), continuation),
            translate="no",
            dir="ltr",
        ),
        class_=f"sample s{color(arm)}",
    )
