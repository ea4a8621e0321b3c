"""The top of the page: what was done, what came out, in words computed from the data."""

from __future__ import annotations

from samara.report import humanize
from samara.report.inputs import Arm, Comparison, Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import FLOPS_PER_TOKEN, PARAMETERS, interval_text, named
from samara.report.sections.glance import glance


def headline(inputs: Inputs) -> Html:
    """Title, what was done, one finding per arm, what is missing, and the arms at a glance."""
    title = inputs.config.title
    return together(
        element("h1", title),
        paragraph(inputs.config.subtitle, class_="subtitle") if inputs.config.subtitle else None,
        element(
            "div",
            element("div", paragraph(_done(inputs), class_="done"), *_findings(inputs)),
            glance(inputs),
            class_="result",
        ),
        *_missing(inputs),
    )


def _done(inputs: Inputs) -> str:
    arms = inputs.finished
    if not arms:
        return "No training run has finished yet."
    models = "One language model was" if len(arms) == 1 else f"{_word(arms)} language models were"
    budgets = {arm.total.tokens or arm.summary.tokens for arm in arms if arm.summary}
    if len(budgets) == 1:
        same = "the same " if len(arms) > 1 else ""
        tokens = f"{same}{humanize.count(budgets.pop())} tokens"
    else:
        tokens = f"{humanize.count(min(budgets))} to {humanize.count(max(budgets))} tokens"
    text = f"{models} trained on {tokens}"
    if inputs.evaluation is None:
        return f"{text}; {'they have' if len(arms) > 1 else 'it has'} not been evaluated yet."
    documents = humanize.plural(inputs.evaluation.num_documents, "document")
    return f"{text} and scored on {documents} held out from training."


def _word(arms: tuple[Arm, ...]) -> str:
    return humanize.number_word(len(arms))


def _findings(inputs: Inputs) -> list[Html]:
    baseline = inputs.baseline
    if baseline is None or baseline.summary is None:
        return []
    others = [arm for arm in inputs.finished if arm is not baseline]
    if not others:
        return [_alone(baseline)]
    return [_finding(arm, baseline, inputs) for arm in others]


def _alone(arm: Arm) -> Html:
    assert arm.summary is not None
    size = f" has {humanize.count(arm.summary.parameters)} parameters"
    if arm.score is None:
        return paragraph(named(arm), size, ".", class_="finding")
    bits = humanize.fixed(arm.score.bits_per_byte.value)
    return paragraph(named(arm), size, f" and reaches {bits} bits per byte.", class_="finding")


def _finding(arm: Arm, baseline: Arm, inputs: Inputs) -> Html:
    """``X reaches 1.612 bits per byte. Against Y: 38 % fewer parameters, …: worse.``"""
    size = humanize.compared(PARAMETERS.known_ratio(arm, baseline), "fewer", "more")
    work = humanize.compared(FLOPS_PER_TOKEN.known_ratio(arm, baseline), "fewer", "more")
    return element(
        "div",
        paragraph(named(arm), _reached(arm), class_="reached"),
        paragraph(
            "Against ",
            named(baseline),
            f"{_beside(baseline, arm)}: {size} parameters, {work} FLOPs per token",
            *_verdict(arm.comparison, inputs),
        ),
        class_="finding",
    )


def _reached(arm: Arm) -> str:
    if arm.score is not None:
        return f" reaches {humanize.fixed(arm.score.bits_per_byte.value)} bits per byte"
    if arm.summary is not None and arm.summary.validation_loss is not None:
        return f" ended training at a validation loss of {_last_loss(arm)}"
    return ""


def _beside(baseline: Arm, arm: Arm) -> str:
    """The baseline's figure of the same kind as :func:`_reached` gives for the arm."""
    if arm.score is not None:
        score = baseline.score
        return f" ({humanize.fixed(score.bits_per_byte.value)})" if score is not None else ""
    last = _last_loss(baseline)
    return f" ({last})" if last and _last_loss(arm) else ""


def _last_loss(arm: Arm) -> str:
    loss = arm.summary.validation_loss if arm.summary is not None else None
    return humanize.fixed(loss) if loss is not None else ""


def _verdict(comparison: Comparison | None, inputs: Inputs) -> list[Html | str]:
    if comparison is None:
        return ["; the losses were not compared." if inputs.evaluation else "."]
    difference = comparison.loss_difference
    size = humanize.fixed(abs(difference.value))
    interval = interval_text(difference, 3, sign=True)
    said = {
        "better": f"; its loss is {size} lower",
        "worse": f"; its loss is {size} higher",
        "unresolved": f"; its loss differs by {humanize.fixed(difference.value, sign=True)}",
    }[comparison.verdict]
    return [
        said,
        element("span", f" {interval}", class_="interval-text") if interval else "",
        ": ",
        element("b", comparison.verdict, class_=f"verdict {comparison.verdict}"),
        ".",
    ]


def _missing(inputs: Inputs) -> list[Html]:
    """One sentence for everything that is not there."""
    notes = [_arm_note(arm) for arm in inputs.arms if arm.summary is None]
    notes += [_stale_note(arm) for arm in inputs.finished if _is_stale(arm)]
    corpora = {arm.summary.corpus_hash for arm in inputs.finished if arm.summary}
    if len(corpora) > 1:
        notes.append(together("The arms did not read the same corpus: compare them with care."))
    if inputs.evaluation is not None:
        notes += [
            together(named(arm), " is not part of the evaluation.")
            for arm in inputs.finished
            if arm.score is None
        ]
    elif inputs.config.evaluation is not None:
        notes.append(together(inputs.evaluation_note))
    return [paragraph(note, class_="missing") for note in notes]


def _arm_note(arm: Arm) -> Html:
    step = arm.training[-1].step if arm.training else 0
    state = {
        "running": "is still running",
        "stopped": "was stopped",
        "failed": "failed",
        "finished": "left no summary",
    }.get(arm.state, "has not finished")
    why = f" ({arm.message})" if arm.message else ""
    return together(
        named(arm), f" {state} after step {humanize.whole(step)}{why}; its figures are missing."
    )


def _is_stale(arm: Arm) -> bool:
    return (
        arm.score is not None
        and arm.summary is not None
        and arm.score.weights_hash != arm.summary.weights_hash
    )


def _stale_note(arm: Arm) -> Html:
    return together(
        named(arm), " was evaluated with other weights than its run now holds: evaluate it again."
    )
