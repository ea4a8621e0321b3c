"""What we write as OpenELM or Llama, run by mlx-lm on the CPU: the same logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra export)")

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def on_the_cpu():
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("kind", ["openelm", "llama"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_logits_are_equal(kind, max_shard_size, converted, request):
    folder, model = request.getfixturevalue(kind)
    loaded, tokenizer = mlx_lm.load(
        str(converted(folder, kind, max_shard_size=max_shard_size)), lazy=True
    )
    ids = tokenizer.encode("Once upon a time there was a little girl.")
    assert ids[0] == 1
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = np.array(loaded(mx.array([ids]))[0])
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(expected).max() > 0.1


def test_prefill_in_chunks_and_decoding_are_equal(openelm, converted):
    folder, model = openelm
    loaded, _ = mlx_lm.load(str(converted(folder, "openelm")))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    cache = make_prompt_cache(loaded)
    chunks = [ids[:, :17], ids[:, 17:30], *ids[:, 30:].split(1, dim=1)]
    found = [np.array(loaded(mx.array(chunk.numpy()), cache=cache)[0]) for chunk in chunks]
    assert np.abs(np.concatenate(found) - expected).max() < TOLERANCE


def test_a_uniform_multi_head_model_and_an_untied_one_are_equal(make_model, converted):
    """Untied OpenELM is possible in mlx-lm, though not in llama.cpp."""
    folder, model = make_model(
        hidden_size=48, num_hidden_layers=2, head_dim=16, ffn_dim=72, vocab_size=320,
        tie_word_embeddings=False,
    )  # fmt: skip
    loaded, _ = mlx_lm.load(str(converted(folder, "openelm")))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    found = np.array(loaded(mx.array(ids.numpy()))[0])
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["openelm", "llama"])
def test_a_larger_model_is_as_near_as_float32_gets(kind, make_model, converted):
    """Logits of 5 through eight layers of 512: PyTorch's own float32 is off by over 1e-5 there.

    So 1e-5 is asked for in units of the largest logit, and that the runtime's rounding is like
    PyTorch's, both measured against the same weights in float64.
    """
    shape = {"qk_norm": False, "ffn_dim": 1536}
    if kind == "openelm":
        shape = {"layerwise_scaling": {}, "gqa_group_size": 2, "ffn_dim_divisor": 16}
    folder, model = make_model(
        hidden_size=512, num_hidden_layers=8, head_dim=32, vocab_size=4000, **shape
    )
    loaded, _ = mlx_lm.load(str(converted(folder, kind)), lazy=True)
    ids = torch.arange(3, 3900, 61)[None]
    found = np.array(loaded(mx.array(ids.numpy()))[0]).astype(np.float64)
    with torch.no_grad():
        own = model(ids).logits[0].double().numpy()
        exact = model.double()(ids).logits[0].numpy()
    largest = np.abs(exact).max()
    assert largest > 4
    assert np.abs(found - own).max() < TOLERANCE * largest
    assert np.abs(found - exact).max() < 3 * np.abs(own - exact).max()


def test_half_precision_stays_half_precision(openelm, converted):
    folder, model = openelm
    loaded, _ = mlx_lm.load(str(converted(folder, "openelm", dtype="bfloat16")))
    weight = loaded.transformer.layers[2].attn.qkv_proj.weight
    assert weight.dtype == mx.bfloat16
    expected = model.model.layers[2].self_attn.q_proj.weight.detach().bfloat16().float().numpy()
    assert np.array_equal(np.array(weight[: expected.shape[0]].astype(mx.float32)), expected)
