"""Keys and values less their centre, and the centre itself, on a CPU, by the compiled library (cpu_basis.cpp).

The functions are those of `gpu_basis`, where their arguments are described.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .cpu_library import DTYPES, FILLED, INTERVAL, TOGETHER, call


def coordinates(
    x: Tensor, indices: Tensor, positions: Tensor, centre: Tensor | None, turns: tuple[Tensor, Tensor] | None
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, heads, _, size = x.shape
    count = indices.shape[2]
    out = torch.empty((rows, heads, count, size))
    tables = _tables_of(turns, positions)
    call(
        "coordinates", x, out, indices.contiguous(), positions.contiguous(), _floats(centre), *tables,
        DTYPES[x.dtype], rows * heads, heads, count, size, *x.stride()[:3],
    )  # fmt: skip
    return out


def mean(
    x: Tensor, positions: Tensor, real: Tensor | None, turns: tuple[Tensor, Tensor] | None, centre: Tensor | None = None
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, heads, tokens, size = x.shape
    sums = torch.empty((rows, heads, -(-tokens // TOGETHER), size))
    counts = None if real is None else real.contiguous().view(torch.uint8)
    tables = _tables_of(turns, positions)
    call(
        "sums", x, sums, positions.contiguous(), counts, _floats(centre), *tables,
        DTYPES[x.dtype], rows, heads, tokens, size, *x.stride()[:3],
    )  # fmt: skip
    total = sums.sum(2, keepdim=True)
    return total / (tokens if real is None else real.sum(-1).clamp(min=1)[:, None, None, None])


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _tables_of(turns: tuple[Tensor, Tensor] | None, positions: Tensor) -> tuple[Tensor | None, ...]:
    """Partners, and the tables of their angles as far as the positions reach."""
    if turns is None or not positions.numel():
        return None, None, None
    partner, frequencies = turns
    return partner, *angle_tables(tuple(frequencies.tolist()), int(positions.max()))


def angle_tables(frequencies: tuple[float, ...], reach: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines where each interval of positions begins, up to `reach` and beyond, `[intervals, 2, D]`, and
    from there on, `[INTERVAL, 2, D]`: float32, with D filled up to whole vectors.

    Any angle is the sum of one of either. Angles are exact (float64), so that far positions lose nothing.
    """
    return _angle_tables(frequencies, _intervals(reach))


def interval_tables(frequencies: tuple[float, ...], reach: int) -> tuple[Tensor, Tensor]:
    """The same from the middle of each interval, which lies between two positions: `[intervals, 2, D]`, and from there
    to the positions of its second half, `[2, D, INTERVAL / 2]`. Those of the first half lie as far the other way."""
    return _interval_tables(frequencies, _intervals(reach))


def _intervals(reach: int) -> int:
    return 1 << max(reach // INTERVAL, 1).bit_length()


@lru_cache(maxsize=8)
def _angle_tables(frequencies: tuple[float, ...], intervals: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _turns(torch.arange(intervals) * INTERVAL, frequencies), _turns(torch.arange(INTERVAL), frequencies)


@lru_cache(maxsize=8)
def _interval_tables(frequencies: tuple[float, ...], intervals: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        middles = torch.arange(intervals) * INTERVAL + (INTERVAL - 1) / 2
        beside = _turns(torch.arange(INTERVAL // 2) + 0.5, frequencies)
        return _turns(middles, frequencies), beside.permute(1, 2, 0).contiguous()


def _turns(positions: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    each = torch.tensor([*frequencies, *[0.0] * (-len(frequencies) % FILLED)]).double()
    angles = positions[:, None] * each
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()
