"""The coordinates in which keys or values of a layer are held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rotation import rotation


@dataclass
class Basis:
    """`coordinates = (x - centre) @ directions`, for each row and head.

    A pure rotation is one matrix for all heads. It stays on while the model attends: queries are rotated instead of
    keys, outputs instead of values, which is cheaper by the number of tokens. A projection is undone token by token.

    Attributes:
        directions: float32 `[D, D]` (a rotation), `[B, Hkv, D, R]` (a projection), or None: as they come.
        centre: `[B, Hkv, 1, D]`, subtracted first, or None.
    """

    directions: Tensor | None
    centre: Tensor | None

    @property
    def rotates(self) -> bool:
        return self.directions is not None and self.directions.ndim == 2

    @property
    def projects(self) -> bool:
        return self.directions is not None and self.directions.ndim == 4

    @property
    def nbytes(self) -> int:
        """Bytes held for the layer; a rotation is shared by all layers of all caches, and is not counted."""
        held = (self.centre, self.directions if self.projects else None)
        return sum(t.nbytes for t in held if t is not None)

    def coordinates(self, x: Tensor) -> Tensor:
        """Float32 `[B, Hkv, P, R]` of `x [B, Hkv, P, D]`."""
        x = x.float()
        if self.centre is not None:
            x = x - self.centre.float()
        return x if self.directions is None else x @ self.directions.float()

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        if self.centre is not None:
            self.centre = self.centre.index_select(0, rows.to(self.centre.device))
        if self.projects:
            assert self.directions is not None
            self.directions = self.directions.index_select(0, rows.to(self.directions.device))


def fit(x: Tensor, real: Tensor | None, centred: bool, rotate: bool, rank: int | float | None) -> Basis:
    """The basis for tokens `x [B, Hkv, P, D]`, of which those where `real [B, P]` is False do not count.

    Args:
        centred: take off the mean of the tokens. It is large in keys and would fill the quantizer's range.
        rotate: spread the coordinates over each other; see `rotation`.
        rank: how many leading singular directions to keep, or which share of their energy (the sum of squares, a mean
            over heads and rows) they must cover; None: all.
    """
    weight = None if real is None else real[:, None, :, None].to(torch.float32)
    centre = None
    if centred:
        total = x.float() if weight is None else x.float() * weight
        count = x.shape[2] if weight is None else weight.sum(2, keepdim=True).clamp(min=1)
        centre = (total.sum(2, keepdim=True) / count).to(x.dtype)
    if rank is None:
        return Basis(rotation(x.shape[-1], x.device) if rotate else None, centre)
    directions = _leading(x, centre, weight, rank)
    if rotate:
        directions = directions @ rotation(directions.shape[-1], x.device)
    return Basis(directions.to(x.dtype), centre)


def _leading(x: Tensor, centre: Tensor | None, weight: Tensor | None, rank: int | float) -> Tensor:
    """Leading right singular directions of each head's tokens, float32 `[B, Hkv, D, R]`."""
    x = x.float() if centre is None else x.float() - centre.float()
    if weight is not None:
        x = x * weight
    energy, directions = torch.linalg.eigh(x.transpose(-1, -2) @ x)
    energy, directions = energy.flip(-1).clamp(min=0), directions.flip(-1)
    if isinstance(rank, float):
        share = (energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp(min=1e-30)).mean((0, 1))
        rank = min(int((share < rank).sum()) + 1, x.shape[-1])
    directions = directions[..., :rank]
    # Either sign will do; with the largest entry positive, nearly equal tokens lead to nearly equal directions.
    largest = directions.gather(-2, directions.abs().argmax(-2, keepdim=True))
    return directions * largest.sign()
