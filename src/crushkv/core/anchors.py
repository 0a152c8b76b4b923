"""Anchors: the bit vectors that every signature is compared with, and with nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Anchor


def anchor_bits(name: Anchor, signatures: Tensor, real: Tensor, seed: int = 0) -> Tensor:
    """An anchor as long as the signatures.

    Args:
        name: `mean`: each bit is 1 where more than half of the row's real units have it;
            `inverse_mean`: the complement; `alternating`: 0 1 0 1...; `random`: drawn from `seed`.
        signatures: bool `[B, U, L]`, L bits for each of U units.
        real: bool `[B, U]`, False where a row has fewer units.

    Returns:
        bool `[B, L]`.
    """
    rows, _, length = signatures.shape
    device = signatures.device
    if name in ("mean", "inverse_mean"):
        ones = (signatures & real[:, :, None]).sum(1)
        majority = 2 * ones > real.sum(1, keepdim=True)
        return majority if name == "mean" else ~majority
    if name == "alternating":
        bits = torch.arange(length, device=device) % 2 == 1
    elif name == "random":
        bits = (torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.5).to(device)
    else:
        bits = torch.full((length,), name == "ones", device=device)
    return bits.expand(rows, length)
