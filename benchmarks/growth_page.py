"""The section of docs/results.md on growth: tables of the findings, and sentences made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import growth
from growth_findings import (
    RESAMPLES,
    Ended,
    Foretold,
    Pool,
    Scratch,
    between_seeds,
    blind_regret,
    ended,
    foretold,
    grown,
    holds_from,
    horizon_of,
    objectives,
    scratch,
    spread_of,
)
from growth_replays import FIRST_RUNG, GAMMA, Replay, replayed
from markdown_parts import Data, interval, origin, table

from samara.growth.config import FixedRace, HalvingRace
from samara.growth.selection import RaceRule

INTRODUCTION = """## Growth: does a short lag foretell the best operator?

A small model grows to twice its depth by every operator of a pool, and each grown model trains to
the end on the same batches: so what a lag (LAG, arXiv 2406.02469) would have chosen can be held
against what was best. Of one seed, all operators start from one checkpoint. *Regret* is the last
loss of what was chosen minus the lowest last loss; costs are steps of all candidates as multiples
of one whole training after growth (T), *net* without those of the winner, which go on."""


def section(files: Sequence[Data], *, picture: str) -> str:
    """All of it; the picture is of the first file."""
    shown = [_file(data, picture if number == 0 else None) for number, data in enumerate(files)]
    return "\n\n".join([INTRODUCTION, *shown])


def _file(data: Data, picture: str | None) -> str:
    rows = data["rows"]
    pools = {objective: grown(rows, objective) for objective in objectives(rows)}
    parts = [_sizes(data), _claims({name: foretold(pool) for name, pool in pools.items()})]
    parts.append("\n".join(f"- {_says(name, pool)}" for name, pool in pools.items()))
    parts.append(_limits(data))
    if picture is not None:
        parts.append(f"![Rank correlation of the loss after k steps with the last]({picture})")
    for name, pool in pools.items():
        parts.append(_objective(name, pool, scratch(rows, name)))
    absent = not_run(data)
    if absent:
        parts.append(f"Not run: {'; '.join(f'`{name}`' for name in absent)}.")
    return "\n\n".join([*parts, origin(data)])


def not_run(data: Data) -> list[str]:
    """Runs of the queue whose figures are not in the file."""
    scale, rows = growth.SCALES[data["settings"]["scale"]], data["rows"]
    known = {row["name"] for row in rows}
    return [task.name for task in growth.whole_queue(scale, rows) if task.name not in known]


def _sizes(data: Data) -> str:
    sizes, rows = data["settings"]["sizes"], data["rows"]
    small = next(row["parameters"] for row in rows if row["kind"] == "source")
    large = next((row["parameters"] for row in rows if row["kind"] == "scratch"), None)
    to = "" if large is None else f" to {large / 1e6:.1f}M"
    return (
        f"From {small / 1e6:.1f}M parameters{to}; {sizes['source_steps']} steps before growth and "
        f"{sizes['steps']} after, of {sizes['batch_size']} × {sizes['sequence_length']} tokens; "
        f"losses on {sizes['evaluation_tokens']:,} validation tokens, paired by {growth.UNITS} "
        "groups of rows. The learning rate warms up anew over the first 20 steps after growth and "
        "decays in the last fifth, after every rung below. Intervals are for 95 %; those of "
        f"correlations resample operators {RESAMPLES:,} times, all seeds together."
    )


# --- sentences ------------------------------------------------------------------------------------


def _claims(found: Mapping[str, Sequence[Foretold]]) -> str:
    """The paper's two claims, held against all objectives."""
    blind = [name for name, findings in found.items() if not findings[0].spearman.low > 0]
    ahead = {name: holds_from(findings, gain=True) for name, findings in found.items()}
    shares = {name: f"from {one.share:.1%} of T" for name, one in ahead.items() if one is not None}
    yes = ", ".join(f"{name} {share}" for name, share in shares.items()) or "none"
    no = ", ".join(name for name in found if name not in shares)
    return (
        f"Of the paper's two claims, nothing speaks against *the loss right after growth does not "
        f"foretell the last one* in {len(blind)} of {len(found)} objectives; *after a short lag it "
        f"does* is borne out in {len(shares)} of {len(found)} ({yes}"
        f"{f'; not in {no}' if no else ''}), if such lags count as short."
    )


