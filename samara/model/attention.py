"""Attention: which positions see which, and the kernel that does it.

One function, :func:`attend`, over PyTorch's SDPA everywhere; packed documents on a CUDA device go
through FlexAttention, whose block mask skips the blocks between documents.

Three rules say what a position sees within its document: causal (itself and what is before it),
bidirectional (everything), and prefix LM (arXiv 1910.10683, section 3.2.1): causal, but all see the
prefix.

Shapes: b batch, t query positions, s key positions (s >= t with a cache), h query heads,
g key-value heads (query head j reads key-value head floor(j / (h / g))), e head width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

AttentionMask = Tensor | BlockMask | None
"""None: a row is one document, queries and keys are the same positions. Tensor: True, or 0.0
against -inf, where a query sees a key, (b or 1, 1, t, s). BlockMask: FlexAttention's."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
FLEX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLEX_BLOCK = 128
MAX_KEYS_BY_PRODUCTS = 512


def attend(
    q_bhte: Tensor, k_bgse: Tensor, v_bgse: Tensor, *, mask: AttentionMask, causal: bool = True
) -> Tensor:
    """Softmax attention with scale 1 / sqrt(e).

    Args:
        q_bhte: Queries.
        k_bgse: Keys.
        v_bgse: Values.
        mask: Who sees whom.
        causal: What the mask None means: causal, or bidirectional.

    Returns:
        Mixed values (b, h, t, e).
    """
    # A branch decides it: compiled for any head counts, the comparison alone is not yet a bool.
    grouped = True if q_bhte.shape[1] != k_bgse.shape[1] else False  # noqa: SIM210
    if isinstance(mask, BlockMask):
        # An enclosing torch.compile takes the plain function into its own graph.
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        result: Tensor = flex(q_bhte, k_bgse, v_bgse, block_mask=mask, enable_gqa=grouped)
        return result
    if (
        q_bhte.requires_grad
        and q_bhte.device.type == "cpu"
        and q_bhte.dtype == torch.bfloat16
        and k_bgse.shape[2] <= MAX_KEYS_BY_PRODUCTS
    ):
        return _attend_by_products(q_bhte, k_bgse, v_bgse, mask=mask, causal=causal)
    if grouped and mask is not None and q_bhte.is_cuda:
        # The CUDA kernels that take a mask take no groups; the fallback that takes both keeps
        # every score.
        group_size = q_bhte.shape[1] // k_bgse.shape[1]
        k_bgse, v_bgse = (x.repeat_interleave(group_size, dim=1) for x in (k_bgse, v_bgse))
        grouped = False
    return functional.scaled_dot_product_attention(
        q_bhte,
        k_bgse,
        v_bgse,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=grouped,
    )


