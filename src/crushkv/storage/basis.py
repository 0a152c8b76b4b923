"""The coordinates in which keys or values of a layer are held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rotation import rotation


@dataclass
class Basis:
    """`coordinates = (x - centre) @ rotation`, or `@ projection`, for each row and head.

    A rotation is one matrix for all heads. It stays on while the model attends: queries are rotated instead of keys,
    outputs instead of values, which is cheaper by the number of tokens. A projection is undone token by token.

    Attributes:
        rotation: float32 `[D, D]`, or None.
        projection: `[B, Hkv, D, R]`, or None; a basis has one of them at most.
        centre: `[B, Hkv, 1, D]`, subtracted first, or None.
    """

    rotation: Tensor | None = None
    projection: Tensor | None = None
    centre: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held for the layer; a rotation is shared by all layers of all caches, and is not counted."""
        return sum(t.nbytes for t in (self.projection, self.centre) if t is not None)

    def rank(self, size: int) -> int:
        """Numbers that are held of `size`."""
        return size if self.projection is None else self.projection.shape[-1]

    def coordinates(self, x: Tensor) -> Tensor:
        """Float32 `[B, Hkv, P, R]` of `x [B, Hkv, P, D]`."""
        x = x.float()
        if self.centre is not None:
            x = x - self.centre.float()
        matrix = self.rotation if self.projection is None else self.projection.float()
        return x if matrix is None else x @ matrix

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        if self.centre is not None:
            self.centre = self.centre.index_select(0, rows.to(self.centre.device))
        if self.projection is not None:
            self.projection = self.projection.index_select(0, rows.to(self.projection.device))


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
        return Basis(rotation(x.shape[-1], x.device) if rotate else None, centre=centre)
    directions = _leading(x, centre, weight, rank)
    if rotate:
        directions = directions @ rotation(directions.shape[-1], x.device)
    return Basis(projection=directions.to(x.dtype), centre=centre)


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
