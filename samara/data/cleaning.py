"""Which documents are kept: not too short, English prose, and no duplicate of one kept before."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from samara.data.batching import batches
from samara.data.config import CleaningConfig
from samara.data.documents import Document
from samara.data.near_duplicates import NearDuplicates

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4_000_000
"""Documents compared at once, and their length: bounds the memory."""

MIN_LETTERS = 0.7
"""Least share of ASCII letters (in words) among the characters that are not blank."""

MIN_FUNCTION_WORDS = 0.12
"""Least share of English function words among the words."""

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_FUNCTION_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been before both but by can could do
    does each either every few first for from has have he her here his how i if in into is it its
    many may more most must my new no not of on one only or other our over same she should so some
    such than that the their them then there these they this those to too two under until up used
    using was we were what when where whether which while who will with within without would you
    your
    """.split()
)


class Cleaner:
    """Filters documents and counts what it drops, by reason, in :attr:`dropped`.

    One cleaner sees all documents of a corpus, whatever their split: a document that repeats one
    kept earlier is dropped even if that one went to another split, so nothing leaks.
    """

    def __init__(self, config: CleaningConfig) -> None:
        self.config = config
        self.dropped: Counter[str] = Counter()
        self._exact: set[bytes] = set()
        threshold = config.near_duplicate_threshold
        self._near = NearDuplicates(threshold) if threshold is not None else None

    def clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents to keep, in order."""
        candidates = (document for document in documents if self._passes(document.text))
        for batch in batches(
            candidates,
            size=lambda document: len(document.text),
            max_items=BATCH_DOCUMENTS,
            max_size=BATCH_CHARACTERS,
        ):
            if self._near is None:
                yield from batch
                continue
            new = self._near.keep([document.text for document in batch])
            self.dropped["near_duplicate"] += new.count(False)
            yield from (document for document, keep in zip(batch, new, strict=True) if keep)

    def _passes(self, text: str) -> bool:
        problem = self._problem(text)
        if problem:
            self.dropped[problem] += 1
        return problem is None

    def _problem(self, text: str) -> str | None:
        if len(text) < max(1, self.config.min_characters):
            return "too_short"
        digest = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
        if digest in self._exact:
            return "exact_duplicate"
        problem = prose_problem(text) if self.config.english_only else None
        if problem is None:
            self._exact.add(digest)
        return problem


def prose_problem(text: str) -> str | None:
    """Why a text is not English prose: ``not_prose``, ``not_english``, or None if it is.

    Prose is mostly letters; English has a steady share of function words. The bounds were set by
    reading what they drop among docstrings: below them stand formulas, tables, signatures and
    lists of names; in ordinary English, letters are about 95 % and these words about 40 %.
    """
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    if not words or letters < MIN_LETTERS * sum(map(len, text.split())):
        return "not_prose"
    function_words = sum(map(_FUNCTION_WORDS.__contains__, map(str.lower, words)))
    if function_words < MIN_FUNCTION_WORDS * len(words):
        return "not_english"
    return None
