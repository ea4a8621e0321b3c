"""Special tokens that an objective needs and a tokenizer may lack: mask, modes, sentinels.

They are appended after all the others, so every text keeps its ids and a prepared corpus stays
valid; the model gets that many more embedding rows. Text cannot spell them (see
:mod:`samara.data.tokenizer`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from samara.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, TextTokenizer
from samara.errors import DataError
from samara.runs import write_json

MASK = "<|mask|>"
"""The mask token of a tokenizer that has none of its own."""

ROLES = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token")
"""Special tokens that a Hugging Face tokenizer names by what they are for."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The special tokens of a tokenizer folder.

    Attributes:
        by_role: Spelling of those that the folder's configuration names (:data:`ROLES`).
        ids: Id of every special token by its spelling.
    """

    by_role: dict[str, str]
    ids: dict[str, int]

    @property
    def mask(self) -> str:
        """Spelling of the mask token: the tokenizer's own, else :data:`MASK`."""
        return self.by_role.get("mask_token", MASK)

    def id_of(self, *roles: str) -> int | None:
        """Id of the first of these roles that the tokenizer has; None without any."""
        return next((self.ids[self.by_role[role]] for role in roles if role in self.by_role), None)

    def ids_of(self, tokens: Sequence[str], *, needed_by: str) -> list[int]:
        """Ids of special tokens by spelling.

        Args:
            tokens: Their spellings.
            needed_by: What needs them, for the error.

        Raises:
            DataError: If the tokenizer lacks one.
        """
        for token in tokens:
            if token not in self.ids:
                raise DataError(
                    f"tokenizer: has no special token {token}, which {needed_by} needs; extend it "
                    "with samara.data.special_tokens.extend_tokenizer"
                )
        return [self.ids[token] for token in tokens]


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Read the special tokens of a tokenizer folder.

    Raises:
        DataError: If there is no readable tokenizer.
    """
    tokenizer = _open(folder)
    by_role: dict[str, str] = {}
    role_ids: dict[str, int] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        settings = _read_settings(folder / name)
        for role in ROLES:
            value = settings.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            token_id = tokenizer.token_to_id(value) if isinstance(value, str) else None
            if token_id is not None:
                by_role[role] = str(value)
                role_ids[by_role[role]] = int(token_id)
    added = tokenizer.get_added_tokens_decoder()
    ids = {token.content: id_ for id_, token in added.items() if token.special}
    # A role may be given to a token of the model's own vocabulary.
    return SpecialTokens(by_role=by_role, ids=ids | role_ids)


def extend_tokenizer(source: Path, folder: Path, *, tokens: Iterable[str]) -> TextTokenizer:
    """Copy a tokenizer and append the special tokens that it lacks.

    Args:
        source: A tokenizer folder.
        folder: Where the copy goes; must not exist.
        tokens: Spellings; new ids follow their order. :data:`MASK` also becomes the mask token.

    Returns:
        The copy. Ids and encodings of the source are unchanged in it.

    Raises:
        DataError: If the source is no tokenizer folder.
    """
    old = TextTokenizer.load(source)
    old.copy_to(folder)
    tokenizer = _open(folder)
    known = read_special_tokens(folder).ids
    missing = [token for token in dict.fromkeys(tokens) if token not in known]
    if missing:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in missing])
        tokenizer.save(str(folder / TOKENIZER_FILE))
    if MASK in missing:
        settings = _read_settings(folder / CONFIG_FILE)
        write_json(folder / CONFIG_FILE, {**settings, "mask_token": MASK})
    extended = TextTokenizer.load(folder)
    new_ids = [tokenizer.token_to_id(token) for token in missing]
    assert new_ids == list(range(old.vocab_size, old.vocab_size + len(missing))), new_ids
    return extended


def _open(folder: Path) -> Tokenizer:
    TextTokenizer.load(folder)  # for its errors
    return Tokenizer.from_file(str(folder / TOKENIZER_FILE))


def _read_settings(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
