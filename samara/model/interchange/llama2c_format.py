"""llama2.c checkpoints, reading only: the version-0 ``.bin`` file, or a folder with Meta's names.

Both hold Llama's architecture as Meta writes it: rotary pairs are neighbours (2i, 2i + 1), not
halves (i, i + e / 2), so the rows of each query and key head are reordered. The tokenizer file
(``tokenizer.bin``, ``tok512.bin``, …) or its JSON twin beside the weights becomes a Hugging Face
tokenizer.

Shapes: d hidden, e head width, f FFN width, v vocabulary.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samara.errors import CheckpointError
from samara.model.configuration import SamaraConfig
from samara.model.interchange.hf_folder import CONFIG, WEIGHTS, read_config, read_tensors
from samara.model.interchange.llama_format import parse_llama_config
from samara.model.interchange.piece_tokenizer import SPACE, Pieces, hugging_face_files
from samara.model.interchange.stored_model import (
    EMBEDDING,
    HEAD,
    StoredModel,
    expected_tensors,
    per_layer,
)
from samara.model.interchange.stored_tensors import StoredTensor, Tensors, check_fit
from samara.runs import read_json

HEADER = struct.Struct("<7i")
NEW_MAGIC = 0x616B3432
"""First four bytes of versions 1 and up ("ak42")."""
EPS, THETA = 1e-5, 10000.0
"""llama2.c compiles these in; the file does not hold them."""
UNK, BOS, EOS = 0, 1, 2

LAST_NORM = "model.norm.weight"
OUTSIDE = {EMBEDDING: "tok_embeddings.weight", LAST_NORM: "norm.weight", HEAD: "output.weight"}
META_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
"""Per layer, in the order in which the ``.bin`` file stacks them."""


def read_llama2c(path: Path) -> StoredModel:
    """Read a llama2.c ``.bin`` file, or a folder with Meta's names, and the tokenizer beside it.

    Raises:
        CheckpointError: If it is not whole, or of another version.
    """
    if path.is_file():
        config, found = _read_bin(path)
    else:
        config, found = _read_folder(path)
    tensors = {}
    for name in expected_tensors(config):
        tensors[name] = found[meta_name(name)]
        for projection, heads in (
            ("q_proj", per_layer(config.num_query_heads)[0]),
            ("k_proj", per_layer(config.num_kv_heads)[0]),
        ):
            if projection in name:
                tensors[name] = half_split_rows(tensors[name], heads)
    folder = path if path.is_dir() else path.parent
    return StoredModel(
        folder=path,
        format="llama2c",
        config=config,
        tensors=tensors,
        files=_tokenizer_files(folder, config.vocab_size),
    )


def meta_name(name: str) -> str:
    """Meta's name of one of Samara's tensors."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, *module, weight = name.split(".")
    return f"layers.{layer}.{META_NAMES['.'.join(module)]}.{weight}"


def half_split_rows(tensor: StoredTensor, num_heads: int) -> StoredTensor:
    """Reorder the rows of each head from pairs (2i, 2i + 1) to pairs (i, i + e / 2)."""

    def reorder(matrix_rd: Tensor) -> Tensor:
        pairs = matrix_rd.view(num_heads, -1, 2, matrix_rd.shape[1])
        return pairs.transpose(1, 2).flatten(0, 2)

    return tensor.map(reorder)


# --- weights ----------------------------------------------------------------------------------


def _read_folder(folder: Path) -> tuple[SamaraConfig, Tensors]:
    if folder.is_dir() and not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder}: holds no {WEIGHTS}; for a llama2.c .bin file give the file itself"
        )
    config = parse_llama_config(folder / CONFIG, read_config(folder))
    found: Tensors = read_tensors(folder)
    expected = {meta_name(name): tensor for name, tensor in expected_tensors(config).items()}
    check_fit(folder, found=found, expected=expected)
    return config, found


