"""Masks: packed documents, caches, padding; and the two ways to compute attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from samara.model.attention import (
    FLEX_BLOCK,
    _packed_block_mask,
    attend,
    cached_mask,
    packed_mask,
)

CPU = torch.device("cpu")


def sees(mask: Tensor) -> list[list[int]]:
    """Keys that each query of the first row sees."""
    visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    return [row.nonzero().flatten().tolist() for row in visible]


def test_packed_mask_is_causal_within_documents() -> None:
    mask = packed_mask(torch.tensor([[0, 1, 2, 0, 0, 1]]), head_dim=8, dtype=torch.float32)
    assert isinstance(mask, Tensor)
    assert sees(mask) == [[0], [0, 1], [0, 1, 2], [3], [4], [4, 5]]
    assert torch.isneginf(mask[mask != 0]).all()


def test_packed_mask_of_a_row_that_begins_inside_a_document() -> None:
    mask = packed_mask(torch.tensor([[7, 8, 0, 1]]), head_dim=8, dtype=torch.float32)
    assert sees(mask) == [[0], [0, 1], [2], [2, 3]]


def test_packed_mask_is_bidirectional_within_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    mask = packed_mask(positions, head_dim=8, dtype=torch.float32, causal=False)
    assert isinstance(mask, Tensor)
    assert sees(mask) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3], [4, 5], [4, 5]]


def test_packed_mask_with_prefixes_of_their_own() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    mask = packed_mask(
        positions, head_dim=8, dtype=torch.float32, prefix_length=torch.tensor([3, 5])
    )
    assert isinstance(mask, Tensor)
    assert sees(mask) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [4], [4, 5]]
    assert sees(mask[1:]) == [[0, 1, 2, 3]] * 4 + [[4], [4, 5]]


def test_cached_mask_of_padded_rows_that_look_both_ways() -> None:
    mask = cached_mask(
        batch_shape=(1, 4),
        num_past=0,
        num_keys=4,
        attention_mask=torch.tensor([[1, 1, 0, 0]]),
        device=CPU,
        causal=False,
    )
    assert sees(mask) == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 3]]


def test_cached_mask_shows_the_prefix_to_all() -> None:
    mask = cached_mask(
        batch_shape=(1, 4),
        num_past=0,
        num_keys=6,
        attention_mask=torch.tensor([[0, 1, 1, 1]]),
        device=CPU,
        prefix_length=torch.tensor([3]),
    )
    assert sees(mask) == [[0, 1, 2], [1, 2], [1, 2], [1, 2, 3]]


def test_cached_mask_is_bottom_right() -> None:
    mask = cached_mask(batch_shape=(1, 2), num_past=3, num_keys=5, attention_mask=None, device=CPU)
    assert sees(mask) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_cached_mask_hides_padding_but_leaves_no_query_without_a_key() -> None:
    mask = cached_mask(
        batch_shape=(1, 4),
        num_past=0,
        num_keys=4,
        attention_mask=torch.tensor([[0, 0, 1, 1]]),
        device=CPU,
    )
    assert sees(mask) == [[0], [1], [2], [2, 3]]


def test_cached_mask_of_a_static_cache_hides_the_unfilled_end() -> None:
    mask = cached_mask(
        batch_shape=(1, 2),
        num_past=torch.tensor(1),
        num_keys=6,
        attention_mask=torch.tensor([[0, 1, 1]]),
        device=CPU,
    )
    assert sees(mask) == [[1], [1, 2]]


@pytest.mark.parametrize("rule", ["causal", "bidirectional", "prefix"])
@pytest.mark.parametrize(
    "lengths",
    [
        (3 * FLEX_BLOCK,),
        (2 * FLEX_BLOCK + 30,),
        (1,) * (2 * FLEX_BLOCK),
        (FLEX_BLOCK, FLEX_BLOCK - 1, 1, FLEX_BLOCK + 5),
        (50, 300, 7),
        (5,),
    ],
)
def test_block_mask_covers_exactly_the_packed_mask(lengths: tuple[int, ...], rule: str) -> None:
    """The block lists, made without a (t, t) tensor, against the dense mask cut into blocks."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    length = positions.shape[1]
    num_blocks = -(-length // FLEX_BLOCK)
    options = {
        "causal": rule != "bidirectional",
        "prefix_length": torch.tensor([FLEX_BLOCK + 3]) if rule == "prefix" else None,
    }
    # The kernel cuts off what lies past the end; the last document may go on there.
    beyond = torch.arange(num_blocks * FLEX_BLOCK - length) + lengths[-1]
    dense = packed_mask(
        torch.cat((positions[0], beyond))[None], head_dim=8, dtype=torch.float32, **options
    )
    assert isinstance(dense, Tensor)
    blocks = _packed_block_mask((positions == 0).cumsum(-1), **options)
    shape = (num_blocks, FLEX_BLOCK, num_blocks, FLEX_BLOCK)
    tiles = (dense[0, 0] == 0).view(shape).transpose(1, 2)
    some, every = tiles.flatten(2).any(-1), tiles.flatten(2).all(-1)
    # Met in part whatever they hold: the diagonal, and the last block of keys unless it is full.
    every &= ~torch.eye(num_blocks, dtype=torch.bool)
    every[:, -1] &= length % FLEX_BLOCK == 0
    for query in range(num_blocks):
        partial = blocks.kv_indices[0, 0, query, : blocks.kv_num_blocks[0, 0, query]]
        whole = blocks.full_kv_indices[0, 0, query, : blocks.full_kv_num_blocks[0, 0, query]]
        assert sorted(whole.tolist()) == every[query].nonzero().flatten().tolist()
        assert sorted(partial.tolist()) == (some & ~every)[query].nonzero().flatten().tolist()
    seen = create_mask(blocks.mask_mod, 1, None, length, length, device="cpu")
    assert torch.equal(seen[0, 0], dense[0, 0, :length, :length] == 0)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "bool", "additive"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_products_equal_sdpa(num_heads: int, num_kv_heads: int, kind: str) -> None:
    """In bfloat16 on CPU, with a gradient: the same attention as without one, to rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 10, 16, generator=generator).bfloat16()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2]])
    mask = None
    if kind in ("bool", "additive"):
        mask = packed_mask(positions, head_dim=16, dtype=torch.bfloat16)
        assert isinstance(mask, Tensor)
        mask = mask == 0 if kind == "bool" else mask
    causal = kind != "bidirectional"
    by_sdpa = attend(q, k, v, mask=mask, causal=causal)
    q.requires_grad_()
    by_products = attend(q, k, v, mask=mask, causal=causal)
    assert by_products.requires_grad
    torch.testing.assert_close(by_products, by_sdpa, rtol=3e-2, atol=3e-2)
    exact = attend(
        q.double(),
        k.double(),
        v.double(),
        mask=mask.double() if kind == "additive" else mask,
        causal=causal,
    )
    torch.testing.assert_close(by_products.double(), exact, rtol=3e-2, atol=3e-2)
