"""Which documents are kept, and why the others are not."""

from __future__ import annotations

import pytest

from samara.data.cleaning import Cleaner, prose_problem
from samara.data.config import CleaningConfig
from samara.data.documents import Document

SENTENCE = "The seed of the elm is carried by the wind, and it falls where it will. "


def clean(*texts: str, **options: object) -> tuple[list[str], dict[str, int]]:
    cleaner = Cleaner(CleaningConfig(**options))  # type: ignore[arg-type]
    documents = [Document(id=str(i), text=text) for i, text in enumerate(texts)]
    kept = [document.id for document in cleaner.clean(documents)]
    return kept, {reason: count for reason, count in cleaner.dropped.items() if count}


def test_short_texts() -> None:
    assert clean("Too short.", SENTENCE) == (["1"], {"too_short": 1})
    assert clean("", "x", min_characters=0, english_only=False) == (["1"], {"too_short": 1})


def test_exact_duplicates_ignore_case_and_blanks() -> None:
    kept, dropped = clean(
        SENTENCE, "  " + SENTENCE.upper().replace(" ", "\n"), near_duplicate_threshold=None
    )
    assert (kept, dropped) == (["0"], {"exact_duplicate": 1})


def test_near_duplicates() -> None:
    words = [f"word{i}" for i in range(60)]
    text = "it is the " + " of the ".join(words)
    nearly = text.replace("word30", "other")
    assert clean(text, nearly) == (["0"], {"near_duplicate": 1})
    assert clean(text, nearly, near_duplicate_threshold=None) == (["0", "1"], {})
    assert clean(text, nearly, near_duplicate_threshold=1.0) == (["0", "1"], {})


def test_a_cleaner_remembers_between_calls() -> None:
    cleaner = Cleaner(CleaningConfig())
    assert [d.id for d in cleaner.clean([Document(id="v", text=SENTENCE)])] == ["v"]
    assert list(cleaner.clean([Document(id="t", text=SENTENCE)])) == []


@pytest.mark.parametrize(
    "text",
    [
        SENTENCE,
        "Return whether `func` is a coroutine function.",
        "Raised when a file or directory is requested but doesn't exist.",
        "Args:\n    x (int): The number of rows in the table.\n    y (int): The number of columns.",
    ],
)
def test_english_is_prose(text: str) -> None:
    assert prose_problem(text) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("La semilla del olmo vuela con el viento y cae donde quiere la suerte.", "not_english"),
        ("Der Samen der Ulme fliegt mit dem Wind und landet, wo er will.", "not_english"),
        ("background bd bg borderwidth cursor height highlightcolor relief", "not_english"),
        ("榆树的种子随风飘散，落在任何地方，然后在春天发芽。" * 3, "not_prose"),
        ("Семя вяза летит по ветру и падает, где захочет." * 2, "not_prose"),
        ("f(x) = (x ** 2 + 3 * x - 7) / (x - 1) if x != 1 else 0", "not_prose"),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20", "not_prose"),
    ],
)
def test_other_texts_are_not(text: str, problem: str) -> None:
    assert prose_problem(text) == problem
    assert clean(text) == ([], {problem: 1})
    assert clean(text, english_only=False) == (["0"], {})
