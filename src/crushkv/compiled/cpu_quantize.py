"""Quantizing and packing on a CPU, by the compiled library (cpu_quantize.cpp).

The functions are those of `gpu_quantize`, where their arguments are described.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import Levels
from .cpu_library import call

_SCALES = 5  # that are tried for a token: as in cpu_quantize.cpp


FITS_SPREADS = False  # a part of it, `spread_errors`, is compiled here


def channel_codes(
    x: Tensor, spread: Tensor, levels: Levels, factors: Sequence[float], code: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    assert len(factors) == _SCALES, "another number of scales was compiled"
    rows, heads, tokens, size = x.shape
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales = torch.empty((rows, heads, tokens, 1), dtype=torch.uint8)
    unit = spread.float() * levels.steps
    cost = levels.weight[:, None] * unit.square()
    given = [_floats(part) for part in (x, unit, cost, levels.used, levels.last, torch.tensor(factors))]
    call(
        "channel_codes", given[0], codes, scales, *given[1:], *map(float, code),
        rows * heads, heads, tokens, size,
    )  # fmt: skip
    return codes, scales


def spread_errors(
    x: Tensor, weight: Tensor, spread: Tensor, levels: Levels, factors: Tensor, sample: tuple[int, int]
) -> Tensor:
    """The squared errors of each channel of keys `x [B, Hkv, P, D]`, in squares of its steps, if these were larger by
    each of `factors [F]`: float32 `[F, B, Hkv, 1, D]`.

    Args:
        weight: float32 `[B, Hkv, P]`, how much a token counts; not negative.
        spread: float32 `[B, Hkv, 1, D]`.
        sample: of the tokens in the order of their weights; see `gpu_quantize.fitted_spread`.
    """
    rows, heads, tokens, size = x.shape
    errors = torch.empty((len(factors), rows, heads, 1, size))
    given = [_floats(part) for part in (x, weight, spread * levels.steps, levels.used, levels.last, factors)]
    call("spread_errors", errors, *given, len(factors), *sample, rows * heads, heads, tokens, size)
    return errors


def range_codes(x: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    x = _floats(x)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    zeros, spans = (codes.new_empty((*x.shape[:-1], x.shape[-1] // length)) for _ in range(2))
    call("range_codes", x, codes, zeros, spans, zeros.numel(), length)
    return codes, zeros, spans


def pack_channels(codes: Tensor, channels: Tensor, ups: Tensor, width: int, length: int) -> Tensor:
    rows, heads, tokens, size = codes.shape
    plane = codes.new_empty((rows, len(channels), length))
    given = (codes.contiguous(), plane, channels, ups.contiguous())
    call("pack_channels", *given, rows, heads, tokens, size, len(channels), width, length)
    return plane


def pack_tokens(codes: Tensor, up: int, width: int, length: int) -> Tensor:
    *batch, tokens, size = codes.shape
    plane = codes.new_empty((*batch, length, size))
    count = plane.numel() // max(1, length * size)
    call("pack_tokens", codes.contiguous(), plane, count, tokens, size, up, width, length)
    return plane


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()
