"""Layers of random tokens that are held in some formats, for tests of what attends to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crushkv import CrushConfig
from crushkv.presets import PRESETS
from crushkv.rope import Rope
from crushkv.storage import RAW, Formats, TieredStorage

FORMATS: dict[str, Formats] = {
    **{name: CrushConfig(**preset).formats for name, preset in PRESETS.items()},
    "tokens in 4 bits": Formats((4, 4), (4, 4)),
    "tokens in 3 and 2 bits": Formats((3, 2), (2, 2)),
    "no rotation": Formats((8, 3), (3, 4), (4, 8), rotation=False),
    "keys as they are": Formats((RAW, 4), (RAW, 4)),
    "values as they are": Formats((2.25, RAW), (2.25, RAW), by_channel=True),
    "wide and narrow": Formats((6, 8), (1, 2), (8, 8), by_channel=True),
}


def rope_of(size: int, turned: int | None = None, interleaved: bool = False, base: float = 10000.0) -> Rope:
    """A Llama-like RoPE over the first `turned` channels."""
    turned = size if turned is None else turned
    half = torch.arange(turned // 2)
    frequencies = base ** (-2 * half / max(turned, 1))
    first, second = (2 * half, 2 * half + 1) if interleaved else (half, half + turned // 2)
    partner, signed = torch.arange(size), torch.zeros(size)
    partner[first], partner[second] = second, first
    signed[first], signed[second] = -frequencies, frequencies
    return Rope(partner, signed)


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer. `seen` tokens, of which some are `kept`, and `since` that came after that."""

    rows: int = 1
    kv_heads: int = 2
    group: int = 3
    size: int = 16
    value_size: int | None = None
    seen: int = 200
    kept: int = 120
    since: int = 3

    def queries(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        return torch.randn(self.rows, self.kv_heads * self.group, 1, self.size).to(device, dtype)


def store_of(
    formats: Formats,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    rope: Rope | None = None,
    device: str = "cpu",
) -> TieredStorage:
    """A layer after an eviction. Its keys have a large mean, as keys have, and channels of different size."""
    store = TieredStorage(formats)
    size = (shape.rows, shape.kv_heads)
    keys = torch.randn(*size, shape.seen, shape.size) * torch.rand(shape.size) * 2 + 2 * torch.randn(shape.size)
    if rope is not None:
        keys = rope.turned(keys, torch.arange(shape.seen))
    values = torch.randn(*size, shape.seen, shape.value_size or shape.size)
    store.append(keys.to(device, dtype), values.to(device, dtype))
    store.fit(None, None if rope is None else rope.to(torch.device(device)))
    order = torch.rand(*size, shape.seen).argsort(-1)[..., : shape.kept].sort(-1).values
    store.keep(order.to(device), lengths_of(formats, shape.kept))
    for _ in range(shape.since):
        new = (torch.randn(*size, 1, n).to(device, dtype) for n in (shape.size, shape.value_size or shape.size))
        store.append(*new)
    return store


def lengths_of(formats: Formats, kept: int) -> list[int]:
    """How many slots each block has, and what stays as it is."""
    if formats.raw:
        return [kept]
    always = min(9, kept // 3)
    contested = [kept - always] if len(formats.contested) == 1 else [kept // 3, kept - always - kept // 3]
    return [*contested, always, 0] if formats.recent_block else [*contested, always]
