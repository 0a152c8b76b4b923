"""Where keys and values lie in a paged cache: the only part that knows an attention backend's memory."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class CacheLayout(ABC):
    """Reads and writes the tokens of one request in one layer's cache.

    Values are moved as they are stored (fp8 included), never converted. `blocks` are block numbers, int64 `[n]`, in
    the order of the text.
    """

    @abstractmethod
    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values in the storage dtype, `[Hkv, n * block size, D]` each."""

    @abstractmethod
    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes T <= n * block size tokens `[Hkv, T, D]` into the first T slots of the blocks; the rest is left."""


class InterleavedLayout(CacheLayout):
    """FlashAttention's: `[blocks, Hkv, block size, D + Dv]` with any strides, a token's key beside its value."""

    def __init__(self, head_size: int) -> None:
        self.head_size = head_size

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        tokens = _bits(cache)[blocks].transpose(0, 1).flatten(1, 2).view(cache.dtype)  # [Hkv, T, D + Dv]
        return tokens[..., : self.head_size], tokens[..., self.head_size :]

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        block_size = cache.shape[2]
        slot = torch.arange(keys.shape[1], device=cache.device)
        tokens = torch.cat([_bits(keys), _bits(values)], dim=-1).transpose(0, 1)  # [T, Hkv, bytes]
        _bits(cache)[blocks[slot // block_size], :, slot % block_size] = tokens


class StridedLayout(CacheLayout):
    """vLLM's CPU cache on most machines: `[blocks, Hkv, block size, 2 D]`, keys in front, in orders that strides give.

    Args:
        block_size, head_size: of the cache.
        keys, values: each the stride from token to token and from dimension to dimension, in numbers.
    """

    def __init__(self, block_size: int, head_size: int, keys: tuple[int, int], values: tuple[int, int]) -> None:
        self.block_size, self.head_size = block_size, head_size
        self.keys, self.values = keys, values

    def _views(self, cache: Tensor) -> list[Tensor]:
        """Keys and values `[blocks, Hkv, block size, D]` as views of the cache."""
        bits = _bits(cache)
        shape = (*cache.shape[:2], self.block_size, self.head_size)
        starts = (0, self.block_size * self.head_size)
        return [
            bits.as_strided(shape, (*bits.stride()[:2], *strides), bits.storage_offset() + start)
            for start, strides in zip(starts, (self.keys, self.values), strict=True)
        ]

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (view[blocks].transpose(0, 1).flatten(1, 2).view(cache.dtype) for view in self._views(cache))
        return keys, values

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        slot = torch.arange(keys.shape[1], device=cache.device)
        for view, tokens in zip(self._views(cache), (keys, values), strict=True):
            view[blocks[slot // self.block_size], :, slot % self.block_size] = _bits(tokens).transpose(0, 1)


class PermutedLayout(CacheLayout):
    """The same where strides do not describe the order (AMX packs keys in pairs).

    Args:
        keys, values: int64 `[block size, D]`: where in the block's part the number of each (token, dimension) lies.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.block_size, self.head_size = keys.shape
        self._places = torch.stack([keys.flatten(), values.flatten() + keys.numel()])  # [2, block size * D]

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        flat = cache.view(*cache.shape[:2], -1)[blocks]  # [n, Hkv, numbers]
        keys, values = (self._tokens(flat, places) for places in self._places)
        return keys, values

    def _tokens(self, flat: Tensor, places: Tensor) -> Tensor:
        count, heads, _ = flat.shape
        ordered = _bits(flat).index_select(2, places).view(flat.dtype)
        return ordered.view(count, heads, self.block_size, self.head_size).transpose(0, 1).flatten(1, 2)

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        slot = torch.arange(keys.shape[1], device=cache.device)
        block = blocks[slot // self.block_size][:, None, None]
        head = torch.arange(keys.shape[0], device=cache.device)[:, None]
        flat = _bits(cache.view(*cache.shape[:2], -1))
        for tokens, places in zip((keys, values), self._places, strict=True):
            place = places.view(self.block_size, 1, self.head_size)[slot % self.block_size]  # [T, 1, D]
            flat[block, head, place] = _bits(tokens).transpose(0, 1)


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers. Few operations exist for fp8, and none may round."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
