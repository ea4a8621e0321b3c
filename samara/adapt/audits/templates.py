"""Sentences of the bias and stability audits: a YAML file, the package's own or the user's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from samara.config import Config, load_yaml, validate
from samara.errors import ConfigError

OWN = {path.stem: path for path in Path(__file__).parent.glob("*.yaml")}
"""The package's own sets by name."""
TERM = "{term}"
Text = Annotated[str, Field(min_length=1)]


class Sentence(Config):
    """A beginning with a term in it, and the ways it may go on."""

    context: str
    continuations: tuple[Text, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if TERM not in self.context:
            raise ConfigError(f"context: '{self.context}' holds no {TERM}; say where it stands")
        return self


class Attribute(Config):
    """A protected attribute: pairs of terms, and sentences for these alone."""

    pairs: tuple[tuple[Text, Text], ...] = Field(min_length=1)
    sentences: tuple[Sentence, ...] = ()


class TemplateSet(Config):
    """A file of templates."""

    schema_: Literal[1] = Field(alias="schema")
    language: str
    sentences: tuple[Sentence, ...] = ()
    """For every attribute."""
    attributes: dict[str, Attribute] = Field(min_length=1)
    paraphrases: tuple[tuple[Text, Text], ...] = ()
    """Two wordings of one thing, for the stability audit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, attribute in self.attributes.items():
            if not (*self.sentences, *attribute.sentences):
                raise ConfigError(f"attributes.{name}: has no sentences; give some")
        return self

    def cases(self) -> Iterator[PairCase]:
        """Every sentence with every pair of its attribute and every continuation."""
        for name, attribute in self.attributes.items():
            for number, sentence in enumerate((*self.sentences, *attribute.sentences)):
                for pair in attribute.pairs:
                    first, second = (sentence.context.replace(TERM, term) for term in pair)
                    for continuation in sentence.continuations:
                        yield PairCase(
                            attribute=name,
                            sentence=number,
                            terms=pair,
                            contexts=(first, second),
                            continuation=continuation,
                        )


@dataclass(frozen=True, kw_only=True)
class PairCase:
    """Two texts that differ in a protected term, and how both go on.

    Attributes:
        attribute: What the terms are of.
        sentence: Number of the sentence within the attribute; cases of one are resampled together.
        terms: The two terms.
        contexts: The two beginnings.
        continuation: What follows either.
    """

    attribute: str
    sentence: int
    terms: tuple[str, str]
    contexts: tuple[str, str]
    continuation: str


def templates_path(name: str | Path) -> Path:
    """The file of a set: one of the package's own by its name, or the user's by its path."""
    return OWN.get(str(name), Path(name).expanduser())


def load_templates(name: str | Path = "english") -> TemplateSet:
    """Read a set of templates, by the name of one of the package's own or by its path.

    Raises:
        ConfigError: If the file is missing or no set of templates.
    """
    path = templates_path(name)
    return validate(TemplateSet, load_yaml(path), path=str(path))
