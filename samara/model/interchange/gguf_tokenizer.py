"""A Hugging Face tokenizer in GGUF's terms, or the reason why llama.cpp cannot run it.

llama.cpp knows two families that Samara's models use: byte-level BPE, where the file names one of
the runtime's built-in ways to cut text before merging, and SentencePiece-BPE, where pieces have
scores. A tokenizer of which the runtime would make other tokens is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from samara.errors import CheckpointError
from samara.model.configuration import SamaraConfig
from samara.model.interchange.piece_tokenizer import BYTES, SPACE, scores_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's token types."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTTERS = {  # in tokenizer.json: "gpt2" is ByteLevel with its regex, "bytes" without
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (LLAMA3_PATTERN, "bytes"): "llama-bpe",
}
"""How a tokenizer cuts text before merging: what llama.cpp calls it."""
KEEPS_WHOLE_WORDS = {"llama-bpe"}
"""Cutters after which llama.cpp takes a word that is an entry without merging (ignore_merges)."""


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """What a GGUF file says about its tokenizer.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        cutter: llama.cpp's name of the way text is cut before merging.
        tokens: One per row of the embedding; rows without a token get a placeholder.
        types: GGUF's type of each.
        merges: For ``gpt2``, in order.
        scores: For ``llama``, by id.
        space_first: A space is put before the text.
        adds_bos, adds_eos: Whether encoding puts these around the text.
        chat_template: Jinja, or None.
    """

    model: str
    cutter: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_first: bool
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def gguf_tokenizer(folder: Path, files: Mapping[str, bytes], config: SamaraConfig) -> GgufTokenizer:
    """Translate a tokenizer folder's files.

    Raises:
        CheckpointError: If there is none, or llama.cpp has no equal of it.
    """
    if "tokenizer.json" not in files:
        raise CheckpointError(
            f"{folder}: holds no tokenizer.json, and llama.cpp runs no model without its "
            "tokenizer; put the one it was trained with there"
        )
    path = folder / "tokenizer.json"
    try:
        content: dict[str, Any] = json.loads(files["tokenizer.json"])
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= config.vocab_size:
        raise CheckpointError(
            f"{path}: has an entry {max(vocabulary.values())}, the embedding only "
            f"{config.vocab_size} rows; it is of another model"
        )
    if content["model"]["type"] != "BPE":
        raise _no_equal(path, f"its model is {content['model']['type']}")
    build = _sentencepiece if content["model"].get("byte_fallback") else _byte_level
    framed = tokenizer.encode("a").ids
    return GgufTokenizer(
        **build(path, content),
        **_entries(vocabulary, content, config.vocab_size),
        adds_bos=framed[:1] == [config.bos_token_id],
        adds_eos=framed[-1:] == [config.eos_token_id],
        chat_template=_chat_template(files),
    )


def _no_equal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: llama.cpp has no equal of this tokenizer ({why}); known are byte-level BPE cut "
        f"as {', '.join(CUTTERS.values())}, and SentencePiece-BPE"
    )


def _byte_level(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("normalizer") is not None:
        raise _no_equal(path, f"it normalises text by {content['normalizer']['type']}")
    steps = content.get("pre_tokenizer") or {"type": "none"}
    cutter = CUTTERS.get(_cuts(steps))
    if cutter is None:
        raise _no_equal(path, f"it cuts text by {json.dumps(steps, ensure_ascii=False)}")
    if bool(content["model"].get("ignore_merges")) != (cutter in KEEPS_WHOLE_WORDS):
        raise _no_equal(path, f"ignore_merges is {content['model'].get('ignore_merges')}")
    merges = [" ".join(m) if isinstance(m, list) else m for m in content["model"]["merges"]]
    if not merges:
        raise _no_equal(path, "it merges nothing")
    return {"model": "gpt2", "cutter": cutter, "merges": merges, "space_first": False}


def _cuts(steps: Mapping[str, Any]) -> tuple[str, ...]:
    """The ways in which a pre-tokenizer cuts, one after the other; ``?`` for an unknown one."""
    match steps:
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return tuple(cut for part in parts for cut in _cuts(part))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return ("gpt2",)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return ("bytes",)
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
            return ("?",) if steps.get("invert") else (pattern,)
    return ("?",)


def _sentencepiece(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    space_first = _puts_space_first(content)
    if space_first is None:
        raise _no_equal(path, "its normalizer is not SentencePiece's")
    if not content["model"]["vocab"].keys() >= BYTES:
        raise _no_equal(path, "not all 256 bytes are entries")
    scores = scores_of(dict(content))
    if scores is None:
        raise _no_equal(path, "its merges follow from no scores of its pieces")
    return {"model": "llama", "cutter": "default", "scores": scores, "space_first": space_first}


def _puts_space_first(content: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before the text; None if spaces are not written as SentencePiece's."""
    normalizer, cutter = content.get("normalizer"), content.get("pre_tokenizer")
    visible = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if cutter is None:
        if normalizer == {"type": "Sequence", "normalizers": [prepend, visible]}:
            return True
        plain = (visible, {"type": "Sequence", "normalizers": [visible]})
        return False if normalizer in plain else None
    match normalizer, cutter:
        case None, {"type": "Metaspace", "replacement": "\u2581", "split": False}:
            return bool(cutter.get("prepend_scheme", "always") != "never")
    return None


def _entries(
    vocabulary: Mapping[str, int], content: Mapping[str, Any], num_rows: int
) -> dict[str, Any]:
    """Spelling and type of the token of every row of the embedding."""
    added = {token["content"]: bool(token["special"]) for token in content.get("added_tokens", [])}
    unknown = content["model"].get("unk_token")
    tokens = [f"[PAD{row}]" for row in range(num_rows)]
    types = [UNUSED] * num_rows
    for token, row in vocabulary.items():
        tokens[row] = token
        if token == unknown:
            types[row] = UNKNOWN
        elif token in added:
            types[row] = CONTROL if added[token] else USER_DEFINED
        else:
            types[row] = BYTE if token in BYTES else NORMAL
    return {"tokens": tokens, "types": types}


def _chat_template(files: Mapping[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
