"""Attention mass without attention weights: softmax(QK^T) summed over queries, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LayerView

# A block of attention weights: on a CPU one that stays in its cache (two to three times as fast as 32 MiB), elsewhere
# large enough to keep the device busy; far below S x S in any case.
CPU_BLOCK_BYTES = 4 * 2**20
BLOCK_BYTES = 64 * 2**20


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    real: Tensor | None = None,
    queries_real: Tensor | None = None,
    softcap: float | None = None,
    block_bytes: int | None = None,
) -> Tensor:
    """The attention that each token receives from the given queries, exactly, under the causal mask.

    Args:
        queries: `[B, Hq, T, D]`, of the last T tokens.
        keys: `[B, Hkv, S, D]`, S >= T; Hq is a multiple of Hkv.
        scaling: factor of the logits.
        real: bool `[B, S]`; padding receives nothing.
        queries_real: bool `[B, T]`; padding gives nothing.
        softcap: bound of the logits by tanh (Gemma 2), None for none.
        block_bytes: upper bound of the weights held at a time (at least one query's are); None: what suits the device.

    Returns:
        float32 `[B, Hq, S]`; a row of q real queries sums to q for each head.
    """
    rows, heads, count, size = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    group = heads // kv_heads
    mass = torch.zeros((rows, kv_heads, group, tokens), dtype=torch.float32, device=keys.device)
    if block_bytes is None:
        block_bytes = CPU_BLOCK_BYTES if keys.device.type == "cpu" else BLOCK_BYTES
    block = max(1, min(count, block_bytes // (rows * heads * tokens * 4)))
    transposed = keys.transpose(-1, -2)
    for start in range(0, count, block):
        end = min(start + block, count)
        seen = tokens - count + end  # keys up to the last query of the block
        part = queries[:, :, start:end].reshape(rows, kv_heads, group * (end - start), size) * scaling
        logits = (part @ transposed[..., :seen]).float()
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        logits = logits.view(rows, kv_heads, group, end - start, seen)
        # Only the block's own keys can lie in the future of one of its queries.
        future = torch.ones((end - start, end - start), dtype=torch.bool, device=keys.device).triu(1)
        logits[..., seen - (end - start) :].masked_fill_(future, -torch.inf)
        if real is not None:
            logits.masked_fill_(~real[:, None, None, None, :seen], torch.finfo(torch.float32).min)
        weights = logits.softmax(-1)
        if queries_real is not None:
            weights *= queries_real[:, None, None, start:end, None]
        mass[..., :seen] += weights.sum(-2)
    return mass.view(rows, heads, tokens)


def window_mass(view: LayerView) -> Tensor:
    """`attention_mass` of the view's queries as a mean over the real ones, so that scores do not grow with them."""
    assert view.queries is not None
    count: Tensor | int = view.queries.shape[2]
    if view.queries_real is not None:
        count = view.queries_real.sum(-1).clamp(min=1)[:, None, None]
    return view_mass(view) / count


def view_mass(view: LayerView) -> Tensor:
    """`attention_mass` of the view's queries."""
    assert view.queries is not None
    return attention_mass(view.queries, view.keys, view.scaling, view.real, view.queries_real, view.softcap)
