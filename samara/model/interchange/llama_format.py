"""Hugging Face Llama: what transformers, vLLM, TGI and llama.cpp read without any code of ours.

Samara names its modules as Llama does, so the tensors are the same; only config.json differs. What
Llama has and Samara has not (biases, scaled rotary frequencies, other activations) is refused when
reading; what Samara has and Llama has not (CoLA, QK-norm, widths that vary) when writing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samara.errors import CheckpointError
from samara.model.configuration import SamaraConfig
from samara.model.interchange.config_fields import ConfigFields
from samara.model.interchange.hf_folder import (
    CONFIG,
    read_config,
    read_files,
    read_tensors,
    write_folder,
)
from samara.model.interchange.stored_model import (
    EMBEDDING,
    HEAD,
    StoredModel,
    expected_tensors,
    per_layer,
    token_ids,
    without_tied_head,
)
from samara.model.interchange.stored_tensors import check_fit

COMPUTED_BUFFER = ".rotary_emb.inv_freq"
"""Old writers stored the rotary frequencies; they follow from the configuration."""
META_EMBEDDING = "tok_embeddings.weight"


def read_llama(folder: Path) -> StoredModel:
    """Read a Llama-architecture folder: Llama, TinyLlama, SmolLM and their like.

    Raises:
        CheckpointError: If it is not whole, or not what Samara can express.
    """
    config = parse_llama_config(folder / CONFIG, read_config(folder))
    found = {n: t for n, t in read_tensors(folder).items() if not n.endswith(COMPUTED_BUFFER)}
    if META_EMBEDDING in found:
        raise CheckpointError(
            f"{folder}: its tensors have Meta's names, whose rotary pairs are interleaved; "
            "convert it with --from llama2c"
        )
    if config.tie_word_embeddings:
        found = dict(without_tied_head(folder, found, embedding=EMBEDDING, head=HEAD))
    expected = expected_tensors(config)
    check_fit(folder, found=found, expected=expected)
    return StoredModel(
        folder=folder,
        format="llama",
        config=config,
        tensors={name: found[name] for name in expected},
        files=read_files(folder),
    )


def parse_llama_config(path: Path, data: dict[str, Any]) -> SamaraConfig:
    """Translate a Llama configuration of transformers 4 or 5.

    Raises:
        CheckpointError: If a key is missing, wrong, or asks for something Samara has not.
    """
    fields = ConfigFields(path, data)
    fields.refuse(
        "hidden_act",
        unless=fields.get("hidden_act") in (None, "silu", "swish"),
        because="Samara's FFN is SwiGLU, whose activation is silu",
    )
    for key in ("attention_bias", "mlp_bias"):
        fields.refuse(
            key,
            unless=not fields.get(key),
            because="Samara's linears have no bias, so this model cannot be expressed",
        )
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    if fields.get("head_dim") is None and hidden_size % heads:
        raise fields.error("head_dim", f"given, as {heads} heads do not divide {hidden_size}")
    return fields.build(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
        intermediate_size=fields.integer("intermediate_size"),
        head_dim=fields.integer("head_dim", default=hidden_size // heads),
        max_position_embeddings=fields.integer("max_position_embeddings", default=2048),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=_rope_theta(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        qk_norm=False,
        initializer="normal",
        initializer_range=fields.number("initializer_range", default=0.02),
        **fields.token_ids(bos_token_id=1, eos_token_id=2, pad_token_id=None),
    )


def _rope_theta(fields: ConfigFields) -> float:
    """The base of the rotary frequencies: transformers 4 has two keys for it, 5 has one mapping."""
    thetas = []
    if fields.get("rope_theta") is not None:
        thetas.append(fields.number("rope_theta"))
    for key in ("rope_scaling", "rope_parameters"):
        rope = fields.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.error(key, "a mapping of keys")
        kind = rope.get("rope_type", rope.get("type", "default"))
        fields.refuse(
            key,
            unless=kind == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0,
            because="Samara turns whole heads by unscaled frequencies, so this model cannot be "
            "expressed",
        )
        if rope.get("rope_theta") is not None:
            thetas.append(ConfigFields(fields.path, rope).number("rope_theta"))
    if len(set(thetas)) > 1:
        raise fields.error("rope_theta", f"one value, {CONFIG} gives {thetas}")
    return thetas[0] if thetas else 10000.0


def write_llama(model: StoredModel, folder: Path, *, max_shard_bytes: int) -> list[str]:
    """Write a folder for plain ``LlamaForCausalLM``.

    Raises:
        CheckpointError: If Llama cannot express the design, with the reason and a way out.
    """
    config = model.config
    problem = why_not_llama(config)
    heads = per_layer(config.num_query_heads)[0]
    if problem is None and config.hidden_size % heads:
        problem = (
            f"has {heads} query heads, which do not divide hidden_size {config.hidden_size}, and "
            "transformers refuses such a Llama; use --to gguf, or train a design where they do"
        )
    if problem is not None:
        raise CheckpointError(f"{model.folder}: {problem}")
    write_folder(
        folder,
        config=llama_config(config),
        tensors=model.tensors,
        files=model.files,
        max_shard_bytes=max_shard_bytes,
    )
    return []


def why_not_llama(config: SamaraConfig) -> str | None:
    """Say what Llama's blocks cannot express in a design, and what to do instead; None: all."""
    if config.has_low_rank:
        return (
            "has low-rank projections with a nonlinearity between the factors (CoLA), which no "
            "dense matrix of Llama equals; keep --to samara, or train a design without cola"
        )
    for key, widths in (
        ("num_query_heads", config.num_query_heads),
        ("num_kv_heads", config.num_kv_heads),
        ("ffn_dims", config.ffn_dims),
    ):
        if len(set(per_layer(widths))) > 1:
            return (
                f"its layers differ in {key} ({min(per_layer(widths))} to "
                f"{max(per_layer(widths))}), Llama has one width for all; use --to openelm or "
                "--to gguf"
            )
    if config.qk_norm:
        return (
            "normalises queries and keys (qk_norm), Llama does not; use --to openelm or --to gguf, "
            "or train a design with qk_norm: false"
        )
    return None


def llama_config(config: SamaraConfig) -> dict[str, Any]:
    """The configuration as every generation of Llama readers understands it."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": per_layer(config.ffn_dims)[0],
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": per_layer(config.num_query_heads)[0],
        "num_key_value_heads": per_layer(config.num_kv_heads)[0],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        # transformers 4 and most other readers know the first key, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "use_cache": True,
    }
    return fields | token_ids(config)
