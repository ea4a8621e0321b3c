"""OpenELM as Apple publishes it in Hugging Face form (arXiv 2404.14619); mlx-lm, llama.cpp read it.

A prefix ``transformer.``, queries, keys and values in one matrix ``qkv_proj`` (all query heads,
then all key heads, then all value heads), gate and up in one ``proj_1`` (gate first), per-layer
lists in config.json.

Two kinds of readers: mlx-lm and llama.cpp take the head counts from the lists, Apple's own code
computes them from ``qkv_multipliers`` and never looks at the lists. A file in which they disagree
is two models: it is refused when read and never written. ``num_gqa_groups`` is the number of query
heads per key-value head. Differs from Apple's files: no ``auto_map``, since it names Python files
that are not here and makes every loader ask for ``trust_remote_code``; alias keys
(``num_hidden_layers``, ...) for generic tools.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from samara.model.interchange.stored_tensors import Tensors, check_fit, join_rows, split_rows
from samara.model.layerwise_scaling import make_divisible, multipliers

EPS = 1e-6
"""Of every norm; Apple's code, llama.cpp's converter and mlx-lm's default fix it."""
PUBLISHED_ALPHA, PUBLISHED_BETA = (0.5, 1.0), (0.5, 4.0)
"""qkv_multipliers and the range of ffn_multipliers of all four published sizes."""
DIVISOR = 256
MOST_ENDS = 100
"""Multipliers tried for the first and the last layer. A step of heads is at most the model's width
wide, 100 steps of 0.01, in every sensible design; the limit bounds the search in the others."""

OUTSIDE = {
    EMBEDDING: "transformer.token_embeddings.weight",
    "model.norm.weight": "transformer.norm.weight",
    HEAD: "lm_head.weight",
}
ONE_TO_ONE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "self_attn.o_proj": "attn.out_proj",
    "post_attention_layernorm": "ffn_norm",
    "mlp.down_proj": "ffn.proj_2",
}
JOINED = {
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ffn.proj_1": ("mlp.gate_proj", "mlp.up_proj"),
}


# --- tensors ----------------------------------------------------------------------------------


def to_openelm_names(config: SamaraConfig, tensors: Tensors) -> Tensors:
    """Rename and join Samara's tensors to OpenELM's."""
    renamed = {theirs: tensors[ours] for ours, theirs in OUTSIDE.items() if ours in tensors}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for joined, parts in JOINED.items():
            name = f"{theirs}{joined}.weight"
            renamed[name] = join_rows(name, [tensors[f"{ours}{part}.weight"] for part in parts])
        for own, other in ONE_TO_ONE.items():
            if f"{ours}{own}.weight" in tensors:
                renamed[f"{theirs}{other}.weight"] = tensors[f"{ours}{own}.weight"]
    return renamed


def from_openelm_names(config: SamaraConfig, found: Tensors, expected: Tensors) -> Tensors:
    """The inverse of :func:`to_openelm_names`; ``expected`` are Samara's tensors."""
    tensors = {ours: found[theirs] for ours, theirs in OUTSIDE.items() if theirs in found}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for joined, parts in JOINED.items():
            names = [f"{ours}{part}.weight" for part in parts]
            blocks = split_rows(
                found[f"{theirs}{joined}.weight"], [expected[name].shape[0] for name in names]
            )
            tensors |= dict(zip(names, blocks, strict=True))
        for own, other in ONE_TO_ONE.items():
            if f"{theirs}{other}.weight" in found:
                tensors[f"{ours}{own}.weight"] = found[f"{theirs}{other}.weight"]
    return {name: tensors[name] for name in expected}


# --- reading ----------------------------------------------------------------------------------


def read_openelm(folder: Path) -> StoredModel:
    """Read a folder as Apple's, or as :func:`write_openelm` wrote it.

    Raises:
        CheckpointError: If it is not whole, contradicts itself, or is not what Samara can express.
    """
    config = parse_openelm_config(folder / CONFIG, read_config(folder))
    found: Tensors = read_tensors(folder)
    if config.tie_word_embeddings:
        found = without_tied_head(folder, found, embedding=OUTSIDE[EMBEDDING], head=OUTSIDE[HEAD])
    expected = expected_tensors(config)
    check_fit(folder, found=found, expected=to_openelm_names(config, expected))
    return StoredModel(
        folder=folder,
        format="openelm",
        config=config,
        tensors=from_openelm_names(config, found, expected),
        files=read_files(folder),
    )


