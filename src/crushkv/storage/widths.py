"""How many bits each channel of the keys gets, so that the logits suffer least.

The two channels that RoPE turns together keep their energy at every position, so a channel can have the same width for
all tokens. An error in a channel costs as much as the queries have energy there. A further bit in a channel saves the
drop of the quantizer's distortion, times the energy of the keys there.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

WIDEST = 6
"""Bits of a channel, at most."""
STEPS = (1.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041)
"""Distance of the levels of the best uniform quantizer of 0 to 6 bits for standard normal numbers (Max, 1960)."""
_DISTORTION = (1.0, 0.36338, 0.11885, 0.03744, 0.01154, 0.00350, 0.00104)


def channel_bits(mean: float, size: int) -> int:
    """Bits of all `size` channels of a token's key, given their mean."""
    return int(mean * size)


def allocate(energy: Tensor, mean: float) -> Tensor:
    """Widths that make the sum of `energy * distortion` least: int64 `[Hkv, D]`, each 0 to `WIDEST`.

    Distortion falls less with each further bit, so that taking the bits that save most, one by one, is optimal. Those
    of a smaller mean are among those of a larger one.

    Args:
        energy: `[Hkv, D]`, what a channel costs at 0 bits: mean square of its keys times that of its queries.
        mean: bits a channel on average; each head gets `channel_bits(mean, D)` in all.
    """
    heads, size = energy.shape
    drops = torch.tensor([a - b for a, b in itertools.pairwise(_DISTORTION)], device=energy.device)
    # Where all is zero (a head that is never used), bits are spread evenly.
    saved = (energy.double().clamp(min=1e-30)[..., None] * drops).flatten(1)
    bits = saved.topk(channel_bits(mean, size), dim=-1).indices // WIDEST
    none = torch.zeros(heads, size, dtype=torch.int64, device=energy.device)
    return none.scatter_add_(1, bits, torch.ones_like(bits))
