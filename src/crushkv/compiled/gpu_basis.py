# mypy: disable-error-code="no-untyped-def"
"""Keys and values less their centre, and the centre itself, on a GPU in Triton: one launch where PyTorch takes dozens.

The plain forms are in `storage.basis`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import FUSED, on_its_device, power_of_two

_TOKENS = 16
_TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def _angles(positions, frequencies):
    """Cosines and sines, float32 `[T, D]`. Whole turns are taken off in float64: far positions lose nothing."""
    turns = positions.to(tl.float64)[:, None] * (frequencies.to(tl.float64) / _TWO_PI)[None, :]
    rest = ((turns - tl.floor(turns + 0.5)) * _TWO_PI).to(tl.float32)
    return tl.cos(rest), tl.sin(rest)


@triton.jit(do_not_specialize=["count", "of_index", "of_position"])
def _coordinates(
    out, x, indices, positions, centre, partner, frequencies, count, of_index, of_position, heads,
    of_row, of_head, of_token,
    D: tl.constexpr, D_FILLED: tl.constexpr, TOKENS: tl.constexpr, CENTRED: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Program: (tokens, row and head)."""
    pair = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, D_FILLED)
    real = d < D
    inside = (k < count)[:, None] & real[None, :]
    t = tl.load(indices + pair * of_index + k, mask=k < count, other=0).to(tl.int64)
    source = x + (pair // heads) * of_row + (pair % heads) * of_head
    number = tl.load(source + t[:, None] * of_token + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        of_centre = centre + pair * D
        away = tl.load(of_centre + d, mask=real, other=0.0).to(tl.float32)[None, :]
        if TURNS:
            p = tl.load(positions + pair * of_position + k, mask=k < count, other=0)
            cosine, sine = _angles(p, tl.load(frequencies + d, mask=real, other=0.0))
            with_it = tl.load(of_centre + tl.load(partner + d, mask=real, other=0), mask=real, other=0.0)
            away = away * cosine + with_it.to(tl.float32)[None, :] * sine
        number = number - away
    tl.store(out + (pair * count + k)[:, None] * D + d[None, :], number, mask=inside)


@on_its_device
def coordinates(
    x: Tensor, indices: Tensor, positions: Tensor, centre: Tensor | None, turns: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The tokens at `indices [B, Hkv, K]` of `x [B, Hkv, P, D]`, less their centre: float32 `[B, Hkv, K, D]`.

    Args:
        positions: int64 `[B, Hkv, K]`.
        centre: `[B, Hkv, 1, D]`, or None.
        turns: partner and frequencies of `Rope`, by which the centre turns; None: it does not.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, heads, _, size = x.shape
    count = indices.shape[2]
    out = torch.empty((rows, heads, count, size), dtype=torch.float32, device=x.device)
    if out.numel():
        (indices, of_index), (positions, of_position) = _pairs(indices), _pairs(positions)
        partner, frequencies = turns or (indices, indices)
        _coordinates[(triton.cdiv(count, _TOKENS), rows * heads)](
            out, x, indices, positions, indices if centre is None else centre.contiguous(), partner, frequencies,
            count, of_index, of_position, heads, *_strides(x), D=size, D_FILLED=power_of_two(size), TOKENS=_TOKENS,
            CENTRED=centre is not None, TURNS=turns is not None, **FUSED,
        )  # fmt: skip
    return out


def _pairs(x: Tensor) -> tuple[Tensor, int]:
    """`[B, Hkv, K]` with numbers side by side, and the distance from one row and head to the next."""
    rows, heads, _ = x.shape
    if x.stride(2) != 1 or (rows > 1 and x.stride(0) != heads * x.stride(1)):
        x = x.contiguous()
    return x, x.stride(1)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """From one row, head and token to the next."""
    row, head, token, _ = x.stride()
    return row, head, token


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _sums(
    out, x, positions, real, centre, partner, frequencies, tokens, blocks, heads, of_row, of_head, of_token,
    D: tl.constexpr, D_FILLED: tl.constexpr, TOKENS: tl.constexpr, TURNS: tl.constexpr, PADDED: tl.constexpr,
    SQUARED: tl.constexpr,
):  # fmt: skip
    """Program: (TOKENS tokens of all heads, row). Angles are the same for all heads."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D_FILLED)
    of_size = d < D
    t = block * TOKENS + tl.arange(0, TOKENS)
    counts = t < tokens
    if PADDED:
        counts &= tl.load(real + row * tokens + t, mask=counts, other=0) != 0
    inside = counts[:, None] & of_size[None, :]
    at = x + row * of_row + t.to(tl.int64)[:, None] * of_token
    if TURNS:
        cosine, sine = _angles(
            tl.load(positions + t, mask=t < tokens, other=0), tl.load(frequencies + d, mask=of_size, other=0.0)
        )
        with_it = tl.load(partner + d, mask=of_size, other=0)
    for head in range(heads):
        number = tl.load(at + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if TURNS:
            number = number * cosine - tl.load(at + with_it[None, :], mask=inside, other=0.0).to(tl.float32) * sine
        if SQUARED:
            of_centre = tl.load(centre + (row * heads + head) * D + d, mask=of_size, other=0.0).to(tl.float32)
            number -= of_centre[None, :]
            number = tl.where(inside, number * number, 0.0)
        tl.store(out + ((row * heads + head) * blocks + block) * D + d, tl.sum(number, 0), mask=of_size)
        at += of_head


@on_its_device
def mean(
    x: Tensor, positions: Tensor, real: Tensor | None, turns: tuple[Tensor, Tensor] | None, centre: Tensor | None = None
) -> Tensor:
    """The mean over the tokens of `x [B, Hkv, P, D]` before RoPE, float32 `[B, Hkv, 1, D]`; given a `centre`, that of
    the squares of what is left without it.

    Args:
        positions: int64 `[P]`.
        real: bool `[B, P]`; None: all tokens count.
        turns: partner and frequencies of `Rope`; None: the tokens are taken as they are.
        centre: `[B, Hkv, 1, D]`, before RoPE.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, heads, tokens, size = x.shape
    blocks = triton.cdiv(tokens, _TOKENS)
    sums = torch.empty((rows, heads, blocks, size), dtype=torch.float32, device=x.device)
    partner, frequencies = turns or (positions, positions)
    _sums[(blocks, rows)](
        sums, x, positions, positions if real is None else real.contiguous().view(torch.uint8),
        positions if centre is None else centre.contiguous(), partner, frequencies, tokens, blocks, heads,
        *_strides(x), D=size, D_FILLED=power_of_two(size), TOKENS=_TOKENS, TURNS=turns is not None,
        PADDED=real is not None, SQUARED=centre is not None, num_warps=8,
        **FUSED,
    )  # fmt: skip
    total = sums.sum(2, keepdim=True)
    return total / (tokens if real is None else real.sum(-1).clamp(min=1)[:, None, None, None])