def parse_openelm_config(path: Path, data: dict[str, Any]) -> SamaraConfig:
    """Translate an OpenELM configuration.

    Raises:
        CheckpointError: If a key is missing or wrong, if lists and ranges disagree, or if it asks
            for something Samara has not.
    """
    fields = ConfigFields(path, data)
    fields.refuse(
        "activation_fn_name",
        unless=fields.get("activation_fn_name") in (None, "swish", "silu"),
        because="Samara's FFN is SwiGLU, whose activation is swish",
    )
    fields.refuse(
        "normalization_layer_name",
        unless=fields.get("normalization_layer_name") in (None, "rms_norm"),
        because="Samara normalises by rms_norm",
    )
    fields.refuse(
        "ffn_with_glu",
        unless=fields.flag("ffn_with_glu", default=True),
        because="Samara's FFN is gated, so this model cannot be expressed",
    )
    fields.refuse(
        "rms_norm_eps",
        unless=fields.number("rms_norm_eps", default=EPS) == EPS,
        because=f"OpenELM's readers take {EPS}, so the file is two models; set it to {EPS}",
    )
    queries, keys = _read_heads(fields)
    return fields.build(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("model_dim"),
        num_hidden_layers=fields.integer("num_transformer_layers"),
        head_dim=fields.integer("head_dim"),
        num_query_heads=queries,
        num_kv_heads=keys,
        ffn_dims=_read_ffn_dims(fields),
        qk_norm=fields.flag("normalize_qk_projections", default=True),
        tie_word_embeddings=fields.flag("share_input_output_layers", default=True),
        max_position_embeddings=fields.integer("max_context_length", default=2048),
        rope_theta=fields.number("rope_freq_constant", default=10000.0),
        rms_norm_eps=EPS,
        initializer="openelm",
        **fields.token_ids(bos_token_id=1, eos_token_id=2, pad_token_id=None),
    )


