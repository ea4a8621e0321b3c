"""How to get the same page again: commands, commit, versions, machine, hashes, places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samara.config import load_yaml
from samara.report import humanize
from samara.report.inputs import Arm, Inputs
from samara.report.markup import Html, element, paragraph, together
from samara.report.measures import named
from samara.report.run_files import without_paths
from samara.report.section import Section


def reproduce(inputs: Inputs) -> Section | None:
    """Everything that went into the figures."""
    aside = together(
        paragraph(
            "Each folder holds the resolved recipe of its stage. On the same machine and versions "
            "it gives the same numbers, bit for bit on the CPU; times vary."
        ),
        paragraph(
            "Energy and cost are estimates: training time times the draw and the price that the "
            "device profile states. Nothing read a power meter."
        ),
    )
    environment: Mapping[str, Any] = next(
        (arm.environment for arm in inputs.arms if arm.environment), {}
    )
    body = together(
        element("pre", element("code", "\n".join(_commands(inputs))), tabindex=0),
        element(
            "div",
            _facts("Made by", _software(environment)),
            _facts("On", _machine(inputs, environment)),
            class_="pair",
        ),
        _places(inputs),
    )
    return Section(id="reproduce", title="Do it again", aside=aside, body=body)


def _commands(inputs: Inputs) -> list[str]:
    """Commands for the folder in which the runs were named, or above the report's folder."""
    folders = inputs.config.pretraining
    here = Path(next(iter(folders.values()), str(inputs.run.path)))
    base = inputs.run.path.resolve().parent
    commands = [f"# in {base.name}/" if here.is_absolute() else "# where it was run before"]
    if _is_chain(base / "recipe.yaml"):
        chain = "recipe.yaml" if here.is_absolute() else f"{here.parent.as_posix()}/recipe.yaml"
        commands += [f"samara run {chain} --out again", "", "# one part of it"]
    for folder in [*list(folders.values())[:1], str(inputs.run.path)]:
        place = inputs.shown_path(folder) if Path(folder).is_absolute() else folder
        commands.append(f"samara run {place}/recipe.yaml --out {Path(folder).name}-again")
    return commands


def _is_chain(path: Path) -> bool:
    return path.exists() and "stages" in load_yaml(path)


def _software(environment: Mapping[str, Any]) -> list[tuple[str, str | Html]]:
    facts: list[tuple[str, str | Html]] = []
    commit = environment.get("commit")
    if commit:
        facts.append(("commit", element("code", str(commit))))
    if environment.get("python"):
        facts.append(("Python", str(environment["python"])))
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        facts += [(str(name), str(version)) for name, version in packages.items()]
    return facts


def _machine(inputs: Inputs, environment: Mapping[str, Any]) -> list[tuple[str, str | Html]]:
    facts: list[tuple[str, str | Html]] = []
    if environment.get("cpu"):
        cores = environment.get("cpu_count")
        count = f", {humanize.plural(cores, 'core')}" if isinstance(cores, int) else ""
        facts.append(("processor", f"{environment['cpu']}{count}"))
    if isinstance(environment.get("memory_bytes"), int):
        facts.append(("memory", humanize.size(environment["memory_bytes"])))
    if environment.get("system"):
        facts.append(("system", str(environment["system"])))
    summaries = [arm.summary for arm in inputs.arms if arm.summary]
    for title, found in (
        ("trained on", {s.device for s in summaries}),
        ("device profile", {without_paths(s.device_profile) for s in summaries}),
        ("assumed draw", {_watts(s.energy_kwh, s.seconds) for s in summaries}),
    ):
        if found:
            facts.append((title, humanize.listed(sorted(found))))
    return facts


def _watts(energy_kwh: float | None, seconds: float) -> str:
    if not energy_kwh or not seconds:
        return "unknown"
    return f"{humanize.significant(energy_kwh * 3.6e6 / seconds)}{humanize.GAP}W"


def _facts(title: str, facts: list[tuple[str, str | Html]]) -> Html | None:
    if not facts:
        return None
    rows = [
        element("div", element("dt", name), element("dd", value), class_="fact")
        for name, value in facts
    ]
    return element("div", element("h3", title), element("dl", *rows))


def _places(inputs: Inputs) -> Html:
    """Where the files lie, with the hash of what each folder holds."""
    rows: list[tuple[str | Html, str, str]] = []
    if inputs.corpus is not None and inputs.config.corpus is not None:
        folder = inputs.shown_path(inputs.config.corpus)
        rows.append(("corpus", f"{folder}/", inputs.corpus.hash))
    rows += [_place(arm, inputs) for arm in inputs.arms]
    if inputs.evaluation is not None and inputs.config.evaluation is not None:
        folder = inputs.shown_path(inputs.config.evaluation)
        rows.append(("evaluation", f"{folder}/results.json", inputs.evaluation.corpus_hash))
    head = element(
        "tr", *(element("th", title, scope="col") for title in ("what", "where", "hash"))
    )
    body = [
        element(
            "tr",
            element("th", what, scope="row"),
            element("td", element("code", where)),
            element("td", element("code", digest[:16])),
        )
        for what, where, digest in rows
    ]
    base = inputs.run.path.resolve().parent.name
    table = element("table", element("thead", head), element("tbody", *body), class_="places")
    return element(
        "figure",
        element("h3", "Where it lies"),
        element("div", table, class_="scroll"),
        element(
            "figcaption",
            "Paths start in ",
            element("code", f"{base}/"),
            "; hashes are SHA-256, of the weights for models, of documents and tokenizer for the "
            "corpus; the evaluation shows the corpus it read.",
        ),
    )


def _place(arm: Arm, inputs: Inputs) -> tuple[Html, str, str]:
    folder = inputs.shown_path(arm.run.path)
    if arm.summary is None:
        return named(arm), f"{folder}/", humanize.MISSING
    return named(arm), f"{folder}/model/", arm.summary.weights_hash
