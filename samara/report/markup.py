"""HTML that cannot be broken by what it shows: a text is escaped unless it is :class:`Html`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# HTML forbids these even as escapes; a model may well emit them.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")
_VOID = frozenset({"br", "col", "hr", "meta", "wbr"})


class Html(str):
    """A text that is markup already. Formatting it into an f-string gives a plain text again."""

    __slots__ = ()


Child = str | None
Attribute = str | int | float | bool | None


def escaped(text: str) -> Html:
    """Make a text safe as content and as attribute value; control characters become U+FFFD."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n")), quote=True))


def element(tag: str, *children: Child, **attributes: Attribute) -> Html:
    """One element.

    Args:
        tag: Its name.
        children: Content in order; a plain text is escaped, None is left out.
        attributes: ``class_`` means class, ``aria_label`` means aria-label; True stands without a
            value, None and False are left out.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{together(*children)}</{tag}>")


def together(*children: Child) -> Html:
    """Content one after the other."""
    return Html("".join(escaped(child) for child in children if child is not None))


def joined(children: Iterable[Child], separator: str = "") -> Html:
    """Content with a separator between."""
    kept = [escaped(child) for child in children if child is not None]
    return Html(escaped(separator).join(kept))


def paragraph(*children: Child, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *children, class_=class_)


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    key = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {key}="{escaped(text)}"'
