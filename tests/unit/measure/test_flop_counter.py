"""Counted FLOPs of attention: fused as unfused, with grouped queries, on CPU and on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from samara.measure.flop_counter import flop_counter

BATCH, HEADS, QUERIES, WIDTH = 2, 4, 16, 8
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def counted(device: str, key_heads: int, kernel: SDPBackend) -> int:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (
        torch.randn(BATCH, h, QUERIES, WIDTH, device=device, dtype=dtype, requires_grad=True)
        for h in (HEADS, key_heads, key_heads)
    )
    with sdpa_kernel([kernel]), flop_counter() as counter:
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key_heads != HEADS
        )
        out.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key_heads", [HEADS, HEADS // 2, 1])
def test_fused_attention_counts_as_its_products(device: str, key_heads: int) -> None:
    product = 2 * BATCH * HEADS * QUERIES * QUERIES * WIDTH
    assert counted(device, key_heads, SDPBackend.FLASH_ATTENTION) == 6 * product
    assert counted(device, key_heads, SDPBackend.MATH) == 6 * product
