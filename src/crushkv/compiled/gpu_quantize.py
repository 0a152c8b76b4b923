# mypy: disable-error-code="no-untyped-def"
"""Quantizing and packing on a GPU, in Triton: a few launches where PyTorch takes some hundred for each layer.

The plain forms stand beside the functions that call these: `storage.channels`, `storage.quantization` and
`storage.packing`. On the border of two cells, a number may fall into the other one here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constants import constant
from . import FUSED, Levels, on_its_device, power_of_two

_TOKENS = 32
_VARYING = ["tokens"]


# Keys with a width for each channel


@triton.jit
def _levels(y, top):
    """The codes of numbers in steps, of which `top` is the greatest, as float32."""
    return tl.minimum(tl.maximum(tl.floor(y + (top + 1) / 2), 0.0), top)


@triton.jit(do_not_specialize=_VARYING)
def _channel_codes(
    codes, scales, x, spread, steps, weight, used, last, factors, tokens, heads, octave, middle, least,
    D: tl.constexpr, D_FILLED: tl.constexpr, TOKENS: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Program: (tokens, row and head). See `storage.channels.quantize`."""
    pair = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, D_FILLED)
    real, of_head = d < D, (pair % heads) * D + d
    at = (pair * tokens + t)[:, None] * D + d[None, :]
    inside = (t < tokens)[:, None] & real[None, :]
    number = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    unit = tl.load(spread + pair * D + d, mask=real, other=1.0).to(tl.float32)
    unit *= tl.load(steps + of_head, mask=real, other=1.0)
    z = number / unit[None, :]
    price = tl.load(weight + of_head, mask=real, other=0.0) * unit * unit
    top = tl.load(last + of_head, mask=real, other=0.0)[None, :]
    size = tl.sum(z * z * tl.load(used + of_head, mask=real, other=0.0)[None, :], 1)
    base = tl.log2(tl.maximum(tl.sqrt(size), least))
    best_code = tl.zeros([TOKENS], tl.float32)
    best = tl.full([TOKENS], float("inf"), tl.float32)
    for i in tl.static_range(FACTORS):
        code = tl.floor((base + tl.load(factors + i)) * octave + (middle + 0.5))
        code = tl.minimum(tl.maximum(code, 0.0), 255.0)
        scale = tl.exp2((code - middle) / octave)
        y = z / scale[:, None]
        level = _levels(y, top)
        off = level - top / 2 - y
        error = tl.sum(off * off * price[None, :], 1) * scale * scale
        better = error < best
        best, best_code = tl.where(better, error, best), tl.where(better, code, best_code)
    y = z / tl.exp2((best_code - middle) / octave)[:, None]
    level = _levels(y, top)
    tl.store(codes + at, level.to(tl.uint8), mask=inside)
    tl.store(scales + pair * tokens + t, best_code.to(tl.uint8), mask=t < tokens)


