"""Codes of 1 to 8 bits in bytes, without a bit between them.

Bits lie in *planes* of 8, 4, 2 or 1 bits; 3 bits are a plane of two and a plane of one. A plane packs along the tokens:
its first byte holds the first token of each of its 8 / width stretches. Unpacking is then a shift and a mask over whole
stretches, which the CPU does 32 or 64 bytes at a time, and the head size may be anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compiled import quantizer

PLANES: dict[int, tuple[int, ...]] = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Widths of the planes for codes of so many bits, the high bits first."""


def packed_bytes(tokens: int, size: int, bits: int) -> int:
    """Bytes of the packed codes of `tokens` times `size` numbers. The last byte of a plane may not be full."""
    return sum(_bytes_long(tokens, width) for width in PLANES[bits]) * size


def pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Packs codes below 2 ** bits.

    Args:
        codes: uint8 `[..., P, D]`.

    Returns:
        The planes, uint8 `[..., ceil(P * width / 8), D]` each.
    """
    planes, compiled = [], quantizer(codes.device)
    shift = bits
    for width in PLANES[bits]:
        shift -= width
        if compiled is not None:
            planes.append(compiled.pack_tokens(codes, shift, width, _bytes_long(codes.shape[-2], width)))
            continue
        planes.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width))
    return tuple(planes)


def unpack(planes: tuple[Tensor, ...], bits: int, tokens: int) -> Tensor:
    """The codes, uint8 `[..., tokens, D]`, of what `pack` returned."""
    widths = PLANES[bits]
    size = planes[0].shape[-1]
    filled = max(plane.shape[-2] * 8 // width for plane, width in zip(planes, widths, strict=True))
    codes = planes[0].new_empty((*planes[0].shape[:-2], filled, size))
    # Four codes at a time where rows allow it: shifts of single bytes are not vectorised. What crosses into a
    # neighbour is masked off.
    word, ones = (torch.int32, 0x01010101) if size % 4 == 0 else (torch.uint8, 1)
    target = codes.view(word)
    below = bits  # bits below the plane
    for number, (plane, width) in enumerate(zip(planes, widths, strict=True)):
        below -= width
        source, length = plane.view(word), plane.shape[-2]
        mask = (((1 << width) - 1) << below) * ones
        for k in range(8 // width):
            shift = k * width - below
            part = source >> shift if shift > 0 else source << -shift if shift else source
            stretch = target[..., k * length : (k + 1) * length, :]
            if number == 0:
                torch.bitwise_and(part, mask, out=stretch)
            else:
                stretch |= part & mask
    return codes[..., :tokens, :]


def _bytes_long(tokens: int, width: int) -> int:
    return -(-tokens * width // 8)


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    stretches = 8 // width
    tokens, size = codes.shape[-2:]
    length = _bytes_long(tokens, width)
    padded = codes.new_zeros((*codes.shape[:-2], stretches * length, size))
    padded[..., :tokens, :] = codes
    parts = padded.view(*codes.shape[:-2], stretches, length, size).unbind(-3)
    plane = parts[0].clone()
    for k, part in enumerate(parts[1:], start=1):
        plane |= part << (k * width)
    return plane
