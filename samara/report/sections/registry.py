"""The registry: versions and aliases, what the gates said, promotions and rollbacks."""

from __future__ import annotations

from samara.report import humanize
from samara.report.adaptation_inputs import Release, ReleasedVersion, ReleaseEntry
from samara.report.inputs import Inputs
from samara.report.markup import Html, element, joined, paragraph, together
from samara.report.section import Section, missing

DONE = {
    "add": "added",
    "restore": "files restored",
    "evidence": "evidence added",
    "gates": "gates set",
    "promote": "promoted",
    "hold": "held",
    "refuse": "refused",
    "rollback": "rolled back",
    "drop": "files dropped",
}


def registry(inputs: Inputs) -> Section | None:
    """The versions of one line and their story; nothing where the report names no release."""
    if inputs.config.release is None:
        return None
    aside = together(
        paragraph(
            "A version never changes; an alias says which one counts, and moves only through its "
            "gates. A gate looks at a score with its interval: above the bound as a whole passes, "
            "below it as a whole is refused, anything between is held."
        ),
        paragraph(
            "A rollback moves the alias back at once and asks no gate. Each entry of the log holds "
            "the hash of the one before, so that a change shows."
        ),
    )
    release = inputs.release
    body = missing(inputs.release_note) if release is None else _body(release)
    return Section(id="registry", title="Versions", aside=aside, body=body)


def _body(release: Release) -> Html:
    count = humanize.plural(len(release.versions), "version")
    standing = [
        f"{alias} is version {number} ({_name_of(release, number)})"
        for alias, number in sorted(release.aliases.items())
    ]
    said = f"{count} of {release.line}; {humanize.listed(standing) or 'no alias'}."
    checked = (
        "Log, aliases and every file were read again: all whole."
        if not release.problems
        else f"Damaged: {'; '.join(release.problems)}."
    )
    return together(
        paragraph(f"{said} {checked}"),
        element("div", _versions(release), class_="scroll"),
        element("h3", "What was done"),
        element("div", _log(release), class_="scroll"),
    )


def _name_of(release: Release, number: int) -> str:
    names = (name for name, version in release.versions.items() if version.number == number)
    return next(names, "of an earlier release")


def _versions(release: Release) -> Html:
    titles = ("version", "what it is", "made from", "size", "scores", "aliases")
    numbers = {"size"}
    head = element(
        "tr",
        *(element("th", t, scope="col", class_="number" if t in numbers else None) for t in titles),
    )
    rows = [_version_row(release, name, one) for name, one in release.versions.items()]
    return element("table", element("thead", head), element("tbody", *rows))


def _version_row(release: Release, name: str, version: ReleasedVersion) -> Html:
    aliases = [alias for alias, number in release.aliases.items() if number == version.number]
    scores = [_score(version, place) for place in range(min(len(version.evaluations), 2))]
    audits = [f"{a.suite}: {a.verdict}" for a in version.audits if "/" not in a.suite]
    return element(
        "tr",
        element("th", f"{version.number} ", element("small", name), scope="row"),
        element("td", version.kind, " ", element("code", version.identity[:12])),
        element("td", ", ".join(version.made_from) or "nothing kept here"),
        element("td", humanize.size(sum(version.files.values())), class_="number"),
        element("td", joined([*scores, *audits], element("br")) or humanize.MISSING),
        element("td", element("b", ", ".join(sorted(aliases))) if aliases else humanize.MISSING),
    )


def _score(version: ReleasedVersion, place: int) -> str:
    row = version.evaluations[place]
    interval = ""
    if row.ci is not None:
        low, high = (humanize.fixed(end) for end in row.ci)
        interval = f" [{low}, {high}]"
    return f"{row.metric.replace('_', ' ')} {humanize.fixed(row.value)}{interval}"


def _log(release: Release) -> Html:
    head = element(
        "tr",
        *(element("th", title, scope="col") for title in ("", "what", "by", "said")),
    )
    rows = [
        element(
            "tr",
            element("th", str(entry.number), scope="row", class_="number"),
            element("td", _what(release, entry)),
            element("td", entry.actor),
            element("td", _said(entry)),
        )
        for entry in release.log
    ]
    return element("table", element("thead", head), element("tbody", *rows))


def _what(release: Release, entry: ReleaseEntry) -> str:
    details = entry.details
    done = DONE.get(entry.action, entry.action)
    alias = details.get("alias")
    number = details.get("version")
    if number is None:
        return f"{done}{f' of {alias}' if alias else ''}"
    version = f"version {number} ({_name_of(release, number)})"
    if entry.action == "rollback":
        return f"{alias} {done} to {version}"
    towards = {"promote": f" to {alias}", "hold": f" for {alias}", "refuse": f" for {alias}"}
    return f"{version} {done}{towards.get(entry.action, '')}"


def _said(entry: ReleaseEntry) -> str:
    details = entry.details
    if entry.action == "gates":
        return "; ".join(
            [*map(_rule, details["content"]["kpis"]), *map(_audit, details["content"]["audits"])]
        )
    parts = [
        str(details.get("gates") or ""),
        str(details.get("reason") or ""),
    ]
    if override := details.get("override"):
        parts.append(f"overridden by {override['name']}: {override['reason']}")
    return "; ".join(part for part in parts if part)


def _rule(gate: dict[str, object]) -> str:
    side = "above" if gate["direction"] == "higher" else "below"
    rules = []
    if gate["bound"] is not None:
        rules.append(f"{side} {gate['bound']}")
    if gate["max_loss"] is not None:
        rules.append(f"at most {gate['max_loss']} worse than what holds the alias")
    least = f"on {gate['min_samples']} rows or more"
    return f"{gate['metric']} of {gate['task']} {' and '.join(rules)}, {least}"


def _audit(suite: object) -> str:
    return f"audit {suite} passed"