def _attend_by_products(
    q_bhte: Tensor, k_bgse: Tensor, v_bgse: Tensor, *, mask: Tensor | None, causal: bool
) -> Tensor:
    """The formula as written, for training in bfloat16 on CPU with short rows.

    There PyTorch's flash kernel, forward and backward, takes twice as long as these products
    (measured at b 8, h 4, t 256, e 64 on AMD EPYC: 30 ms against 14). Scores are kept in bfloat16.
    """
    num_kv_heads, num_keys = k_bgse.shape[1:3]
    if mask is None:
        every = torch.ones(1, 1, num_keys, num_keys, dtype=torch.bool)
        mask = _additive(every.tril() if causal else every, q_bhte.dtype)
    elif mask.dtype == torch.bool:
        mask = _additive(mask, q_bhte.dtype)
    q_bgjte = q_bhte.unflatten(1, (num_kv_heads, -1))  # type: ignore[no-untyped-call]
    products = q_bgjte @ k_bgse[:, :, None].mT
    scores = torch.add(mask[:, :, None], products, alpha=q_bhte.shape[-1] ** -0.5)
    return (scores.softmax(dim=-1) @ v_bgse[:, :, None]).flatten(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0.0 where a query sees a key, -inf elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def packed_mask(
    position_ids: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool = True,
    prefix_length: Tensor | None = None,
) -> Tensor | BlockMask:
    """Mask of rows that hold several documents; a document starts where a position is 0.

    Args:
        position_ids: Positions (b or 1, t), restarting at 0 at each document.
        head_dim: Width of one head.
        dtype: Of queries, keys and values.
        causal: Whether a position sees nothing after it.
        prefix_length: Positions of each row (b,) that all of their document sees nevertheless;
            None: there are none.

    Returns:
        A block mask where FlexAttention can run (CUDA), else 0.0 and -inf, (b or 1, 1, t, t).
    """
    document_bt = (position_ids == 0).cumsum(dim=-1)
    if prefix_length is not None:
        document_bt = document_bt.expand(prefix_length.shape[0], -1)
    if position_ids.is_cuda and HAS_TRITON and dtype in FLEX_DTYPES and head_dim >= 16:
        return _packed_block_mask(document_bt, causal=causal, prefix_length=prefix_length)
    sees_bts = document_bt[:, :, None] == document_bt[:, None, :]
    if prefix_length is not None:
        key_s = torch.arange(document_bt.shape[1], device=document_bt.device)
        in_prefix_bs = key_s < prefix_length[:, None]
        sees_bts &= (key_s <= key_s[:, None]) | in_prefix_bs[:, None, :]
    elif causal:
        sees_bts = sees_bts.tril()
    return _additive(sees_bts[:, None], dtype)


def cached_mask(
    *,
    batch_shape: tuple[int, int],
    num_past: int | Tensor,
    num_keys: int,
    attention_mask: Tensor | None,
    device: torch.device,
    causal: bool = True,
    prefix_length: Tensor | None = None,
) -> Tensor:
    """Explicit mask of new positions against a cache, and of padded rows.

    SDPA's own causal flag is aligned to the top left corner, which is wrong as soon as there are
    more keys than queries. Query i stands at key ``num_past + i`` and sees the keys up to itself.

    Args:
        batch_shape: (b, t) of the new positions.
        num_past: Positions already in the cache.
        num_keys: Key positions attended to (s); with a static cache more than are filled.
        attention_mask: 1 for tokens, 0 for padding, (b, num_past + t); None: no padding.
        device: Where the mask is wanted.
        causal: Whether a position sees nothing after it.
        prefix_length: Positions of each row (b,), padding included, that all see nevertheless.

    Returns:
        Booleans (b or 1, 1, t, s).
    """
    query_t = torch.arange(batch_shape[1], device=device) + num_past
    key_s = torch.arange(num_keys, device=device)
    sees_bts = (key_s <= query_t[:, None])[None] | (not causal)
    if prefix_length is not None:
        sees_bts = sees_bts | (key_s < prefix_length[:, None])[:, None, :]
    if attention_mask is None:
        return sees_bts[:, None]
    real_bs = attention_mask[:, :num_keys].bool()
    if real_bs.shape[1] < num_keys:  # the unfilled end of a static cache; causality hides it
        real_bs = functional.pad(real_bs, (0, num_keys - real_bs.shape[1]), value=True)
    # A padding query sees itself, so that its softmax is not over nothing.
    itself_ts = key_s == query_t[:, None]
    return ((sees_bts & real_bs[:, None, :]) | itself_ts)[:, None]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention compiled once per process; only the compiled kernel skips blocks."""
    # One kernel per pair of head counts, batch shape and gradient mode: layer-wise widths soon have
    # more than the eight after which dynamo would run the rest uncompiled.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
    return torch.compile(flex_attention, dynamic=False)


def _packed_block_mask(
    document_bt: Tensor, *, causal: bool = True, prefix_length: Tensor | None = None
) -> BlockMask:
    """Block mask from the first and last document of each block, without any (t, t) tensor.

    Document numbers rise along a row. Two blocks therefore share a document if neither's last one
    has ended before the other's first, and hold one and the same if all four are equal. The block
    on the diagonal is always met in part, as is the last one if it is not full: keys past the end
    are cut off there.
    """
    length = document_bt.shape[1]
    num_blocks = -(-length // FLEX_BLOCK)
    padding = num_blocks * FLEX_BLOCK - length
    last_bt = document_bt[:, -1:].expand(-1, padding)
    blocks = torch.cat((document_bt, last_bt), dim=1).unflatten(1, (num_blocks, FLEX_BLOCK))  # type: ignore[no-untyped-call]
    first_bn, last_bn = blocks[:, :, 0], blocks[:, :, -1]
    order = torch.arange(num_blocks, device=document_bt.device)
    before, diagonal = order < order[:, None], order == order[:, None]
    any_seen, all_seen = before | (not causal), before | (not causal)
    if prefix_length is not None:
        start_n = order * FLEX_BLOCK
        any_seen = any_seen | (start_n < prefix_length[:, None])[:, None, :]
        all_seen = all_seen | (start_n + FLEX_BLOCK <= prefix_length[:, None])[:, None, :]
    first_q, last_q = first_bn[:, :, None], last_bn[:, :, None]
    first_k, last_k = first_bn[:, None, :], last_bn[:, None, :]
    meets = any_seen & (last_k >= first_q) & (first_k <= last_q)
    one_document = (first_q == last_q) & (first_k == last_k) & (first_q == first_k)
    is_full = (order + 1) * FLEX_BLOCK <= length
    whole = all_seen & one_document & ~diagonal & is_full

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        del h
        same = document_bt[b, t] == document_bt[b, s]
        if prefix_length is not None:
            return same & ((t >= s) | (s < prefix_length[b]))
        return same & (t >= s) if causal else same

    num_partial, partial = _block_lists((meets & ~whole) | diagonal)
    num_whole, whole_indices = _block_lists(whole)
    return BlockMask.from_kv_blocks(
        num_partial,
        partial,
        num_whole,
        whole_indices,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _block_lists(met_bqk: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a block map: how many key blocks a query block meets, and which."""
    counts = met_bqk.sum(dim=-1, dtype=torch.int32)
    indices = met_bqk.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None], indices[:, None].to(torch.int32)
