"""Keys and values less their centre, and the centre itself, on a CPU, by the compiled library (cpu_basis.cpp).

The functions are those of `gpu_basis`, where their arguments are described.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .cpu_library import DTYPES, FINE, LANES, TOGETHER, call


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
    """Cosines and sines at every `FINE`-th position up to `reach` and beyond, and at those between: float32
    `[positions, 2, D]` each, with D filled up to whole vectors.

    Any angle is the sum of one of either. Angles are exact (float64), so that far positions lose nothing.
    """
    return _angle_tables(frequencies, 1 << max(reach // FINE, 1).bit_length())


@lru_cache(maxsize=8)
def _angle_tables(frequencies: tuple[float, ...], intervals: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        each = torch.tensor([*frequencies, *[0.0] * (-len(frequencies) % LANES)]).double()
        turned = (torch.arange(n)[:, None] * step * each for n, step in ((intervals, FINE), (FINE, 1)))
        coarse, fine = (torch.stack([angles.cos(), angles.sin()], dim=1).float() for angles in turned)
    return coarse, fine
