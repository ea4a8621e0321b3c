"""A section of the page: what its function gives back."""

from __future__ import annotations

from dataclasses import dataclass

from samara.report.markup import Html, element, paragraph


@dataclass(frozen=True, kw_only=True)
class Section:
    """A titled part of the page."""

    id: str
    """Its anchor."""
    title: str
    aside: Html
    """Beside the body on a wide screen, above it on a narrow one: what is seen, how to read it."""
    body: Html

    def render(self) -> Html:
        """The section as HTML."""
        return element(
            "section",
            element("div", element("h2", self.title), self.aside, class_="aside"),
            element("div", self.body, class_="body"),
            id=self.id,
        )


def missing(sentence: str) -> Html:
    """What stands where something is not there (yet)."""
    return paragraph(sentence, class_="missing")
