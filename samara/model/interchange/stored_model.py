"""A model on disk, the same whatever the format it came from and goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samara.errors import CheckpointError
from samara.model.configuration import SamaraConfig
from samara.model.heads import CLASSIFICATION, head_of
from samara.model.interchange.stored_tensors import Tensors, in_memory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What every format reads and writes.

    Attributes:
        folder: Where it was read from (a file for some formats).
        format: Name of the format it was read from.
        config: Its design and special tokens.
        tensors: By Samara's names, all that ``config`` asks for and no more; a tied output matrix
            is not among them.
        files: What travels along unchanged, by file name: tokenizer, chat template, generation
            settings.
        name: What it is called where it is written.
    """

    folder: Path
    format: str
    config: SamaraConfig
    tensors: Tensors
    files: Mapping[str, bytes] = field(default_factory=dict)
    name: str = ""

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied matrix counted once."""
        return sum(tensor.num_elements for tensor in self.tensors.values())


def expected_tensors(config: SamaraConfig) -> Tensors:
    """Every tensor that a configuration asks for, by Samara's names, with its shape.

    Their values are not there: they lie on torch's meta device.
    """
    with torch.device("meta"):
        state = head_of(config).model_class(config).state_dict()
    if config.tie_word_embeddings:
        state.pop(HEAD, None)  # a classifier has none
    return {name: in_memory(tensor) for name, tensor in state.items()}


def described(config: SamaraConfig) -> dict[str, Any]:
    """Head, design and special tokens as plain data: what is equal in checkpoints of one model.

    How fresh weights would be drawn is left out, since not every format records it.
    """
    design = config.to_design().model_dump(mode="json", exclude={"initializer"})
    head = head_of(config)
    labels = {"labels": config.id2label} if head is CLASSIFICATION else {}
    return {"model": head.description, **labels, **design, **token_ids(config)}


def token_ids(config: SamaraConfig) -> dict[str, Any]:
    """The special tokens of a configuration, None where there is none.

    Formats write them out, since a reader fills absent ones with Llama's 1 and 2.
    """
    return {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def per_layer(widths: list[int] | None) -> list[int]:
    """One of the configuration's lists, which are always there once it is made."""
    assert widths is not None
    return widths


def without_tied_head(folder: Path, tensors: Tensors, *, embedding: str, head: str) -> Tensors:
    """Drop an output matrix that repeats the embedding it is tied to, as some writers store it.

    Raises:
        CheckpointError: If it differs from the embedding.
    """
    if head not in tensors or embedding not in tensors:
        return tensors
    if not torch.equal(tensors[head].load(), tensors[embedding].load()):
        raise CheckpointError(
            f"{folder}: config.json ties the output matrix to the embedding, but {head} differs "
            f"from {embedding}; set tie_word_embeddings to false if it was trained apart"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}
