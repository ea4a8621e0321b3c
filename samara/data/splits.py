"""The one split by document that every stage shares."""

from __future__ import annotations

import hashlib
from typing import Literal

from samara.data.config import SplitConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def split_of(document_id: str, config: SplitConfig, *, validation_given: bool = False) -> Split:
    """The split of a document, from a hash of the salt and its id.

    Args:
        document_id: The document's id.
        config: Fractions and salt.
        validation_given: Whether the validation split comes from files of its own, so that this
            document may only go to training or test.
    """
    digest = hashlib.sha256(f"{config.salt}\0{document_id}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < config.test_fraction:
        return "test"
    if not validation_given and position < config.test_fraction + config.validation_fraction:
        return "validation"
    return "train"
