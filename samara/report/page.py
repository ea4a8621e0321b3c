"""Puts the sections together: one file with its style and script inside, and no way to the network.

A new stage adds one file to ``sections/`` with one function, and one entry to :data:`SECTIONS`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from samara.report.inputs import Inputs
from samara.report.markup import Html, element, escaped, joined
from samara.report.section import Section
from samara.report.sections.adaptation import adaptation
from samara.report.sections.arms import arms
from samara.report.sections.audits import audits
from samara.report.sections.corpus import corpus
from samara.report.sections.curves import curves
from samara.report.sections.demo_scale import demo_scale
from samara.report.sections.difference import difference
from samara.report.sections.federated import federated
from samara.report.sections.growth import growth
from samara.report.sections.headline import headline
from samara.report.sections.registry import registry
from samara.report.sections.reproduce import reproduce
from samara.report.sections.samples import samples
from samara.report.sections.shape import shape

SECTIONS: tuple[Callable[[Inputs], Section | None], ...] = (
    demo_scale,
    arms,
    difference,
    curves,
    growth,
    adaptation,
    audits,
    federated,
    registry,
    shape,
    samples,
    corpus,
    reproduce,
)
"""The page from top to bottom; a function that gives None has nothing to show."""

ASSETS = Path(__file__).parent


def render_page(inputs: Inputs) -> str:
    """The whole page. Equal inputs give the same bytes."""
    sections = [section for make in SECTIONS if (section := make(inputs)) is not None]
    return assemble(
        sections,
        title=inputs.config.title,
        headline=headline(inputs),
        contents=_contents(sections),
        version=_version(inputs),
    )


def assemble(
    sections: Sequence[Section], *, title: str, headline: Html, contents: Html, version: str
) -> str:
    """Sections under a headline, as one file with its style and script inside."""
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    return Template(template).substitute(
        title=escaped(title),
        policy=_policy(script[1]),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        contents=contents,
        headline=headline,
        sections=joined([section.render() for section in sections], "\n"),
        version=escaped(version),
    )


def page_colors() -> str:
    """The part of the page's style that names its colours, light and dark."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    return css[: css.index("* { box-sizing")]


def _policy(script: str) -> str:
    """Content security policy: nothing is loaded, and no script runs but the page's own.

    It holds whatever the page shows: a model's text could never fetch or run anything.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _contents(sections: list[Section]) -> Html:
    links = [element("a", section.title, href=f"#{section.id}") for section in sections]
    return element("nav", *links, aria_label="Contents")


def _version(inputs: Inputs) -> str:
    for arm in inputs.arms:
        packages = arm.environment.get("packages")
        if isinstance(packages, dict) and "samara" in packages:
            return f"Samara {packages['samara']}"
    return "Samara"
