"""Uniform quantization whose codes nest: the high bits of a code are the code of fewer bits.

A group of numbers of one token spans [low, low + span], which holds zero. A code of b bits names one of 2 ** b equal
cells of the span and stands for the middle of its cell. Two bytes hold the span: its width is 2 ** (n / 8), the least
such that the numbers fit, and zero lies at a whole number of 255ths of it.

So the 8-bit code is the whole story: dropping low bits gives exactly what
quantizing the numbers themselves to fewer bits would have given, and a token that moves from a tier of 8 bits to one
of 2 is quantized once in its life.

KIVI (arXiv 2402.02750) quantizes keys per channel, over groups of tokens, because a few channels are much larger than
the others. Here a rotation spreads these over all channels (QuaRot, arXiv 2404.00456), and every group lies within one
token, so that tokens can move and leave one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiled import quantizer
from .buffers import take

EMBEDDED_BITS = 8
# Spans are 2 ** (code / 8 - 16): from 2 ** -16 to nearly 2 ** 16, which is what float16 holds.
_PER_OCTAVE, _ZERO = 8, 128
# Where zero may lie in a span.
_PLACES = 255


@dataclass(frozen=True)
class Codes:
    """Quantized numbers of some tokens.

    codes: uint8 `[..., P, R]`, of 8 bits. zero, span: uint8 `[..., P, groups]`; see `ends`.
    """

    codes: Tensor
    zero: Tensor
    span: Tensor

    def gather(self, indices: Tensor) -> Codes:
        """The tokens at `indices [..., K]`."""
        return Codes(*(take(t, indices) for t in (self.codes, self.zero, self.span)))


def group_length(size: int, group_size: int) -> int:
    """Numbers a group: the largest divisor of `size` up to `group_size`, or all where only small ones divide it."""
    length = next(n for n in range(min(size, group_size), 0, -1) if size % n == 0)
    return length if 2 * length > min(size, group_size) else size


def groups(size: int, group_size: int) -> int:
    """Groups that `size` numbers of a token are divided into."""
    return size // group_length(size, group_size)


def ends(zero: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """The low end and the width of each span, float32, from their bytes."""
    width = ((span.float() - _ZERO) / _PER_OCTAVE).exp2_()
    return width * (zero.float() / -_PLACES), width


def quantize(x: Tensor, group_size: int) -> Codes:
    """Quantizes `x [..., P, R]` to 8 bits, `group_size` numbers of a token at a time."""
    length = group_length(x.shape[-1], group_size)
    if (compiled := quantizer(x.device)) is not None:
        return Codes(*compiled.range_codes(x, length))
    parts = x.float().unflatten(-1, (-1, length))
    least, most = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    # One place in 255 more than needed, since where zero lies is rounded.
    needed = (most - least).clamp(min=2.0**-16) * (_PLACES / (_PLACES - 1))
    span = (needed.log2() * _PER_OCTAVE).ceil_().add_(_ZERO).clamp_(0, 255).to(torch.uint8)
    width = ((span.float() - _ZERO) / _PER_OCTAVE).exp2_()
    # What the span has to spare lies on both sides.
    zero = ((width - most - least) / (2 * width) * _PLACES).round_().clamp_(0, _PLACES).to(torch.uint8)
    low, width = ends(zero, span)
    cells = (parts - low[..., None]) * (2**EMBEDDED_BITS / width)[..., None]
    codes = cells.clamp_(0, 2**EMBEDDED_BITS - 1).to(torch.uint8)  # truncates: the cell's number
    return Codes(codes.flatten(-2), zero, span)


def dequantize(codes: Tensor, zero: Tensor, span: Tensor, bits: int, out: Tensor) -> None:
    """Writes what codes of `bits` bits stand for.

    Args:
        codes: uint8 `[..., P, R]`. zero, span: uint8 `[..., P, groups]`.
        out: float32 `[..., P, R]`.
    """
    parts = out.unflatten(-1, (zero.shape[-1], -1))
    low, width = ends(zero, span)
    step = width * 2.0**-bits
    out.copy_(codes)
    parts.mul_(step[..., None]).add_((low + step / 2)[..., None])


def narrowed(codes: Tensor, bits: int) -> Tensor:
    """8-bit codes as codes of fewer bits."""
    return codes >> (EMBEDDED_BITS - bits) if bits < EMBEDDED_BITS else codes


def widened(codes: Tensor, bits: int) -> Tensor:
    """Codes of fewer bits as 8-bit codes that narrow to the same again, and stand for nearly the same value."""
    if bits == EMBEDDED_BITS:
        return codes
    missing = EMBEDDED_BITS - bits
    return (codes << missing) | (1 << (missing - 1))
