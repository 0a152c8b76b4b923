"""Attention mass without attention weights: softmax(QK^T), block by block, summed over queries or its maximum."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .base import LayerView

# A block of attention weights: on a CPU one that stays in its cache, elsewhere large enough to keep the device busy;
# far below S x S in any case.
CPU_BLOCK_BYTES = 16 * 2**20
CPU_THREAD_ROWS = 256  # of a block: with fewer, a product waits for keys, with more, for its own output
BLOCK_BYTES = 64 * 2**20


def attention_mass(view: LayerView, weight: Tensor | None = None, block_bytes: int | None = None) -> Tensor:
    """The attention that each token receives from the view's queries, exactly, under the causal mask.

    Tokens that are not shown receive nothing.

    Args:
        weight: bool or float `[B, T]`, how much a query counts. It is 0 for padding. None: all count 1.
        block_bytes: most bytes of weights held at a time, but at least those of one query. None: what suits the device.

    Returns:
        float32 `[B, Hq, S]`; a row sums to its queries' weights for each head (to less with sinks, which get the rest).
    """
    return _blockwise(view, weight, block_bytes)[1]


def attention_with_mass(view: LayerView, block_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention of the view's queries, `[B, Hq, T, Dv]`, and `attention_mass`, from one pass over QK^T."""
    output, mass = _blockwise(view, None, block_bytes, attend=True)
    assert output is not None
    return output, mass


def greatest_attention(view: LayerView) -> Tensor:
    """The most attention that each token receives from any one of the view's queries, float32 `[B, Hq, S]`."""
    return _blockwise(view, None, None, greatest=True)[1]


def _blockwise(
    view: LayerView, weight: Tensor | None, block_bytes: int | None, attend: bool = False, greatest: bool = False
) -> tuple[Tensor | None, Tensor]:
    assert view.queries is not None
    queries, keys, values, real = view.queries, view.keys, view.values, view.shown
    rows, heads, count, size = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    group = heads // kv_heads
    on_cpu = keys.device.type == "cpu"
    # A CPU's threads are given one KV head at a time, and each its own rows of the block from QK^T to the output, so
    # that they wait for each other rarely and what one wrote stays in its own cache.
    at_once = 1 if on_cpu else rows * kv_heads
    threads = torch.get_num_threads() if on_cpu else 1
    if block_bytes is None:
        block_bytes = CPU_BLOCK_BYTES if on_cpu else BLOCK_BYTES
    block = max(1, min(count, block_bytes // (at_once * group * tokens * 4)))
    if on_cpu:
        block = max(1, min(block, threads * CPU_THREAD_ROWS // group) // threads * threads)
    # Elsewhere than on a CPU, products of 16-bit numbers are the fast ones.
    dtype = torch.float32 if on_cpu else keys.dtype
    # Rows and KV heads become one axis N.
    queries = queries.reshape(-1, group, count, size)
    keys = keys.reshape(-1, tokens, size).transpose(-1, -2)
    if real is not None:
        real = (real[:, None] if real.ndim == 2 else real).expand(rows, kv_heads, tokens).reshape(-1, tokens)
    of_n = torch.arange(rows * kv_heads, device=keys.device) if weight is not None or view.sinks is not None else None
    mass = torch.zeros((rows * kv_heads, group, tokens), dtype=torch.float32, device=keys.device)
    output = None
    if attend:
        values = values.reshape(-1, tokens, values.shape[-1])
        output = values.new_empty((rows * kv_heads, group, count, values.shape[-1]))
    # One place for every block: memory asked for anew would be cleared by the system each time.
    room = keys.new_empty(at_once * group * block * tokens, dtype=dtype)
    for first in range(0, rows * kv_heads, at_once):
        some = slice(first, first + at_once)
        some_keys = keys[some].to(dtype)
        some_values = values[some].to(dtype) if attend else None
        padding = None if real is None else ~real[some, None, None]  # [n, 1, 1, S]
        counted = None
        if weight is not None and of_n is not None:
            counted = weight[of_n[some] // kv_heads, None, :, None]  # [n, 1, T, 1]
        for start in range(0, count, block):
            end = min(start + block, count)
            seen = tokens - count + end  # keys up to the last query of the block
            part = queries[some, :, start:end].flatten(1, 2).to(dtype) * view.scaling
            split = threads if part.shape[1] % threads == 0 else 1  # only ever above 1 where there is one product
            part = part.view(at_once * split, -1, size)
            shape = (*part.shape[:2], seen)
            of_split = some_keys[..., :seen].expand(at_once * split, -1, -1)
            logits = torch.bmm(part, of_split, out=room[: math.prod(shape)].view(shape)).float()
            logits = logits.view(at_once, group, end - start, seen)
            if view.softcap is not None:
                logits = logits.div_(view.softcap).tanh_().mul_(view.softcap)
            # Only the block's own keys can lie in the future of one of its queries.
            logits[..., seen - (end - start) :].masked_fill_(_future(end - start, keys.device), -torch.inf)
            if padding is not None:
                logits.masked_fill_(padding[..., :seen], torch.finfo(torch.float32).min)
            left = None
            if view.sinks is not None and of_n is not None:
                # What a softmax over tokens and sink gives the tokens, of one over the tokens alone.
                beside = view.sinks.view(kv_heads, group).float()[of_n[some] % kv_heads][:, :, None]
                left = torch.sigmoid(logits.logsumexp(-1) - beside)[..., None]
            weights = torch.softmax(logits, -1, out=logits)
            if left is not None:
                weights *= left
            if output is not None and some_values is not None:
                of_split = some_values[:, :seen].expand(at_once * split, -1, -1)
                attended = torch.bmm(weights.view(shape).to(dtype), of_split)
                output[some, :, start:end] = attended.view(at_once, group, end - start, -1)
            if counted is not None:
                weights *= counted[:, :, start:end]
            if greatest:
                mass[some, :, :seen] = mass[some, :, :seen].maximum(weights.amax(-2))
            else:
                mass[some, :, :seen] += weights.sum(-2)
    return None if output is None else output.view(rows, heads, count, -1), mass.view(rows, heads, tokens)


@lru_cache(maxsize=8)
def _future(count: int, device: torch.device) -> Tensor:
    """Which of some tokens are later than each of them, bool `[count, count]`."""
    with torch.inference_mode(False):
        return torch.ones((count, count), dtype=torch.bool, device=device).triu(1)


def window_mass(view: LayerView, half_life: float = 0) -> Tensor:
    """`attention_mass` of the view's queries as a mean over the real ones, so that scores do not grow with them.

    Args:
        half_life: a query counts half as much as one that comes so many tokens later. 0: all count the same.
    """
    assert view.queries is not None
    rows, _, count, _ = view.queries.shape
    weight = view.queries_real
    if half_life:
        age = torch.arange(count - 1, -1, -1, device=view.queries.device)
        later = (0.5 ** (age / half_life)).expand(rows, -1)
        weight = later if weight is None else later * weight
    mass = attention_mass(view, weight)
    return mass / (count if weight is None else weight.sum(-1).clamp(min=1)[:, None, None])


def view_mass(view: LayerView) -> Tensor:
    """`attention_mass` of the view's real queries."""
    return attention_mass(view, view.queries_real) if view.received is None else view.received
