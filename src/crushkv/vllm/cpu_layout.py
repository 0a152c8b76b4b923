"""Finds the layout of vLLM's CPU cache on this machine by writing known numbers and looking where they went."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from .layout import CacheLayout, PermutedLayout, StridedLayout

# Digits are small enough to be exact in every dtype, fp8 included.
BASE = 8


@cache
def cpu_layout(isa: str, block_size: int, head_size: int, dtype: torch.dtype, cache_dtype: str) -> CacheLayout:
    """The layout that vLLM's own kernel writes.

    Args:
        isa: the instruction set that the attention layer uses (its attribute `isa`).
        dtype: of the model; the cache has it too where `cache_dtype` is "auto".
        cache_dtype: vLLM's `kv_cache_dtype`.

    Raises:
        RuntimeError: keys or values are not stored as a permutation of their numbers.
    """
    numbers = block_size * head_size
    index = torch.arange(numbers)
    found = torch.zeros((2, numbers), dtype=torch.long)
    scale = 1
    while scale < numbers:
        found += _stored(index // scale % BASE, isa, block_size, head_size, dtype, cache_dtype) * scale
        scale *= BASE
    places = found.argsort(dim=-1)
    if not torch.equal(found.gather(1, places), index.expand(2, -1)):
        raise RuntimeError(f"crushkv: the CPU cache (isa={isa}, dtype={dtype}, {cache_dtype}) has an unknown layout")
    keys, values = places.view(2, block_size, head_size)
    if (key_strides := _strides(keys)) and (value_strides := _strides(values)):
        return StridedLayout(block_size, head_size, key_strides, value_strides)
    return PermutedLayout(keys, values)


def _strides(places: Tensor) -> tuple[int, int] | None:
    """How far apart tokens and dimensions lie in `places [block size, D]`, None if not everywhere the same."""
    token, dimension = int(places[1, 0] - places[0, 0]), int(places[0, 1] - places[0, 0])
    tokens, dimensions = (torch.arange(size) for size in places.shape)
    same = torch.equal(places, tokens[:, None] * token + dimensions * dimension)
    return (token, dimension) if same else None


def _stored(digits: Tensor, isa: str, block_size: int, head_size: int, dtype: torch.dtype, cache_dtype: str) -> Tensor:
    """Writes `digits [block size * D]` as keys and as values of one block: int64 `[2, numbers]` as they are stored."""
    storage = dtype if cache_dtype == "auto" else fp8_dtype(cache_dtype)
    heads = 2
    block = torch.zeros((1, heads, 2 * block_size, head_size), dtype=storage)
    raw = block if cache_dtype == "auto" else block.view(torch.uint8)
    keys, values = raw.chunk(2, dim=2)
    tokens = digits.view(block_size, 1, head_size).expand(-1, heads, -1).to(dtype).contiguous()
    slots = torch.arange(block_size)
    ops.cpu_attn_reshape_and_cache(
        tokens, tokens.clone(), keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=cache_dtype
    )
    return block[0, 0].view(2, -1).float().round().long()


def fp8_dtype(cache_dtype: str) -> torch.dtype:
    """The dtype of the numbers in an fp8 cache, which is stored as bytes."""
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn
