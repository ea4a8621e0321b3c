"""GGUF, for llama.cpp and all that is built on it; export only.

Two of the runtime's architectures fit Samara's designs: ``openelm`` (QK-norm, widths per layer,
tied output matrix) and ``llama`` (no QK-norm, one width for all layers). The file holds the
tokenizer and its chat template. Vectors (norms) are always float32, as the runtime wants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from samara.errors import CheckpointError, ConfigError
from samara.model.configuration import SamaraConfig
from samara.model.interchange.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from samara.model.interchange.llama_format import why_not_llama
from samara.model.interchange.stored_model import EMBEDDING, HEAD, StoredModel, per_layer
from samara.model.interchange.stored_tensors import (
    StoredTensor,
    Tensors,
    cast,
    dtype_name,
    join_rows,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
OUTSIDE = {EMBEDDING: "token_embd", "model.norm.weight": "output_norm", HEAD: "output"}
PER_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: StoredModel, folder: Path, *, max_shard_bytes: int) -> list[str]:
    """Write ``model.gguf``; one file, whatever ``max_shard_bytes``.

    Raises:
        CheckpointError: If llama.cpp cannot run the design or the tokenizer, with the reason.
        ConfigError: If the ``gguf`` package is not installed.
        ResourceError: If the disk is full.
    """
    del max_shard_bytes
    gguf = _gguf()
    config = model.config
    architecture = gguf_architecture(model)
    tokenizer = gguf_tokenizer(model.folder, model.files, config)
    end = _end_token(model)
    tensors = _as_stored(gguf_tensors(config, architecture, model.tensors))
    writer: GGUFWriter = gguf.GGUFWriter(folder / FILE, architecture)
    try:
        _describe_design(writer, config, name=model.name, tensors=tensors)
        writer.add_eos_token_id(end)
        _describe_tokenizer(writer, config, tokenizer)
        _write(gguf, writer, tensors)
    finally:
        writer.close()
    if isinstance(config.eos_token_id, list):
        return [f"GGUF names one end token: {end}, of {config.eos_token_id}"]
    return []


def _end_token(model: StoredModel) -> int:
    end = model.config.eos_token_id
    if end is None:
        raise CheckpointError(
            f"{model.folder}: names no eos_token_id, and llama.cpp would take another token for "
            "it; set it in config.json"
        )
    return end[0] if isinstance(end, list) else end


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "to: gguf needs the package gguf; install it with: pip install 'samara[export]'"
        ) from None
    return gguf


def gguf_architecture(model: StoredModel) -> str:
    """llama.cpp's name of the architecture that computes what the model computes.

    Raises:
        CheckpointError: If it has none.
    """
    config = model.config
    if config.qk_norm and not config.has_low_rank:
        if config.tie_word_embeddings:
            return "openelm"
        raise CheckpointError(
            f"{model.folder}: normalises queries and keys and has an output matrix of its own, "
            "llama.cpp's openelm always ties it to the embedding; use --to openelm with mlx-lm, or "
            "train a design with tie_word_embeddings: true"
        )
    problem = why_not_llama(config)
    if problem is None:
        return "llama"
    if config.has_low_rank:
        raise CheckpointError(f"{model.folder}: {problem}")
    raise CheckpointError(
        f"{model.folder}: its layers differ in width, which llama.cpp runs only with qk_norm; "
        "keep --to samara, or train a design with qk_norm: true"
    )


def gguf_tensors(config: SamaraConfig, architecture: str, tensors: Tensors) -> Tensors:
    """Rename Samara's tensors to GGUF's; ``llama`` wants rotary pairs as neighbours."""
    renamed = {
        f"{theirs}.weight": tensors[ours] for ours, theirs in OUTSIDE.items() if ours in tensors
    }
    queries, keys = per_layer(config.num_query_heads), per_layer(config.num_kv_heads)
    for layer in range(config.num_hidden_layers):
        block = {
            theirs: tensors[f"model.layers.{layer}.{ours}.weight"]
            for ours, theirs in PER_LAYER.items()
            if f"model.layers.{layer}.{ours}.weight" in tensors
        }
        if architecture == "openelm":
            parts = [block.pop(part) for part in ("attn_q", "attn_k", "attn_v")]
            block["attn_qkv"] = join_rows(f"blk.{layer}.attn_qkv", parts)
        else:
            block["attn_q"] = neighbouring_rows(block["attn_q"], queries[layer])
            block["attn_k"] = neighbouring_rows(block["attn_k"], keys[layer])
        renamed |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    return renamed


def neighbouring_rows(tensor: StoredTensor, num_heads: int) -> StoredTensor:
    """Reorder the rows of each head from pairs (i, i + e / 2) to pairs (2i, 2i + 1)."""

    def reorder(matrix_rd: Tensor) -> Tensor:
        halves = matrix_rd.view(num_heads, 2, -1, matrix_rd.shape[1])
        return halves.transpose(1, 2).flatten(0, 2)

    return tensor.map(reorder)


def _as_stored(tensors: Tensors) -> Tensors:
    stored = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise CheckpointError(f"{name}: is float64, which llama.cpp does not run; give a dtype")
        stored[name] = cast(name, tensor, torch.float32) if len(tensor.shape) == 1 else tensor
    return stored


def _describe_design(
    writer: GGUFWriter, config: SamaraConfig, *, name: str, tensors: Tensors
) -> None:
    queries, keys = per_layer(config.num_query_heads), per_layer(config.num_kv_heads)
    widths = per_layer(config.ffn_dims)
    one_for_all = writer.arch == "llama"
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(queries[0] if one_for_all else queries)
    writer.add_head_count_kv(keys[0] if one_for_all else keys)
    writer.add_feed_forward_length(widths[0] if one_for_all else widths)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_file_type(tensors))


def _file_type(tensors: Tensors) -> int:
    """GGUF's label for the type of the matrices (``LlamaFileType``)."""
    return {"float32": 0, "float16": 1, "bfloat16": 32}[
        dtype_name(tensors["token_embd.weight"].dtype)
    ]


def _describe_tokenizer(writer: GGUFWriter, config: SamaraConfig, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.cutter)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    if tokenizer.scores is not None:
        missing = len(tokenizer.tokens) - len(tokenizer.scores)
        writer.add_token_scores([*tokenizer.scores, *[0.0] * missing])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(tokenizer.adds_eos)
    writer.add_add_space_prefix(tokenizer.space_first)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _write(gguf: Any, writer: GGUFWriter, tensors: Tensors) -> None:
    """Header first, then one tensor after the other: never two in memory."""
    kinds = gguf.GGMLQuantizationType
    types = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    for name, tensor in tensors.items():
        plain = np.dtype("float32" if tensor.dtype == torch.float32 else "float16")
        writer.add_tensor_info(
            name, tensor.shape, plain, tensor.num_bytes, raw_dtype=types[tensor.dtype]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        value = tensor.load().contiguous()
        # numpy knows no bfloat16; the bits go out as they are.
        bits = value.view(torch.int16) if value.dtype == torch.bfloat16 else value
        writer.write_tensor_data(bits.numpy())