@on_its_device
def channel_codes(
    x: Tensor, spread: Tensor, levels: Levels, factors: Sequence[float], code: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Codes and scales of keys `x [B, Hkv, P, D]`.

    Args:
        spread: `[B, Hkv, 1, D]`.
        factors: log2 of the scales that are tried, as parts of the token's size.
        code: what a scale's code counts: parts of an octave, and the code of 1.

    Returns:
        Codes, uint8 `[B, Hkv, P, D]`, and codes of the scales, uint8 `[B, Hkv, P, 1]`.
    """
    rows, heads, tokens, size = x.shape
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, heads, tokens, 1), dtype=torch.uint8, device=x.device)
    if tokens:
        _channel_codes[(triton.cdiv(tokens, _TOKENS), rows * heads)](
            codes, scales, x, spread.contiguous(), *(part.contiguous() for part in levels),
            constant(tuple(factors), x.device), tokens, heads, float(code[0]), float(code[1]), 1e-6,
            D=size, D_FILLED=power_of_two(size), TOKENS=_TOKENS, FACTORS=len(factors), **FUSED,
        )  # fmt: skip
    return codes, scales


FITS_SPREADS = True  # `fitted_spread` is compiled

_WEIGHTS = 1024  # that are added up at a time


@triton.jit(do_not_specialize=[*_VARYING, "sampled"])
def _spread_errors(
    errors, x, attended, order, spread, steps, used, last, factors, tokens, sampled, whole, step, pairs, heads, least,
    every_token, D: tl.constexpr, D_FILLED: tl.constexpr, TOKENS: tl.constexpr, KNOWN: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """`errors [F, pairs, D]`, see `storage.channels.fitted_spread`; 0 in channels without bits.

    attended: in descending `order`, -1 behind them where a slot is empty; KNOWN: whether it is there. Program: (row and
    head, factor).
    """
    pair, f = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D_FILLED)
    real, of_head = d < D, (pair % heads) * D + d
    one_step = tl.load(spread + pair * D + d, mask=real, other=1.0).to(tl.float32)
    one_step = (one_step * tl.load(steps + of_head, mask=real, other=1.0))[None, :]
    share = tl.load(used + of_head, mask=real, other=0.0)[None, :]
    top = tl.load(last + of_head, mask=real, other=0.0)
    factor = tl.load(factors + f)
    attended += pair * tokens
    mean = 1.0
    if KNOWN:
        sums, counts = tl.zeros([WEIGHTS], tl.float32), tl.zeros([WEIGHTS], tl.float32)
        for start in range(0, tokens, WEIGHTS):
            n = start + tl.arange(0, WEIGHTS)
            weight = tl.load(attended + n, mask=n < tokens, other=-1.0)
            sums += tl.maximum(weight, 0.0)
            counts += tl.where(weight < 0, 0.0, 1.0)
        mean = tl.sum(sums, 0) / tl.maximum(tl.sum(counts, 0), 1.0)
    total = tl.zeros([D_FILLED], tl.float32)
    for start in range(0, sampled, TOKENS):
        n = start + tl.arange(0, TOKENS)
        rank = tl.where(n < whole, n, whole + (n - whole) * step)
        t, weight = rank, tl.where(n < sampled, 1.0, -1.0)
        if KNOWN:
            t = tl.load(order + pair * tokens + rank, mask=n < sampled, other=0)
            weight = tl.load(attended + rank, mask=n < sampled, other=-1.0)
        weight = tl.where(weight < 0, 0.0, weight + every_token * mean) * tl.where(n < whole, 1, step)
        at = (pair * tokens + t)[:, None] * D + d[None, :]
        z = tl.load(x + at, mask=(n < sampled)[:, None] & real[None, :], other=0.0).to(tl.float32) / one_step
        scale = tl.maximum(tl.sqrt(tl.sum(z * z * share, 1)), least)[:, None] * factor
        y = z / scale
        off = _levels(y, top[None, :]) - top[None, :] / 2 - y
        total += tl.sum(off * off * (weight[:, None] * scale * scale), 0)
    tl.store(errors + (f * pairs + pair) * D + d, tl.where(top > 0, total, 0.0), mask=real)


@triton.jit(do_not_specialize=["parts"])
def _best_spreads(
    out, errors, spread, factors, parts, pairs, least_error, least, most,
    D: tl.constexpr, D_FILLED: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """The spread of each channel, times the factor that makes the product of its `errors [parts, F, pairs, D]` least.

    A channel in which all are the same has no bits, and keeps its spread. Program: row and head.
    """
    pair = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_FILLED)
    real = d < D
    best = tl.full([D_FILLED], float("inf"), tl.float32)
    greatest = tl.full([D_FILLED], float("-inf"), tl.float32)
    factor = tl.full([D_FILLED], 1.0, tl.float32)
    for f in range(FACTORS):
        total = tl.zeros([D_FILLED], tl.float32)
        for part in range(parts):
            at = ((part * FACTORS + f) * pairs + pair) * D + d
            total += tl.log(tl.maximum(tl.load(errors + at, mask=real, other=0.0), least_error))
        factor = tl.where(total < best, tl.load(factors + f), factor)
        best, greatest = tl.minimum(best, total), tl.maximum(greatest, total)
    fitted = tl.load(spread + pair * D + d, mask=real, other=1.0).to(tl.float32)
    fitted *= tl.where(best < greatest, factor, 1.0)
    tl.store(out + pair * D + d, tl.minimum(tl.maximum(fitted, least), most).to(tl.float16), mask=real)


@on_its_device
def fitted_spread(
    spread: Tensor,
    parts: Sequence[tuple[Tensor, Tensor | None, Levels]],
    factors: Tensor,
    sample: tuple[int, int],
    every_token: float,
    least_error: float,
    bounds: tuple[float, float],
) -> Tensor:
    """The spreads `[B, Hkv, 1, D]`, float16, times those of `factors [F]` that make the product of the errors least.

    Args:
        parts: of each format, keys `x [B, Hkv, P, D]`, the attention that they receive, float32 `[B, Hkv, P]` (-1 where
            a slot is empty; None: it is not known), and the levels.
        sample: of the tokens in the order of their attention, the greatest first, so many are looked at, and of the
            others each of such steps, which counts as many times.
        every_token: so many times the mean of the attention counts besides.
        least_error: of which a logarithm is taken. bounds: of the spreads.
    """
    rows, heads, _, size = spread.shape
    spread, pairs, count = spread.contiguous(), rows * heads, len(factors)
    errors = torch.empty((len(parts), count, pairs * size), device=spread.device)
    shape = {"D": size, "D_FILLED": power_of_two(size)}
    whole, step = sample
    for number, (x, attended, levels) in enumerate(parts):
        tokens, known = x.shape[2], attended is not None
        sampled = min(tokens, whole) + triton.cdiv(max(0, tokens - whole), step)
        ordered, order = (x, x) if attended is None else attended.sort(dim=-1, descending=True, stable=True)
        _spread_errors[(pairs, count)](
            errors[number], x.contiguous(), ordered, order, spread, levels.steps.contiguous(),
            levels.used.contiguous(), levels.last.contiguous(), factors, tokens, sampled, whole, step, pairs, heads,
            1e-6, every_token, TOKENS=_TOKENS, KNOWN=known, WEIGHTS=_WEIGHTS, **shape, **FUSED,
        )  # fmt: skip
    fitted = torch.empty(spread.shape, dtype=torch.float16, device=spread.device)
    _best_spreads[(pairs,)](
        fitted, errors, spread, factors, len(parts), pairs, least_error, *bounds, FACTORS=count, **shape, **FUSED
    )
    return fitted


# Numbers with a range for each group of a token


@triton.jit(do_not_specialize=_VARYING)
def _range_codes(codes, zeros, spans, x, tokens, LENGTH: tl.constexpr, FILLED: tl.constexpr, TOKENS: tl.constexpr):
    """Program: groups of numbers, each of LENGTH side by side. See `storage.quantization.quantize`."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, FILLED)
    at, inside = t[:, None] * LENGTH + d[None, :], (t < tokens)[:, None] & (d < LENGTH)[None, :]
    number = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    least, most = tl.minimum(tl.min(number, 1), 0.0), tl.maximum(tl.max(number, 1), 0.0)
    needed = tl.maximum(most - least, 0.0000152587890625) * (255.0 / 254.0)
    span = tl.minimum(tl.maximum(tl.ceil(tl.log2(needed) * 8) + 128, 0.0), 255.0)
    width = tl.exp2((span - 128) / 8)
    zero = tl.floor((width - most - least) / (2 * width) * 255 + 0.5)
    zero = tl.minimum(tl.maximum(zero, 0.0), 255.0)
    low = width * (zero / -255.0)
    cell = (number - low[:, None]) * (256.0 / width)[:, None]
    tl.store(codes + at, tl.minimum(tl.maximum(cell, 0.0), 255.0).to(tl.uint8), mask=inside)
    tl.store(zeros + t, zero.to(tl.uint8), mask=t < tokens)
    tl.store(spans + t, span.to(tl.uint8), mask=t < tokens)


@on_its_device
def range_codes(x: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 8 bits of `x [..., P, R]`, with where zero lies and the span of each group of `length` numbers."""
    x = x.contiguous()
    groups = x.numel() // length
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    zeros, spans = (codes.new_empty((*x.shape[:-1], x.shape[-1] // length)) for _ in range(2))
    if groups:
        grid = (triton.cdiv(groups, _TOKENS),)
        filled = power_of_two(length)
        _range_codes[grid](codes, zeros, spans, x, groups, LENGTH=length, FILLED=filled, TOKENS=_TOKENS, **FUSED)
    return codes, zeros, spans


# Planes


@triton.jit(do_not_specialize=["tokens", "length", "rows"])
def _pack(
    plane, codes, channels, ups, tokens, length, rows, size, of_row, of_byte, of_out, plane_row,
    WIDTH: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program: (bytes, rows of the plane, batch). Byte j of a row holds the tokens j, j + length, ..."""
    j = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    real = (j < length)[:, None] & (r < rows)[None, :]
    channel = tl.load(channels + r, mask=r < rows, other=0).to(tl.int64)
    up = tl.load(ups + r, mask=r < rows, other=0).to(tl.int32)
    # A channel of another head lies `tokens * size` numbers further.
    place = batch * of_row + channel // size * tokens * size + channel % size
    packed = tl.zeros([BYTES, ROWS], tl.int32)
    for s in tl.static_range(8 // WIDTH):
        token = s * length + j
        at = token.to(tl.int64)[:, None] * size + place[None, :]
        code = tl.load(codes + at, mask=real & (token < tokens)[:, None], other=0).to(tl.int32)
        packed |= ((code >> up[None, :]) & ((1 << WIDTH) - 1)) << (s * WIDTH)
    out = batch * plane_row + j.to(tl.int64)[:, None] * of_byte + (r.to(tl.int64) * of_out)[None, :]
    tl.store(plane + out, packed.to(tl.uint8), mask=real)


def pack_channels(codes: Tensor, channels: Tensor, ups: Tensor, width: int, length: int) -> Tensor:
    """A plane of the bits above `ups` of some channels' codes: uint8 `[B, n, length]`.

    codes: uint8 `[B, Hkv, P, D]`. channels: int64 `[n]`, of all heads, by `head * D + d`; ups: uint8 `[n]`.
    """
    plane = codes.new_empty((len(codes), len(channels), length))
    _launch_pack(plane, codes, channels, ups, length, (1, length), width)
    return plane


def pack_tokens(codes: Tensor, up: int, width: int, length: int) -> Tensor:
    """A plane of the bits above `up` of codes, uint8 `[..., P, D]`: uint8 `[..., length, D]`."""
    *batch, tokens, size = codes.shape
    plane = codes.new_empty((*batch, length, size))
    channels, ups = _all_channels(size, up, codes.device)
    of_batch = codes.reshape(math.prod(batch), 1, tokens, size)  # -1 would not do for no tokens
    _launch_pack(plane.view(len(of_batch), length, size), of_batch, channels, ups, length, (size, 1), width)
    return plane


@lru_cache(maxsize=64)
def _all_channels(size: int, up: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return torch.arange(size, device=device), torch.full((size,), up, dtype=torch.uint8, device=device)


@on_its_device
def _launch_pack(
    plane: Tensor, codes: Tensor, channels: Tensor, ups: Tensor, length: int, target: tuple[int, int], width: int
) -> None:
    """codes: `[B, Hkv, P, D]`. target: from one byte, and from one channel, to the next in a row of `plane`."""
    if not plane.numel():
        return
    codes, rows, together = codes.contiguous(), len(channels), 32
    *_, tokens, size = codes.shape
    grid = (triton.cdiv(length, together), triton.cdiv(rows, together), len(codes))
    _pack[grid](
        plane, codes, channels, ups, tokens, length, rows, size, codes[0].numel(), *target, plane[0].numel(),
        WIDTH=width, BYTES=together, ROWS=together, **FUSED,
    )  # fmt: skip
