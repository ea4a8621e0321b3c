"""Near-duplicate documents: MinHash signatures of word 5-grams, found by banding (LSH).

Two documents' Jaccard similarity is the share of word 5-grams they have in common. The share of
equal entries in their MinHash signatures estimates it (Broder, 1997); signatures are cut into bands
and only documents that agree on a whole band are compared. All hashing is vectorised numpy over
many documents at once and depends on no random state, so results repeat everywhere.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUM_PERMUTATIONS = 128
"""Entries of a signature: the estimate's standard deviation is at most 0.5 / sqrt(128) = 0.044."""

NGRAM_WORDS = 5

BAND_RECALL = 0.99
"""Chance that a pair exactly at the threshold shares a band; more similar pairs have more."""

UintArray = npt.NDArray[np.uint64]

MAX_REMEMBERED_WORDS = 2**20
"""Word hashes kept at hand; more are forgotten and computed again."""

_WORD = re.compile(r"\w+")


class NearDuplicates:
    """Remembers the documents kept so far and tells whether a new one is nearly one of them.

    Memory: about 3 KB for each kept document at a threshold of 0.8.
    """

    def __init__(self, threshold: float) -> None:
        """Start empty.

        Args:
            threshold: Estimated Jaccard similarity, in (0, 1], from which documents are the same.
        """
        self.threshold = threshold
        self._rows = _band_rows(threshold)
        self._bands = NUM_PERMUTATIONS // self._rows
        self._multipliers, self._increments = _hash_parameters()
        self._words: dict[str, int] = {}
        self._signatures: list[npt.NDArray[np.uint32]] = []
        # Band key -> the kept documents that have it. One table serves all bands: the band's
        # number is mixed into the key.
        self._tables: dict[int, int | list[int]] = {}

    def keep(self, texts: Sequence[str]) -> list[bool]:
        """Say for each text, in order, whether it is new; the new ones are remembered.

        A text of no words at all is new.
        """
        signatures = self._sign(texts)
        keys = self._band_keys(signatures).tolist()
        return [self._keep_one(signatures[i], keys[i]) for i in range(len(texts))]

    def _keep_one(self, signature: npt.NDArray[np.uint32], keys: list[int]) -> bool:
        candidates: set[int] = set()
        for key in keys:
            found = self._tables.get(key)
            if isinstance(found, int):
                candidates.add(found)
            elif found is not None:
                candidates.update(found)
        if candidates:
            kept = np.stack([self._signatures[index] for index in candidates])
            if (kept == signature).mean(axis=1).max() >= self.threshold:
                return False
        number = len(self._signatures)
        self._signatures.append(signature)
        for key in keys:
            found = self._tables.get(key)
            if found is None:
                self._tables[key] = number
            elif isinstance(found, int):
                self._tables[key] = [found, number]
            else:
                found.append(number)
        return True

    def _sign(self, texts: Sequence[str]) -> npt.NDArray[np.uint32]:
        """MinHash signatures (len(texts), NUM_PERMUTATIONS)."""
        grams, starts = self._ngrams(texts)
        signatures = np.empty((len(texts), NUM_PERMUTATIONS), dtype=np.uint32)
        hashed = np.empty_like(grams)
        for column in range(NUM_PERMUTATIONS):
            np.multiply(grams, self._multipliers[column], out=hashed)
            hashed += self._increments[column]
            hashed >>= np.uint64(32)
            signatures[:, column] = np.minimum.reduceat(hashed, starts)
        return signatures

    def _ngrams(self, texts: Sequence[str]) -> tuple[UintArray, npt.NDArray[np.int64]]:
        """Hashes of the word n-grams of all texts, end to end, and where each text's begin.

        A text of fewer words than an n-gram is one n-gram.
        """
        words = self._words
        if len(words) > MAX_REMEMBERED_WORDS:
            words.clear()
        ids: list[int] = []
        lengths = np.empty(len(texts), dtype=np.int64)
        for number, text in enumerate(texts):
            found = _WORD.findall(text.lower())
            # Padding with an empty word gives short texts one n-gram.
            found += [""] * (NGRAM_WORDS - len(found))
            for word in found:
                value = words.get(word)
                if value is None:
                    value = words[word] = _word_hash(word)
                ids.append(value)
            lengths[number] = len(found)
        hashes = np.array(ids, dtype=np.uint64)
        ends = np.cumsum(lengths)
        count = len(hashes) - NGRAM_WORDS + 1
        grams = np.zeros(count, dtype=np.uint64)
        for offset in range(NGRAM_WORDS):
            grams *= np.uint64(0x9E3779B97F4A7C15)
            grams += hashes[offset : offset + count]
        # n-grams that run on into the next text belong to neither.
        inside = np.ones(count, dtype=bool)
        for offset in range(1, NGRAM_WORDS):
            inside[ends[:-1] - offset] = False
        starts = np.concatenate([[0], np.cumsum(lengths - (NGRAM_WORDS - 1))[:-1]])
        return _mix(grams[inside]), starts

    def _band_keys(self, signatures: npt.NDArray[np.uint32]) -> UintArray:
        """One 64-bit key per text and band."""
        used = signatures[:, : self._bands * self._rows].astype(np.uint64)
        banded = used.reshape(len(signatures), self._bands, self._rows)
        keys = np.broadcast_to(np.arange(self._bands, dtype=np.uint64), banded.shape[:2]).copy()
        for row in range(self._rows):
            keys = _mix(keys * np.uint64(0x9E3779B97F4A7C15) + banded[:, :, row])
        return keys


def _band_rows(threshold: float) -> int:
    """The most rows per band, hence the fewest false candidates, that keep BAND_RECALL."""
    for rows in range(NUM_PERMUTATIONS, 1, -1):
        missed = (1.0 - threshold**rows) ** (NUM_PERMUTATIONS // rows)
        if 1.0 - missed >= BAND_RECALL:
            return rows
    return 1


def _hash_parameters() -> tuple[UintArray, UintArray]:
    """Odd multipliers and increments of the multiply-shift hash functions (Dietzfelbinger)."""
    numbers = _mix(np.arange(1, 2 * NUM_PERMUTATIONS + 1, dtype=np.uint64))
    return numbers[:NUM_PERMUTATIONS] | np.uint64(1), numbers[NUM_PERMUTATIONS:]


def _word_hash(word: str) -> int:
    data = word.encode("utf-8")
    return zlib.crc32(data) << 32 | zlib.crc32(data, 0x5A17A4A)


def _mix(values: UintArray) -> UintArray:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
