"""The text: how much, split how, what was left out and why, where it came from."""

from __future__ import annotations

from samara.data.config import HubDataset, InterpreterDocs
from samara.report import humanize
from samara.report.charts import Bar, bar, bars
from samara.report.inputs import Corpus, Inputs, SplitCounts
from samara.report.markup import Html, element, paragraph, together
from samara.report.section import Section, missing

TOP_PACKAGES = 12

REASONS = {
    "exact_duplicate": "exact duplicate",
    "near_duplicate": "near duplicate",
    "not_english": "not English",
    "not_prose": "code or tables, not prose",
    "too_short": "too short",
}


def corpus(inputs: Inputs) -> Section | None:
    """What the arms read."""
    if inputs.config.corpus is None:
        return None
    found = inputs.corpus
    if found is None:
        body = missing(inputs.corpus_note)
        return Section(id="corpus", title="The text", aside=together(), body=body)
    aside = together(
        paragraph(_origin(found)),
        paragraph(_splitting(found)),
        paragraph("Corpus ", element("code", found.hash[:16]), ": same hash, same corpus."),
    )
    body = together(
        _splits(found),
        element("div", _fate(found), _packages(found), class_="pair"),
    )
    return Section(id="corpus", title="The text", aside=aside, body=body)


def _origin(found: Corpus) -> str:
    source = found.settings.source
    if isinstance(source, InterpreterDocs):
        return (
            "The documentation that was already on this machine: pydoc topics, and docstrings of "
            "the Python standard library and installed packages, read without importing them."
        )
    if isinstance(source, HubDataset):
        return f"The dataset {source.name.rstrip('/').rpartition('/')[2]}."
    return "Text files of this machine."


def _splitting(found: Corpus) -> str:
    split = found.settings.split
    given = getattr(found.settings.source, "validation_paths", ())
    if given:
        return "The validation documents come from files of their own; duplicates are dropped."
    return (
        "Whole documents are split after duplicates are gone: a hash of each one's id sends "
        f"{100 * split.validation_fraction:g}{humanize.GAP}% to validation and "
        f"{100 * split.test_fraction:g}{humanize.GAP}% to test, the same for every stage, so "
        "nothing that is tested was trained on."
    )


def _splits(found: Corpus) -> Html:
    splits = found.statistics.splits
    counts = list(splits.values())
    total = SplitCounts(
        documents=sum(split.documents for split in counts),
        bytes=sum(split.bytes for split in counts),
        tokens=sum(split.tokens for split in counts),
    )
    rows = [_split(name, split, split.bytes / (total.bytes or 1)) for name, split in splits.items()]
    titles = ("documents", "bytes", "tokens")
    head = element(
        "tr",
        element("td", None),
        element("td", None),
        *(element("th", title, scope="col", class_="number") for title in titles),
    )
    ratio = humanize.significant(total.bytes / total.tokens) if total.tokens else humanize.MISSING
    note = f"{ratio} bytes per token with a vocabulary of {humanize.whole(found.vocab_size)}."
    return element(
        "figure",
        element(
            "table",
            element("thead", head),
            element("tbody", *rows, _split("all", total, None)),
            class_="splits",
        ),
        element("figcaption", note),
    )


def _split(name: str, split: SplitCounts, share: float | None) -> Html:
    return element(
        "tr",
        element("th", name, scope="row"),
        element("td", None if share is None else bar(share)),
        element("td", humanize.whole(split.documents), class_="number"),
        element("td", humanize.size(split.bytes), class_="number"),
        element("td", humanize.count(split.tokens), class_="number"),
        class_="total" if share is None else None,
    )


def _fate(found: Corpus) -> Html:
    kept = sum(split.documents for split in found.statistics.splits.values())
    dropped = sorted(found.statistics.dropped.items(), key=lambda item: (-item[1], item[0]))
    read = kept + sum(found.statistics.dropped.values())
    rows = [Bar(label="kept", value=kept, text=humanize.whole(kept), strong=True)]
    rows += [
        Bar(label=REASONS.get(reason, reason.replace("_", " ")), value=n, text=humanize.whole(n))
        for reason, n in dropped
        if n
    ]
    skipped = [
        f"{humanize.whole(n)} {reason.replace('_', ' ')}"
        for reason, n in sorted(found.statistics.skipped.items())
        if n
    ]
    note = f" Passed over before: {humanize.listed(skipped)}." if skipped else ""
    return element(
        "figure",
        element("h3", "Kept and dropped"),
        bars(rows, description="Documents kept, and dropped by reason"),
        element("figcaption", f"Of {humanize.plural(read, 'document')} read.{note}"),
    )


def _packages(found: Corpus) -> Html | None:
    named = [(name, n) for name, n in found.statistics.packages.items() if name]
    if not named:
        return None
    rows = [Bar(label=name, value=n, text=humanize.whole(n)) for name, n in named[:TOP_PACKAGES]]
    rest = found.statistics.num_packages - len(rows)
    note = (
        f"Documents kept; {humanize.plural(rest, 'more package')} not shown."
        if rest
        else ("Documents kept.")
    )
    return element(
        "figure",
        element("h3", "Where they come from"),
        bars(rows, description="Documents of the largest packages"),
        element("figcaption", note),
    )
