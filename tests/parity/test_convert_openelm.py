"""OpenELM both ways, against a forward pass written here from the published formulas.

The reference (arXiv 2404.14619, section 2; block order, norms and rotary pairing as in the
published code) knows nothing of Samara: it reads Apple's names and configuration keys only.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from samara.errors import CheckpointError
from samara.model.config import LayerwiseScaling, ModelConfig
from samara.model.configuration import SamaraConfig
from samara.model.interchange.convert import convert
from samara.model.loading import load_model, save_model
from samara.model.modeling import SamaraForCausalLM

TOLERANCE = 1e-5


# --- the reference ----------------------------------------------------------------------------


def divisible(value, divisor):
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def rms(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x, theta):
    """Pair component i with i + half and turn it by position * theta^(-2 i / width)."""
    length, width = x.shape[-2:]
    half = width // 2
    angles = torch.arange(length)[:, None] * theta ** (-2 * torch.arange(half) / width)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def reference_logits(config, weights, ids):
    x = weights["transformer.token_embeddings.weight"][ids]
    width, length = config["head_dim"], len(ids)
    future = torch.full((length, length), -math.inf).triu(1)
    for layer in range(config["num_transformer_layers"]):
        own = {
            name.removeprefix(f"transformer.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"transformer.layers.{layer}.")
        }
        queries, keys = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        mixed = rms(x, own["attn_norm.weight"]) @ own["attn.qkv_proj.weight"].T
        heads = mixed.view(length, queries + 2 * keys, width).transpose(0, 1)
        q, k, v = heads[:queries], heads[queries : queries + keys], heads[queries + keys :]
        q = rotate(rms(q, own["attn.q_norm.weight"]), config["rope_freq_constant"])
        k = rotate(rms(k, own["attn.k_norm.weight"]), config["rope_freq_constant"])
        out = []
        for head in range(queries):
            source = head // (queries // keys)
            scores = q[head] @ k[source].T / math.sqrt(width) + future
            out.append(torch.softmax(scores, dim=-1) @ v[source])
        x = x + torch.cat(out, dim=-1) @ own["attn.out_proj.weight"].T
        ffn = divisible(
            config["ffn_multipliers"][layer] * config["model_dim"], config["ffn_dim_divisor"]
        )
        both = rms(x, own["ffn_norm.weight"]) @ own["ffn.proj_1.weight"].T
        gate, up = both[:, :ffn], both[:, ffn:]
        x = x + (gate * torch.sigmoid(gate) * up) @ own["ffn.proj_2.weight"].T
    head = weights.get("lm_head.weight", weights["transformer.token_embeddings.weight"])
    return rms(x, weights["transformer.norm.weight"]) @ head.T


def apple_folder(folder, *, tied=True, **overrides):
    """A checkpoint as Apple publishes them, with random weights."""
    config = {
        "activation_fn_name": "swish",
        "architectures": ["OpenELMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openelm.OpenELMConfig",
            "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "ffn_dim_divisor": 16,
        "ffn_multipliers": [0.5, 1.67, 2.83, 4.0],
        "ffn_with_glu": True,
        "head_dim": 8,
        "initializer_range": 0.02,
        "max_context_length": 2048,
        "model_dim": 64,
        "model_type": "openelm",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True,
        "num_gqa_groups": 2,
        "num_kv_heads": [2, 3, 3, 4],
        "num_query_heads": [4, 6, 6, 8],
        "num_transformer_layers": 4,
        "qkv_multipliers": [0.5, 1.0],
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "share_input_output_layers": tied,
        "torch_dtype": "float32",
        "transformers_version": "4.39.3",
        "use_cache": True,
        "vocab_size": 96,
        **overrides,
    }
    torch.manual_seed(0)
    d, width = config["model_dim"], config["head_dim"]

    def matrix(rows, columns):
        return torch.randn(rows, columns) / math.sqrt(columns)

    weights = {"transformer.token_embeddings.weight": matrix(config["vocab_size"], d)}
    if not tied:
        weights["lm_head.weight"] = matrix(config["vocab_size"], d)
    for layer, (queries, keys, multiplier) in enumerate(
        zip([4, 6, 6, 8], [2, 3, 3, 4], [0.5, 1.67, 2.83, 4.0], strict=True)
    ):
        ffn, at = divisible(multiplier * d, 16), f"transformer.layers.{layer}."
        weights |= {
            f"{at}attn.qkv_proj.weight": matrix((queries + 2 * keys) * width, d),
            f"{at}attn.out_proj.weight": matrix(d, queries * width),
            f"{at}attn.q_norm.weight": torch.rand(width) + 0.5,
            f"{at}attn.k_norm.weight": torch.rand(width) + 0.5,
            f"{at}attn_norm.weight": torch.rand(d) + 0.5,
            f"{at}ffn.proj_1.weight": matrix(2 * ffn, d),
            f"{at}ffn.proj_2.weight": matrix(d, ffn),
            f"{at}ffn_norm.weight": torch.rand(d) + 0.5,
        }
    weights["transformer.norm.weight"] = torch.rand(d) + 0.5
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return config, weights


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_apple_checkpoints_give_the_references_logits(tmp_path, tied):
    config, weights = apple_folder(tmp_path / "apple", tied=tied)
    convert(tmp_path / "apple", tmp_path / "ours", to="samara")
    ids = torch.randint(0, 96, (40,))
    with torch.no_grad():
        found = load_model(tmp_path / "ours")(ids[None]).logits[0]
    expected = reference_logits(config, weights, ids)
    assert (found - expected).abs().max() < TOLERANCE
    # That the reference can tell: with tiled instead of repeated key heads it is far off.
    wrong = {name: value.clone() for name, value in weights.items()}
    name = "transformer.layers.3.attn.qkv_proj.weight"
    wrong[name][64:96] = wrong[name][64:96].view(4, 8, 64)[[1, 0, 3, 2]].view(32, 64)
    assert (reference_logits(config, wrong, ids) - expected).abs().max() > 1e-2


def test_a_tied_checkpoint_with_a_copy_of_the_embedding_is_read(tmp_path):
    _, weights = apple_folder(tmp_path / "apple")
    path = tmp_path / "apple" / "model.safetensors"
    copy = weights["transformer.token_embeddings.weight"].clone()
    save_file(weights | {"lm_head.weight": copy}, path)
    convert(tmp_path / "apple", tmp_path / "back", to="openelm")
    assert "lm_head.weight" not in load_file(tmp_path / "back" / "model.safetensors")
    save_file(weights | {"lm_head.weight": copy + 1}, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from"):
        convert(tmp_path / "apple", tmp_path / "never", to="samara")


def read_design(folder) -> SamaraConfig:
    return load_model(folder).config


@pytest.mark.parametrize(
    "keys",
    [
        {"num_query_heads": None, "num_kv_heads": None},  # ranges alone
        {"num_kv_heads": None},
        {"qkv_multipliers": None},  # lists alone
        {"qkv_multipliers": None, "num_gqa_groups": None},
        {"ffn_multipliers": [0.5, 4.0]},  # first and last layer
        {"normalize_qk_projections": None, "share_input_output_layers": None},
        {"rms_norm_eps": 1e-6, "num_hidden_layers": 4},  # aliases
    ],
)
def test_every_form_of_the_config_means_the_same_model(tmp_path, keys):
    apple_folder(tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "expected", to="samara")
    config, _ = apple_folder(tmp_path / "apple")
    kept = {key: value for key, value in {**config, **keys}.items() if value is not None}
    (tmp_path / "apple" / "config.json").write_text(json.dumps(kept))
    convert(tmp_path / "apple", tmp_path / "ours", to="samara")
    design = read_design(tmp_path / "ours").to_design()
    assert design == read_design(tmp_path / "expected").to_design()
    assert design.num_query_heads == (4, 6, 6, 8)
    assert design.ffn_dim == (32, 112, 176, 256)


def test_single_numbers_mean_uniform_layers(tmp_path):
    from samara.model.interchange.openelm_format import parse_openelm_config

    design = parse_openelm_config(
        tmp_path,
        {
            "model_dim": 64, "head_dim": 16, "num_transformer_layers": 3, "vocab_size": 50,
            "qkv_multipliers": 1.0, "num_gqa_groups": 4, "ffn_multipliers": 2, "ffn_dim_divisor": 8,
        },
    ).to_design()  # fmt: skip
    assert (design.num_query_heads, design.num_kv_heads) == ((4, 4, 4), (1, 1, 1))
    assert design.ffn_dim == (128, 128, 128)


# --- writing ----------------------------------------------------------------------------------


def save_random(folder, **design) -> SamaraForCausalLM:
    torch.manual_seed(0)
    config = SamaraConfig.from_design(ModelConfig(**design), bos_token_id=1, eos_token_id=2)
    model = SamaraForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    folder.mkdir()
    save_model(model, folder)
    return model


UNEVEN = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_query_heads": [6, 2, 4],
    "num_kv_heads": [3, 1, 2],
    "ffn_dim": [100, 34, 62],
    "vocab_size": 96,
    "rope_theta": 500.0,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("tied", [True, False])
def test_what_we_write_gives_the_references_logits(tmp_path, tied):
    model = save_random(tmp_path / "m", **UNEVEN, tie_word_embeddings=tied)
    convert(tmp_path / "m", tmp_path / "openelm", to="openelm")
    weights = load_file(tmp_path / "openelm" / "model.safetensors")
    assert ("lm_head.weight" in weights) is (not tied)
    ids = torch.randint(0, 96, (40,))
    config = json.loads((tmp_path / "openelm" / "config.json").read_text())
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert (reference_logits(config, weights, ids) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_there_and_back_gives_the_same_bits(tmp_path, dtype, max_shard_size):
    model = save_random(tmp_path / "fp32", **UNEVEN).to(dtype)
    (tmp_path / "m").mkdir()
    save_model(model, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "openelm", to="openelm", max_shard_size=max_shard_size)
    convert(tmp_path / "openelm", tmp_path / "back", to="samara")
    convert(tmp_path / "back", tmp_path / "again", to="openelm", max_shard_size=max_shard_size)
    back, original = (load_file(tmp_path / f / "model.safetensors") for f in ("back", "m"))
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    shards = sorted((tmp_path / "openelm").glob("*.safetensors"))
    assert (len(shards) > 1) is (max_shard_size == "30KB")
    for shard in shards:
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
    assert load_model(tmp_path / "back").config.to_design() == model.config.to_design()


def test_the_config_of_the_270m_is_apples_own(tmp_path):
    """Section 3.1 and 4 of the reference note: full lists, one pair, aliases, no auto_map."""
    from samara.model.interchange.openelm_format import openelm_config

    design = ModelConfig(
        hidden_size=1280, num_hidden_layers=16, head_dim=64, gqa_group_size=4, vocab_size=32000,
        layerwise_scaling=LayerwiseScaling(),
    )  # fmt: skip
    config = openelm_config(SamaraConfig.from_design(design, bos_token_id=1, eos_token_id=2))
    assert config.items() >= {
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "model_dim": 1280,
        "head_dim": 64,
        "num_transformer_layers": 16,
        "num_query_heads": [12] * 5 + [16] * 7 + [20] * 4,
        "num_kv_heads": [3] * 5 + [4] * 7 + [5] * 4,
        "ffn_multipliers": [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3,
                            3.53, 3.77, 4.0],
        "qkv_multipliers": [0.5, 1.0],
        "num_gqa_groups": 4,
        "ffn_dim_divisor": 256,
        "ffn_with_glu": True,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "rope_freq_constant": 10000,
        "rope_max_length": 4096,
        "max_context_length": 2048,
        "vocab_size": 32000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "use_cache": True,
        "num_hidden_layers": 16,
        "hidden_size": 1280,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }.items()  # fmt: skip
    assert "auto_map" not in config


def test_the_tokenizer_loads_without_remote_code(tmp_path):
    from transformers import AutoTokenizer

    from samara.data.tokenizer import train_tokenizer

    save_random(tmp_path / "m", **{**UNEVEN, "vocab_size": 300})
    train_tokenizer(["one two three, one two, one " * 20], tmp_path / "t", vocab_size=262)
    for file in (tmp_path / "t").iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    convert(tmp_path / "m", tmp_path / "openelm", to="openelm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "openelm")
    ids = tokenizer("one two").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids[1:]) == "one two"
