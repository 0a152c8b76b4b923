"""RoPE as storage needs it: how the keys of a layer turn with their position (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """How the keys of one layer turn: `R_p x = x cos(p frequencies) + x[partner] sin(p frequencies)`.

    Attributes:
        partner: int64 `[D]`, the channel that each channel is turned with; its own index where it is not turned.
        frequencies: float32 `[D]`, radians a position, signed: opposite for the two channels of a pair; 0 where a
            channel is not turned.
    """

    partner: Tensor
    frequencies: Tensor

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`R_p x` in float32. `x [..., D]`; `positions`: broadcast against `x`'s axes without the last."""
        return self._turn(x, positions, 1)

    def unturned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`R_-p x` in float32: what `turned` was given."""
        return self._turn(x, positions, -1)

    def _turn(self, x: Tensor, positions: Tensor, sign: int) -> Tensor:
        # The product in float32, as models have it: at far positions its rounding is a part of the angle.
        angles = positions[..., None].to(x.device, torch.float32) * self.frequencies.to(x.device)
        x = x.float()
        return x * angles.cos() + x[..., self.partner.to(x.device)] * (sign * angles.sin())

    def to(self, device: torch.device) -> Rope:
        """The same on another device, which the keys' own saves a copy at each call."""
        return Rope(self.partner.to(device), self.frequencies.to(device))

    def averaged(self, energy: Tensor) -> Tensor:
        """`energy [..., D]` with the mean of the two channels that are turned together in place of each."""
        return (energy + energy[..., self.partner.to(energy.device)]) / 2
