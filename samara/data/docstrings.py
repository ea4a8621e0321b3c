"""The prose of a docstring: its text without examples in code and without markup.

What goes: doctest examples, fenced and reStructuredText code blocks, directives that hold no prose
(``.. math::``, ``.. versionadded::``, footnotes, link targets), lines of punctuation alone (heading
underlines, table rules), and headings left with nothing below them. What stays: sentences, and the
descriptions of parameters and results. Cross-references (``:class:`~a.b.C```) keep the name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"(`{3,}|~{3,})")
_DIRECTIVE = re.compile(r"\.\.\s+([\w:+.-]+?)::\s*(.*)")
_EXPLICIT_MARKUP = re.compile(r"\.\.(\s|$)")
_ROLE = re.compile(r":[a-zA-Z][\w:+.-]*:`([^`]+)`")
_PROMPT = re.compile(r">>>|In \[\d+\]:|\$ ")
_PARAMETER = re.compile(r"[*\w.]+\s*(\([^)]*\)|\[[^]]*\])?\s*(:|--|-)(\s|$)|[:@]\w+")

PROSE_DIRECTIVES = frozenset(
    {"note", "warning", "tip", "important", "caution", "attention", "hint", "danger", "error"}
    | {"seealso", "admonition", "topic", "rubric", "deprecated"}
    | {"attribute", "class", "data", "exception", "function", "method", "module", "option"}
)
"""Directives whose body is text to read; any other one is dropped with its body."""

HEADINGS = frozenset(
    {"args", "arguments", "attributes", "code example", "code examples", "example", "example usage"}
    | {"examples", "explanation", "keyword args", "keyword arguments", "methods", "note", "notes"}
    | {"other parameters", "parameters", "raises", "reference", "references", "returns", "see also"}
    | {
        "shape",
        "usage",
        "usage example",
        "usage examples",
        "warning",
        "warnings",
        "warns",
        "yields",
    }
)
"""Headings of docstring sections, which go when nothing is left below them."""


def prose_of(docstring: str) -> str:
    """Return the prose of a docstring whose indentation is already clean; "" if it has none."""
    lines = list(_without_code(docstring.expandtabs().split("\n")))
    lines = [_ROLE.sub(_role_text, line.rstrip()) for line in lines]
    lines = [line for line in lines if not line or any(map(str.isalnum, line))]
    text = "\n".join(_without_empty_headings(lines))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def has_summary(text: str) -> bool:
    """Whether a text starts by saying what it documents, rather than with a list of parameters."""
    return _PARAMETER.match(text) is None and not _is_heading(text.partition("\n")[0])


def _without_code(lines: list[str]) -> Iterator[str]:
    """The lines outside code blocks and directives without prose; a blank one in their place."""
    position = 0
    while position < len(lines):
        line = lines[position]
        content = line.lstrip()
        indent = len(line) - len(content)
        position += 1
        if fence := _FENCE.match(content):
            position = _after_fence(lines, position, fence[1])
            yield ""
        elif _PROMPT.match(content):
            while position < len(lines) and lines[position].strip():
                position += 1
        elif directive := _DIRECTIVE.match(content):
            if directive[1] in PROSE_DIRECTIVES:
                yield " " * indent + directive[2]
            else:
                position = _after_block(lines, position, indent)
                yield ""
        elif _EXPLICIT_MARKUP.match(content):
            position = _after_block(lines, position, indent)
            yield ""
        elif content.rstrip().endswith("::"):
            if content.strip() != "::":
                yield line.rstrip()[:-1]
            position = _after_block(lines, position, indent)
            yield ""
        else:
            yield line


def _after_fence(lines: list[str], position: int, fence: str) -> int:
    """The position after the closing fence; the end of the text if it never closes."""
    for number in range(position, len(lines)):
        if lines[number].strip().startswith(fence):
            return number + 1
    return len(lines)


def _after_block(lines: list[str], position: int, indent: int) -> int:
    """The position of the first line that is not blank and not indented more than ``indent``."""
    while position < len(lines):
        line = lines[position]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        position += 1
    return position


def _role_text(match: re.Match[str]) -> str:
    target = match[1].strip()
    title = re.fullmatch(r"(.+?)\s*<[^>]*>", target, flags=re.DOTALL)
    if title:
        target = title[1]
    elif target.startswith("~"):
        target = target.rpartition(".")[2].lstrip("~")
    return f"`{target.lstrip('!.')}`"


def _without_empty_headings(lines: list[str]) -> Iterator[str]:
    """Drop a heading directly before the next heading at its depth or the end of the text."""
    for number, line in enumerate(lines):
        if _is_heading(line):
            following = next((other for other in lines[number + 1 :] if other.strip()), None)
            if following is None or (_is_heading(following) and _depth(following) <= _depth(line)):
                continue
        yield line


def _is_heading(line: str) -> bool:
    return line.strip(" :*").lower() in HEADINGS


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