def _read_bin(path: Path) -> tuple[SamaraConfig, Tensors]:
    """Tensors follow each other in a fixed order, then rotary tables to skip, then the head."""
    config = _read_header(path)
    expected = expected_tensors(config)
    layers = range(config.num_hidden_layers)
    stacked = [f"model.layers.{i}.{module}.weight" for module in META_NAMES for i in layers]
    order = [EMBEDDING, *stacked, LAST_NORM, *([HEAD] if HEAD in expected else [])]
    found: dict[str, StoredTensor] = {}
    position = HEADER.size
    for name in order:
        found[meta_name(name)] = _float32_at(path, position, expected[name].shape)
        position += 4 * expected[name].num_elements
        if name == LAST_NORM:  # cosines and sines, e / 2 each per position
            position += 4 * config.max_position_embeddings * config.head_dim
    size = path.stat().st_size
    if size != position:
        raise CheckpointError(
            f"{path}: has {size} bytes, its header asks for {position}; it is cut short or of "
            "another version"
        )
    return config, found


def _read_header(path: Path) -> SamaraConfig:
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise CheckpointError(
            f"{path}: is a pickle, which can run any code when opened; give a llama2.c .bin file "
            "or a folder with safetensors"
        )
    if len(head) < HEADER.size:
        raise CheckpointError(f"{path}: is too short for a llama2.c file")
    dim, hidden_dim, layers, heads, kv_heads, vocab, length = HEADER.unpack(head)
    if dim == NEW_MAGIC:
        raise CheckpointError(
            f"{path}: is a llama2.c file of version {hidden_dim}; only version 0 is read, export "
            "it with --version 0"
        )
    if min(dim, hidden_dim, layers, heads, kv_heads, length) <= 0 or vocab == 0 or dim % heads:
        raise CheckpointError(f"{path}: its first 28 bytes are no llama2.c header")
    fields = {
        "hidden_size": dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocab),
        "max_position_embeddings": length,
        "tie_word_embeddings": vocab > 0,  # a negative size says that an output matrix follows
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
    }
    return parse_llama_config(path, fields)


def _float32_at(path: Path, start: int, shape: tuple[int, ...]) -> StoredTensor:
    def load() -> Tensor:
        count = torch.Size(shape).numel()
        values = np.fromfile(path, dtype="<f4", count=count, offset=start)
        return torch.from_numpy(values.astype(np.float32, copy=False)).view(shape)

    return StoredTensor(shape=shape, dtype=torch.float32, load=load)


# --- tokenizer --------------------------------------------------------------------------------


def _tokenizer_files(folder: Path, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer beside the weights in Hugging Face form; none if there is none."""
    binaries = [folder / "tokenizer.bin", folder / f"tok{vocab_size}.bin"]
    for path in binaries:
        if path.exists():
            return hugging_face_files(_vocabulary(path, _read_tok_bin(path, vocab_size)))
    path = folder / "vocab.json"
    if path.exists():
        return hugging_face_files(_vocabulary(path, _read_vocab_json(path, vocab_size)))
    return {}


def _read_tok_bin(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    """Longest piece (int32), then per piece: score (float32), length (int32), UTF-8 bytes."""
    data, position = path.read_bytes(), 4
    entries: list[tuple[str, float]] = []
    try:
        while len(entries) < vocab_size:
            score, length = struct.unpack_from("<fi", data, position)
            position += 8
            piece = data[position : position + length]
            if length < 0 or len(piece) < length:
                raise struct.error("a piece is cut short")
            entries.append((piece.decode("utf-8"), float(score)))
            position += length
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: is no llama2.c tokenizer of {vocab_size} pieces ({error} at {len(entries)})"
        ) from None
    if position != len(data):
        raise CheckpointError(f"{path}: holds more than the model's {vocab_size} pieces")
    return entries


def _read_vocab_json(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    entries: Any = read_json(path)
    if not isinstance(entries, list) or len(entries) != vocab_size:
        raise CheckpointError(f"{path}: must be a list of the model's {vocab_size} pieces")
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise CheckpointError(f"{path}: {entry!r} is not [piece, score]")
    return [(piece, float(score)) for piece, score in entries]


def _vocabulary(path: Path, entries: list[tuple[str, float]]) -> Pieces:
    """Undo what llama2.c's export does to SentencePiece's pieces."""
    pieces = [piece.replace(" ", SPACE) for piece, _ in entries]
    pieces[UNK : EOS + 1] = ["<unk>", "<s>", "</s>"]  # the file spells them with line breaks
    if len(set(pieces)) < len(pieces):
        raise CheckpointError(f"{path}: holds a piece twice, so it is no tokenizer")
    scores = [score for _, score in entries]
    return Pieces(pieces=pieces, scores=scores, unk=UNK, bos=BOS, eos=EOS)
