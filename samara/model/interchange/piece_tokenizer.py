"""A SentencePiece-BPE vocabulary (pieces with scores) as a Hugging Face tokenizer, and back.

SentencePiece merges the adjacent pair whose joined piece has the highest score; Hugging Face's BPE
takes the pair that comes first in a list. The list of all pairs whose join is a piece, ordered by
that piece's score, makes them the same. Characters that are no piece become their UTF-8 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

SPACE = "\u2581"  # ▁, SentencePiece's visible space
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A SentencePiece-BPE vocabulary.

    Attributes:
        pieces: By id, spaces written as ``▁``; the bytes are ``<0x00>`` to ``<0xFF>``.
        scores: By id; higher merges first.
        unk, bos, eos: Ids of the special pieces.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    unk: int
    bos: int
    eos: int

    @property
    def special(self) -> frozenset[str]:
        """The pieces that no text contains."""
        return frozenset(self.pieces[i] for i in (self.unk, self.bos, self.eos))


def possible_merges(pieces: Sequence[str], *, never: frozenset[str]) -> list[tuple[str, str]]:
    """All pairs of pieces whose join is a piece, in no useful order.

    Args:
        pieces: The vocabulary.
        never: Pieces that take no part: special ones and bytes.
    """
    known = {piece for piece in pieces if piece not in never}
    return [
        (piece[:cut], piece[cut:])
        for piece in known
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def hugging_face_files(vocabulary: Pieces) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer folder that encodes and decodes as the vocabulary does.

    It puts a space before the text, as Llama's does, and ``bos`` before that.
    """
    ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
    merges = possible_merges(vocabulary.pieces, never=vocabulary.special | BYTES)
    merges.sort(key=lambda pair: (-vocabulary.scores[ids["".join(pair)]], ids[pair[0]]))
    names = {key: vocabulary.pieces[getattr(vocabulary, key)] for key in ("unk", "bos", "eos")}
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=names["unk"], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names.values()])
    bos = names["bos"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary.bos)]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{key}_token": name for key, name in names.items()},
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
    }


def scores_of(tokenizer: dict[str, Any]) -> list[float] | None:
    """Scores with which SentencePiece does what a Hugging Face BPE does; None: there are none.

    Args:
        tokenizer: The content of ``tokenizer.json``.
    """
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = frozenset(token["content"] for token in tokenizer.get("added_tokens", []))
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1))
        for merge in tokenizer["model"]["merges"]
    ]
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault("".join(merge), position)
    # SentencePiece would also make joins that the list leaves out, and it knows one rank a piece.
    made = {merge for merge in merges if "".join(merge) not in special | BYTES}
    if set(possible_merges(list(vocabulary), never=special | BYTES)) != made:
        return None
    by_rank = [rank["".join(merge)] for merge in merges]
    if by_rank != sorted(by_rank):
        return None
    scores = [-float(len(merges))] * (max(vocabulary.values()) + 1)
    for piece, position in rank.items():
        scores[vocabulary[piece]] = -float(position)
    return scores