def _says(name: str, pool: Pool) -> str:
    """What one objective's figures say on the claim that lag selection rests on."""
    findings, horizon = foretold(pool), horizon_of(pool)
    start, ahead = findings[0], holds_from(findings, gain=True)
    sure, repeat = holds_from(findings), between_seeds(pool)
    words = [f"**{name}.** {_at_growth(start)}"]
    if ahead is None:
        words.append(
            "At no rung is the correlation above that by more than the interval: "
            "**that a lag foretells better is not shown here**."
        )
    else:
        words.append(
            f"From k = {ahead.step} on ({ahead.share:.1%} of T) the correlation is above that by "
            f"more than the interval; to try the whole pool so long costs {ahead.gross:.2f} T "
            f"({ahead.net:.2f} T net)."
        )
    if sure is None:
        words.append(
            "At no rung does the correlation's own interval keep clear of zero from there on."
        )
    else:
        value = interval(asdict(sure.spearman), 2)
        words.append(
            f"The correlation itself keeps clear of zero from k = {sure.step} on ({value})."
        )
    words.append(_regrets(findings, pool, horizon))
    if repeat is not None:
        words.append(f"Last losses of two seeds rank the operators alike to {repeat:.2f}.")
    return " ".join(words)


def _at_growth(start: Foretold) -> str:
    value = interval(asdict(start.spearman), 2)
    if start.spearman.low > 0:
        verdict = "the loss right after growth does foretell the last one"
    elif start.spearman.high < 0:
        verdict = "the loss right after growth misleads"
    else:
        verdict = "the loss right after growth is not shown to foretell anything"
        if all(value < 0 for value in start.by_seed):
            verdict += ", and it leans the wrong way in every seed"
    return f"At k = 0 the correlation is {value}: {verdict}."


def _regrets(findings: Sequence[Foretold], pool: Pool, horizon: int) -> str:
    start, blind = findings[0], blind_regret(pool)
    better = next(
        (
            one
            for place, one in enumerate(findings)
            if all(later.regret < blind for later in findings[place:])
        ),
        None,
    )
    words = (
        f"Taking the lowest loss at k = 0 costs {start.regret:.3f} nats in the end, a choice by "
        f"lot {blind:.3f}; "
    )
    if better is None:
        return words + f"no k below {horizon} does better than the lot for good."
    right = next((one for one in findings if one.hits == len(pool)), None)
    words += f"from k = {better.step} on it costs less than the lot ({better.regret:.3f})"
    if right is None:
        return words + ", and at no k is the best found in all seeds."
    return words + f", and the best is found in all seeds first at k = {right.step}."


def _limits(data: Data) -> str:
    sizes = data["settings"]["sizes"]
    seeds = sorted({len(seeds) for seeds in sizes["seeds"].values()})
    return (
        f"This is one scale, one corpus, {sizes['steps']} steps after growth and "
        f"{' or '.join(map(str, seeds))} seeds, and not the paper's experiment: it says nothing on "
        "other sizes or longer training. Pools differ between objectives, and operators are not "
        "independent of each other (two are one map with other moments), so the intervals, which "
        "resample operators, are rather too narrow; with five operators a correlation of 1 has no "
        "interval at all."
    )


# --- tables ---------------------------------------------------------------------------------------


def _objective(name: str, pool: Pool, beside: Scratch | None) -> str:
    operators = len(next(iter(pool.values())))
    head = f"### Growth, {name}: {operators} operators, {len(pool)} seeds"
    return "\n\n".join(
        [
            head,
            _foretold_table(foretold(pool), pool),
            _rules(replayed(pool), pool),
            _ended(ended(pool, beside), beside),
        ]
    )


def _foretold_table(findings: Sequence[Foretold], pool: Pool) -> str:
    header = (
        "k",
        "of T",
        "Spearman with the last loss",
        "by seed",
        "more than at k = 0",
        "lowest at k",
        "the best in the end",
        "regret, nats",
        "regret / (median − best)",
        "cost",
        "net",
    )
    rows = [
        [
            str(one.step),
            f"{one.share:.1%}",
            interval(asdict(one.spearman), 2),
            ", ".join(f"{value:.2f}" for value in one.by_seed),
            "–" if one.step == 0 else interval(asdict(one.gain), 2),
            "; ".join(one.lowest),
            f"{one.hits} of {len(pool)}",
            f"{one.regret:.4f}",
            f"{one.relative_regret:.2f}",
            f"{one.gross:.2f}",
            f"{one.net:.2f}",
        ]
        for one in findings
    ]
    return (
        f"Taking the lowest loss after k steps; by lot the regret is {blind_regret(pool):.4f} "
        f"nats.\n\n{table(header, rows)}"
    )


