"""Every part of a block in float64 against plain maths written out here, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samara.model.attention import attend
from samara.model.configuration import SamaraConfig
from samara.model.layers import FeedForward, RMSNorm, apply_rotary, rotary_tables
from samara.model.masked_lm import SamaraForMaskedLM
from samara.model.modeling import SamaraForCausalLM

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def rotate(x_te: Tensor, positions: list[int], theta: float) -> Tensor:
    """Turn pairs by complex multiplication: component i with component i + e / 2."""
    half = x_te.shape[-1] // 2
    angles = torch.tensor(
        [[p * theta ** (-2 * i / (2 * half)) for i in range(half)] for p in positions],
        dtype=torch.float64,
    )
    turned = torch.complex(x_te[:, :half], x_te[:, half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def causal(t: int, s: int) -> bool:
    return s <= t


def attention_by_loops(
    q_hte: Tensor,
    k_gse: Tensor,
    v_gse: Tensor,
    group: int,
    sees: Callable[[int, int], bool] = causal,
) -> Tensor:
    """One softmax at a time; query head j reads key-value head floor(j / group)."""
    heads = []
    for j, q_te in enumerate(q_hte):
        k_se, v_se = k_gse[j // group], v_gse[j // group]
        rows = []
        for t, q_e in enumerate(q_te):
            seen = [s for s in range(len(k_se)) if sees(t, s)]
            scores = (k_se[seen] @ q_e) / math.sqrt(q_e.shape[0])
            rows.append(torch.exp(scores - torch.logsumexp(scores, 0)) @ v_se[seen])
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def model_by_hand(
    model: SamaraForCausalLM | SamaraForMaskedLM,
    ids_t: Tensor,
    sees: Callable[[int, int], bool] = causal,
    positions: list[int] | None = None,
) -> Tensor:
    """Logits of one row by the functions above, reading the weights by name."""
    config, weights = model.config, dict(model.named_parameters())

    def project(name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" in weights:
            return x @ weights[f"{name}.weight"].T
        return silu(x @ weights[f"{name}.cola_a"]) @ weights[f"{name}.cola_b"]

    x = weights["model.embed_tokens.weight"][ids_t]
    positions = positions or list(range(len(ids_t)))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        n1 = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"])
        q, k, v = (
            project(f"{prefix}.self_attn.{name}_proj", n1)
            .view(len(ids_t), -1, config.head_dim)
            .transpose(0, 1)
            for name in "qkv"
        )
        if config.qk_norm:
            q = rms_norm(q, weights[f"{prefix}.self_attn.q_norm.weight"])
            k = rms_norm(k, weights[f"{prefix}.self_attn.k_norm.weight"])
        q = torch.stack([rotate(head, positions, config.rope_theta) for head in q])
        k = torch.stack([rotate(head, positions, config.rope_theta) for head in k])
        mixed = attention_by_loops(q, k, v, q.shape[0] // k.shape[0], sees)
        x = x + project(f"{prefix}.self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        n2 = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"])
        gate, up = (project(f"{prefix}.mlp.{name}_proj", n2) for name in ("gate", "up"))
        if config.cola_activation == "both" or f"{prefix}.mlp.gate_proj.weight" in weights:
            gate = silu(gate)
        x = x + project(f"{prefix}.mlp.down_proj", gate * up)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return rms_norm(x, weights["model.norm.weight"]) @ weights[head].T


DESIGNS = {
    "dense-uniform-mha-tied": {},
    "dense-layerwise-gqa": {
        "num_query_heads": [2, 4, 6],
        "num_kv_heads": [1, 2, 3],
        "ffn_dims": [8, 24, 40],
    },
    "dense-mqa-untied-no-qk-norm": {
        "num_query_heads": [4] * 3,
        "num_kv_heads": [1] * 3,
        "qk_norm": False,
        "tie_word_embeddings": False,
    },
    "cola-uniform": {"ranks": [6] * 3},
    "cola-both-layerwise-untied": {
        "num_query_heads": [2, 4, 6],
        "num_kv_heads": [2, 2, 2],
        "ffn_dims": [8, 24, 40],
        "ranks": [4, 6, 8],
        "cola_activation": "both",
        "tie_word_embeddings": False,
    },
    "mixed-per-projection": {"ranks": [0, {"q_proj": 3, "down_proj": 5}, 7]},
    "mixed-low-rank-up-only": {"ranks": [{"up_proj": 3}, {"gate_proj": 3}, {"o_proj": 2}]},
}


@pytest.mark.parametrize("fields", DESIGNS.values(), ids=DESIGNS)
def test_model_equals_the_formulas(fields: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = SamaraConfig(
        vocab_size=17, hidden_size=32, num_hidden_layers=3, head_dim=8, ffn_dims=[24] * 3
    ).to_dict()
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        config.pop(key)
    model = SamaraForCausalLM(SamaraConfig(**(config | fields))).double()
    with torch.no_grad():  # norm weights start at one; make them count
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    ids = torch.randint(0, 17, (1, 9))
    probe = torch.randn(1, 9, 17, dtype=torch.float64)
    logits = model(ids).logits
    gradients = torch.autograd.grad((logits * probe).sum(), list(model.parameters()))
    expected = model_by_hand(model, ids[0])[None]
    expected_gradients = torch.autograd.grad((expected * probe).sum(), list(model.parameters()))
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    for (name, _), gradient, wanted in zip(
        model.named_parameters(), gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10, msg=name)


def make_small(model_class: type, **fields: object) -> SamaraForCausalLM | SamaraForMaskedLM:
    torch.manual_seed(6)
    design = {
        "vocab_size": 17,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_query_heads": [2, 4],
        "num_kv_heads": [1, 2],
        "ffn_dims": [8, 24],
        "ranks": [0, 5],
    }
    return model_class(SamaraConfig(**design, **fields)).double()


def assert_equal_in_value_and_gradient(
    model: torch.nn.Module, logits: Tensor, expected: Tensor
) -> None:
    parameters = list(model.parameters())
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7)).double()
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
    gradients = torch.autograd.grad((logits * probe).sum(), parameters)
    wanted = torch.autograd.grad((expected * probe).sum(), parameters)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10)


# Two documents, of 4 and 5 tokens.
POSITIONS = [0, 1, 2, 3, 0, 1, 2, 3, 4]


def same(t: int, s: int) -> bool:
    return (t < 4) == (s < 4)


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_model_equals_the_formulas(packed: bool) -> None:
    model = make_small(SamaraForMaskedLM, attention="bidirectional")
    ids = torch.randint(0, 17, (1, 9), generator=torch.Generator().manual_seed(8))
    if packed:
        logits = model(ids, position_ids=torch.tensor([POSITIONS])).logits
        expected = model_by_hand(model, ids[0], same, POSITIONS)
    else:
        logits = model(ids).logits
        expected = model_by_hand(model, ids[0], lambda t, s: True)
    assert_equal_in_value_and_gradient(model, logits, expected[None])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", [0, 3, 6, 9])
def test_prefix_model_equals_the_formulas(prefix: int, packed: bool) -> None:
    """Also with a second document, whose part of the prefix only it sees."""
    model = make_small(SamaraForCausalLM)
    ids = torch.randint(0, 17, (1, 9), generator=torch.Generator().manual_seed(9))
    options = {"prefix_length": torch.tensor([prefix])}
    positions = POSITIONS if packed else list(range(9))
    if packed:
        options["position_ids"] = torch.tensor([positions])
    expected = model_by_hand(
        model,
        ids[0],
        lambda t, s: (same(t, s) or not packed) and (s <= t or s < prefix),
        positions,
    )
    assert_equal_in_value_and_gradient(model, model(ids, **options).logits, expected[None])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_attention(num_heads: int, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, heads, 7, 8, generator=generator, dtype=torch.float64)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    expected = attention_by_loops(q[0], k[0], v[0], num_heads // num_kv_heads)[None]
    torch.testing.assert_close(attend(q, k, v, mask=None), expected, rtol=1e-12, atol=1e-12)


def test_grouping_is_interleaved_and_not_tiled() -> None:
    """The negative case: query head j must not read key-value head j mod g."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 4, 5, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=generator, dtype=torch.float64)
    ours = attend(q, k, v, mask=None)
    interleaved = attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), mask=None)
    tiled = attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask=None)
    torch.testing.assert_close(ours, interleaved)
    assert (ours - tiled).abs().max() > 0.1
    permuted = attend(q[:, [0, 2, 1, 3]], k, v, mask=None)[:, [0, 2, 1, 3]]
    torch.testing.assert_close(permuted, tiled)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary(theta: float) -> None:
    generator = torch.Generator().manual_seed(3)
    positions = [0, 1, 5, 2047, 5000]
    x = torch.randn(1, 5, 2, 16, generator=generator, dtype=torch.float64)
    tables = rotary_tables(torch.tensor([positions]), head_dim=16, theta=theta, dtype=torch.float64)
    expected = torch.stack([rotate(x[0, :, head], positions, theta) for head in (0, 1)], dim=1)
    # Angles up to 5000 radians lose four digits of the sixteen.
    torch.testing.assert_close(apply_rotary(x, tables)[0], expected, rtol=1e-11, atol=1e-11)


def test_rms_norm_values_and_derivatives() -> None:
    torch.manual_seed(4)
    norm = RMSNorm(6, eps=EPS).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), rms_norm(x, norm.weight), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, w: norm_with(norm, x, w), (x, norm.weight))


def norm_with(norm: RMSNorm, x: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def test_swiglu() -> None:
    torch.manual_seed(5)
    config = SamaraConfig(hidden_size=16, num_hidden_layers=1, head_dim=8, ffn_dims=[24])
    ffn = FeedForward(config, 0).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = (
        silu(x @ ffn.gate_proj.weight.T) * (x @ ffn.up_proj.weight.T)
    ) @ ffn.down_proj.weight.T
    torch.testing.assert_close(ffn(x), expected, rtol=1e-13, atol=1e-13)
