"""The prose of docstrings: what is taken out and what stays."""

from __future__ import annotations

import inspect

import pytest

from samara.data.docstrings import has_summary, prose_of


def prose(text: str) -> str:
    return prose_of(inspect.cleandoc(text))


def test_doctests_go_with_their_output() -> None:
    text = """Add two numbers.

    Examples
    --------
    >>> add(1, 2)
    3

    The sum is exact.

    >>> add(
    ...     1, 2)
    3
    """
    assert prose(text) == "Add two numbers.\n\nExamples\n\nThe sum is exact."


def test_code_blocks_go() -> None:
    text = """Do it like this::

        do_it()

            indented()

    Or so:

    .. code-block:: python

        do_it(2)

    Or in Markdown:

    ```python
    do_it(3)
    ```

    And that is all.
    """
    expected = "Do it like this:\n\nOr so:\n\nOr in Markdown:\n\nAnd that is all."
    assert prose(text) == expected


def test_unclosed_fence_takes_the_rest() -> None:
    assert prose("Text.\n\n```\ncode\n") == "Text."


def test_directives() -> None:
    text = """Return it.

    .. versionadded:: 3.1
       Not so long ago.
    .. note:: Mind this.
    .. warning::

        And that.
    .. math:: x = y
    .. _target:
    .. [1] A paper, 1999.

    Done.
    """
    assert prose(text).split("\n") == [
        "Return it.",
        "",
        "Mind this.",
        "",
        "    And that.",
        "",
        "Done.",
    ]


def test_roles_keep_the_name() -> None:
    text = "See :class:`~a.b.C`, :func:`.d`, :py:meth:`!e.f` and :ref:`the tour <tour>`."
    assert prose(text) == "See `C`, `d`, `e.f` and `the tour`."


def test_underlines_and_empty_headings_go() -> None:
    text = """
    Title
    =====

    Parameters
    ----------
    x : int
        A number.

    Examples
    --------
    >>> f(1)

    See Also
    --------
    """
    assert prose(text) == "Title\n\nParameters\nx : int\n    A number."


def test_nested_headings_stay() -> None:
    text = "Run it.\n\nNotes:\n    Example:\n        Of this.\n\nUsage::\n\n    run()\n"
    assert prose(text) == "Run it.\n\nNotes:\n    Example:\n        Of this."


def test_plain_text_is_untouched() -> None:
    text = "One sentence.\n\nAnother: with a colon, and `code`.\n  - a point"
    assert prose_of(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "hidden_size (`int`, *optional*): The width.",
        ":param x: A number.",
        "@param x A number.",
        "x: A number.",
        "**kwargs (dict): The rest.",
        "path - where it is",
        "Parameters\nx : float\n  A number.",
    ],
)
def test_parameter_lists_have_no_summary(text: str) -> None:
    assert not has_summary(text)


@pytest.mark.parametrize(
    "text", ["Return x: a number.", "Well-known ports (see RFC 1700): a list.", "A thing."]
)
def test_sentences_are_summaries(text: str) -> None:
    assert has_summary(text)