def _rules(findings: Sequence[Replay], pool: Pool) -> str:
    header = ("rule", "regret, nats", "regret / (median − best)", "spent", "last rung", "open")
    rows = [
        [
            rule_name(one.rule),
            f"{one.regret:.4f}",
            f"{one.relative_regret:.2f}",
            f"{one.spent:.2f}",
            ", ".join(map(str, dict.fromkeys(one.stopped_at))),
            f"{one.unresolved} of {len(pool)}",
        ]
        for one in findings
        if not one.missing
    ]
    lacking = [
        f"{rule_name(one.rule)} needs losses after {', '.join(map(str, one.missing))} steps, "
        "which were not recorded."
        for one in findings
        if one.missing
    ]
    caption = (
        f"The rules of `samara grow` on these losses (first rung {FIRST_RUNG}, gamma {GAMMA:g}). "
        "Unlike above, of candidates that the paired "
        "differences cannot tell apart they take the one that keeps the function best; *spent* is "
        "the share of T's FLOPs that all candidates took, without measuring; *open*: seeds in "
        "which the winner could not be told from another."
    )
    cut = sorted(
        one.rule.cap
        for one in findings
        if not isinstance(one.rule, FixedRace) and set(one.stopped_at) == {0}
    )
    lacking += [
        f"Under a cap of {' or '.join(f'{cap:g}' for cap in cut)} the pool does not even reach the "
        "first rung: the rule then goes by the loss right after growth."
    ] * bool(cut)
    if not any(one.missing for one in findings):
        lacking.append("Every rung that they need was recorded.")
    spreads = ", ".join(f"{spread_of(runs):.4f}" for runs in pool.values())
    lacking.append(f"Median − best, by seed: {spreads} nats.")
    return "\n\n".join([caption, table(header, rows), " ".join(lacking)])


def rule_name(rule: RaceRule) -> str:
    """A rule in words."""
    if isinstance(rule, FixedRace):
        return f"fixed k = {rule.k}"
    kind = "halving" if isinstance(rule, HalvingRace) else "paired race"
    return f"{kind}, cap {rule.cap:g}"


def _ended(findings: Sequence[Ended], beside: Scratch | None) -> str:
    header = ["operator", "growth", "loss after growth", "last loss", "sd"]
    if beside is not None:
        header += ["minus scratch, paired", f"FLOPs saved, seed {beside.swept_seed}"]
    rows = [
        [
            one.operator,
            one.exactness,
            f"{one.at_growth:.3f}",
            f"{one.last:.4f}",
            f"{one.deviation:.4f}",
            *(_against(one) if beside is not None else []),
        ]
        for one in findings
    ]
    words = "No scratch run was made." if beside is None else _scratch_says(findings, beside)
    return (
        "How they ended: means over seeds; *growth* says what it did to the function.\n\n"
        f"{table(header, rows)}\n\n{words}"
    )


def _against(one: Ended) -> list[str]:
    difference, saved = one.against_scratch, one.saved
    return [
        "–" if difference is None else interval(asdict(difference), 3),
        "–" if saved is None else f"{saved:.1%}",
    ]


def _scratch_says(findings: Sequence[Ended], beside: Scratch) -> str:
    mean = sum(beside.losses.values()) / len(beside.losses)
    by_seed = ", ".join(f"{loss:.4f}" for _, loss in sorted(beside.losses.items()))
    swept = ", ".join(f"{loss:.4f} at {lr:g}" for lr, loss in beside.sweep.items())
    same = "which is the same rate" if beside.grown_lr == beside.lr else "which is another rate"
    apart = max(abs(one.flops / beside.curve[0][0] - 1) for one in findings)
    told = [one for one in findings if one.against_scratch is not None]
    below = [one for one in told if one.against_scratch and one.against_scratch.value < 0]
    clear = [one for one in told if one.against_scratch and one.against_scratch.high < 0]
    parts = [
        f"Scratch, the large model from the start at equal total FLOPs (within {apart:.2%}, the "
        f"small model's included): {mean:.4f} (by seed: {by_seed}). Its learning rate was swept at "
        f"seed {beside.swept_seed}: {swept}; the best is kept. Small and grown models took the "
        f"middle of that sweep, {beside.grown_lr:g}, {same}; they were not tuned. What the other "
        "candidates of a pool cost is not counted."
    ]
    if told:
        verdict = f"for {len(clear)} of them" if clear else "**for none of them**"
        parts.append(
            f"{len(below)} of {len(told)} operators end below scratch on average; {verdict} does "
            "the interval (Student's t over seeds) keep clear of zero."
        )
    if len(beside.curve) > 1:
        parts.append(_saved_says(beside))
    return " ".join(parts)


def _saved_says(beside: Scratch) -> str:
    budgets = " and ".join(f"{flops / beside.curve[0][0]:.1f}×" for flops, _ in beside.curve)
    between = max(beside.losses.values()) - min(beside.losses.values())
    along = beside.curve[0][1] - beside.curve[-1][1]
    return (
        f"*FLOPs saved* are of seed {beside.swept_seed} alone: against the scratch run of equal "
        f"last loss, on the line in log FLOPs through scratch at {budgets}; a dash: scratch gets "
        f"there with less, or was not run so long. Scratch itself differs by {between:.3f} nats "
        f"between seeds, and by {along:.3f} from the first to the last point of that line."
    )
