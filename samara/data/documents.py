"""A document: one text with its labels, the unit that is cleaned, split and counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass

LABELS = ("package", "module", "name", "summary")
"""Fields that a JSON Lines record, a Parquet row or a hub row may bring beside its text and id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text.

    Attributes:
        id: Unique and stable: where it came from. Its hash decides the split.
        text: The text itself.
        package: What it belongs to (a distribution, a speaker, a client); "" where unknown.
        module: The dotted module or finer place in the package; "" where unknown.
        name: The qualified name of what it documents, or a title; "" where unknown.
        summary: The first line.
    """

    id: str
    text: str
    package: str = ""
    module: str = ""
    name: str = ""
    summary: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain data, as written to ``documents/*.jsonl``."""
        return asdict(self)


def first_line(text: str) -> str:
    """The first line of a text that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def readable(text: str) -> str:
    """The text with Unix line ends and without lone surrogates, which no file can hold."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