def _read_heads(fields: ConfigFields) -> tuple[list[int], list[int]]:
    """Query and key-value heads of each layer, from lists, from ranges, or from both if equal."""
    group = fields.integer("num_gqa_groups", default=1)
    ranged = _heads_from_range(fields, group)
    listed = _integers(fields, "num_query_heads")
    keys = _integers(fields, "num_kv_heads")
    if listed is None and ranged is None:
        raise fields.error("num_query_heads", "a list with one entry per layer")
    if listed is not None and ranged is not None and listed != ranged:
        layer = next(
            i for i, pair in enumerate(zip(listed, ranged, strict=True)) if len({*pair}) > 1
        )
        raise CheckpointError(
            f"{fields.path}: num_query_heads gives layer {layer} {listed[layer]} heads, "
            f"qkv_multipliers gives it {ranged[layer]}; readers differ in which they use, so make "
            "them agree"
        )
    queries = listed or ranged
    assert queries is not None
    if keys is None:
        return queries, [heads // group for heads in queries]
    if fields.get("num_gqa_groups") is not None:
        for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
            if query != key * group:
                raise CheckpointError(
                    f"{fields.path}: layer {layer} has {query} query heads and {key} key-value "
                    f"heads, num_gqa_groups asks for {group} to one; make them agree"
                )
    return queries, keys


def _heads_from_range(fields: ConfigFields, group: int) -> list[int] | None:
    """What Apple's code computes from ``qkv_multipliers``: a number, or first and last layer's."""
    value, layers = fields.get("qkv_multipliers"), fields.integer("num_transformer_layers")
    if value is None:
        return None
    if not _are_positive(value) or (isinstance(value, list) and len(value) != 2):
        raise fields.error("qkv_multipliers", "a positive number or two")
    spread = _range(value, layers) if isinstance(value, list) else [value] * layers
    width, head_dim = fields.integer("model_dim"), fields.integer("head_dim")
    return [make_divisible(width * m, head_dim * group) // head_dim for m in spread]


def _integers(fields: ConfigFields, key: str) -> list[int] | None:
    """One whole number per layer; a single one counts for all."""
    value, layers = fields.get(key), fields.integer("num_transformer_layers")
    if value is None:
        return None
    items = value if isinstance(value, list) else [value] * layers
    if len(items) != layers or not _are_positive(items) or not all(i == int(i) for i in items):
        raise fields.error(key, f"a list of {layers} whole numbers, one per layer")
    return [int(i) for i in items]


def _read_ffn_dims(fields: ConfigFields) -> list[int]:
    """FFN widths from ``ffn_multipliers``: a number, first and last layer's, or one per layer."""
    value, layers = fields.get("ffn_multipliers"), fields.integer("num_transformer_layers")
    if not _are_positive(value) or (isinstance(value, list) and len(value) not in (2, layers)):
        raise fields.error("ffn_multipliers", f"a positive number, two, or {layers}")
    readings: list[Sequence[float]] = []
    if not isinstance(value, list):
        readings.append([value] * layers)
    else:
        readings += [value] if len(value) == layers else []
        readings += [_range(value, layers)] if len(value) == 2 else []
    width, divisor = fields.integer("model_dim"), fields.integer("ffn_dim_divisor", default=DIVISOR)
    widths = [[make_divisible(width * m, divisor) for m in reading] for reading in readings]
    fields.refuse(
        "ffn_multipliers",
        unless=all(w == widths[0] for w in widths),
        because="as a range it gives other widths than as a list, so the file is two models",
    )
    return widths[0]


def _range(ends: Sequence[float], num_layers: int) -> Sequence[float]:
    return multipliers(ends[0], ends[-1], num_layers)


def _are_positive(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(i, int | float) and not isinstance(i, bool) and i > 0 for i in items
    )


# --- writing ----------------------------------------------------------------------------------


def write_openelm(model: StoredModel, folder: Path, *, max_shard_bytes: int) -> list[str]:
    """Write a folder that mlx-lm and llama.cpp's converter read.

    Raises:
        CheckpointError: If OpenELM cannot express the design, with the reason and a way out.
    """
    problem = why_not_openelm(model.config)
    if problem is not None:
        raise CheckpointError(f"{model.folder}: {problem}")
    config = openelm_config(model.config)
    write_folder(
        folder,
        config=config,
        tensors=to_openelm_names(model.config, model.tensors),
        files=model.files,
        max_shard_bytes=max_shard_bytes,
    )
    if "qkv_multipliers" in config:
        return []
    return [
        "no range of multipliers gives these query heads, so qkv_multipliers is left out: mlx-lm "
        "and llama.cpp read the lists, Apple's own code cannot load it"
    ]


def why_not_openelm(config: SamaraConfig) -> str | None:
    """Say what OpenELM cannot express in a design, and what to do instead; None: it can."""
    if config.has_low_rank:
        return (
            "has low-rank projections with a nonlinearity between the factors (CoLA), which no "
            "dense matrix of OpenELM equals; keep --to samara, or train a design without cola"
        )
    if not config.qk_norm:
        return (
            "does not normalise queries and keys (qk_norm), and llama.cpp reads no OpenELM without "
            "that; use --to llama if all layers are alike, or train a design with qk_norm: true"
        )
    if config.rms_norm_eps != EPS:
        return (
            f"has rms_norm_eps {config.rms_norm_eps}, and OpenELM's readers fix it at {EPS}; use "
            f"--to gguf, which stores it, or train a design with rms_norm_eps: {EPS}"
        )
    groups = {
        queries // keys
        for queries, keys in zip(
            per_layer(config.num_query_heads), per_layer(config.num_kv_heads), strict=True
        )
    }
    if len(groups) > 1:
        return (
            "its layers differ in query heads per key-value head "
            f"({', '.join(map(str, sorted(groups)))}), OpenELM has one number for all "
            "(num_gqa_groups); use --to gguf, or train a design with one gqa_group_size"
        )
    ffn = _ffn_range(config).multipliers
    if len(ffn) == 2 and any(round(m, 2) != m for m in ffn):
        return (
            f"has two layers with FFN widths {config.ffn_dims}, no multiples of hidden_size with "
            "two decimals, and OpenELM's readers differ in how they take two longer ones; use "
            "--to gguf"
        )
    return None


def openelm_config(config: SamaraConfig) -> dict[str, Any]:
    """The configuration in Apple's keys, with aliases for generic tools."""
    queries, keys = per_layer(config.num_query_heads), per_layer(config.num_kv_heads)
    group = queries[0] // keys[0]
    ffn = _ffn_range(config)
    fields: dict[str, Any] = {
        "architectures": ["OpenELMForCausalLM"],
        "model_type": "openelm",
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "model_dim": config.hidden_size,
        "head_dim": config.head_dim,
        "num_transformer_layers": config.num_hidden_layers,
        "num_query_heads": queries,
        "num_kv_heads": keys,
        "num_gqa_groups": group,
        "ffn_multipliers": ffn.multipliers,
        "ffn_dim_divisor": ffn.divisor,
        "ffn_with_glu": True,
        "normalize_qk_projections": True,
        "share_input_output_layers": config.tie_word_embeddings,
        "rope_freq_constant": config.rope_theta,
        "rope_max_length": 2 * config.max_position_embeddings,
        "max_context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        # Aliases: what generic tools look for.
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": max(queries),
        "num_key_value_heads": max(keys),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    alpha = qkv_multipliers(config, group)
    if alpha is not None:
        fields["qkv_multipliers"] = list(alpha)
    return fields | token_ids(config)


def qkv_multipliers(config: SamaraConfig, group: int) -> tuple[float, float] | None:
    """A range from which Apple's code computes exactly these query heads; None if there is none.

    The published range comes first, then the roundest numbers.
    """
    queries = per_layer(config.num_query_heads)
    divisor = config.head_dim * group

    def heads(alpha: float) -> int:
        return make_divisible(config.hidden_size * alpha, divisor) // config.head_dim

    def ends(wanted: int) -> list[float]:
        last = 2 * wanted * config.head_dim * 100 // config.hidden_size + 1
        found = [n / 100 for n in range(1, last + 1) if heads(n / 100) == wanted]
        return sorted(found, key=lambda alpha: len(str(alpha)))[:MOST_ENDS]

    roundest_first = sorted(
        itertools.product(ends(queries[0]), ends(queries[-1])), key=lambda pair: len(str(pair))
    )
    for alpha in (PUBLISHED_ALPHA, *roundest_first):
        spread = multipliers(*alpha, config.num_hidden_layers)
        if all(heads(a) == wanted for a, wanted in zip(spread, queries, strict=True)):
            return alpha
    return None


@dataclass(frozen=True, kw_only=True)
class _FfnRange:
    multipliers: list[float]
    divisor: int


def _ffn_range(config: SamaraConfig) -> _FfnRange:
    """FFN widths as multiples of the model's: the published ones if they fit, else the shortest."""
    widths = per_layer(config.ffn_dims)
    published = multipliers(*PUBLISHED_BETA, config.num_hidden_layers)
    if [make_divisible(config.hidden_size * m, DIVISOR) for m in published] == widths:
        return _FfnRange(multipliers=list(published), divisor=DIVISOR)
    common = math.gcd(*widths)
    divisor = DIVISOR if common % DIVISOR == 0 else common
    return _FfnRange(
        multipliers=[_shortest_multiplier(w, config.hidden_size, divisor) for w in widths],
        divisor=divisor,
    )


def _shortest_multiplier(width: int, hidden_size: int, divisor: int) -> float:
    """The ratio with the fewest decimals (at least Apple's two) that gives the width again."""
    ratio = width / hidden_size
    for decimals in range(2, 17):
        for rounded in (round(ratio, decimals), round(ratio - 0.5 * 10**-decimals, decimals)):
            if rounded > 0 and make_divisible(rounded * hidden_size, divisor) == width:
                return rounded
    raise AssertionError(f"{ratio} x {hidden_size} is not {width}")
