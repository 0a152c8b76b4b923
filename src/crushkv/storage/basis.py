"""The coordinates in which keys or values of a layer are held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiled import centring
from ..rope import Rope
from .buffers import Pick, take
from .rotation import rotation


@dataclass
class Basis:
    """`coordinates = (x - R_p centre) @ rotation`, or `@ projection`, for each row and head.

    R_p turns the centre to the token's position p, as RoPE has turned the key. So a constant that all keys have before
    RoPE (the bias of a projection) goes away entirely. A mean taken after RoPE removes it only where RoPE hardly turns.

    A rotation is one matrix for all heads. It stays on while the model attends: queries are rotated instead of keys,
    outputs instead of values, which is cheaper by the number of tokens. A projection is undone token by token.

    Attributes:
        rotation: float32 `[D, D]`, or None.
        projection: `[B, Hkv, D, R]`, or None; a basis has one of them at most.
        centre: `[B, Hkv, 1, D]`, subtracted first, or None.
        rope: how the centre turns; None: it stays as it is.
        spread: float16 `[B, Hkv, 1, D]`, where channels have widths of their own: the root mean square of each, or once
            tokens are packed, what `channels.fitted_spread` has made of it.
    """

    rotation: Tensor | None = None
    projection: Tensor | None = None
    centre: Tensor | None = None
    rope: Rope | None = None
    spread: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held for the layer; a rotation is shared by all layers of all caches, and is not counted."""
        return sum(t.nbytes for t in (self.projection, self.centre, self.spread) if t is not None)

    def rank(self, size: int) -> int:
        """Numbers that are held of `size`."""
        return size if self.projection is None else self.projection.shape[-1]

    def centre_at(self, positions: Tensor) -> Tensor | None:
        """What is subtracted from the tokens at `positions [B, Hkv, P]`, float32 `[B, Hkv, P or 1, D]`."""
        if self.centre is None:
            return None
        return self.centre.float() if self.rope is None else self.rope.turned(self.centre, positions)

    def coordinates(self, x: Tensor, positions: Tensor) -> Tensor:
        """Float32 `[B, Hkv, P, R]` of `x [B, Hkv, P, D]` at `positions [B, Hkv, P]`."""
        x = x.float()
        centre = self.centre_at(positions)
        if centre is not None:
            x = x - centre
        matrix = self.rotation if self.projection is None else self.projection.float()
        return x if matrix is None else x @ matrix

    def taken(self, x: Tensor, indices: Tensor, positions: Tensor) -> Tensor:
        """`coordinates` of the tokens at `indices [B, Hkv, K]`, of which `positions [B, Hkv, K]` are the positions."""
        if (compiled := centring(x.device)) is None or self.projection is not None:
            return self.coordinates(take(x, indices), positions)
        numbers: Tensor = compiled.coordinates(x, indices, positions, self.centre, _turns(self.rope))
        return numbers if self.rotation is None else numbers @ self.rotation

    def parted(self, pick: Pick) -> Basis:
        """The same for some heads."""
        projection, centre, spread = (
            None if tensor is None else pick(tensor, 1) for tensor in (self.projection, self.centre, self.spread)
        )
        return Basis(self.rotation, projection, centre, self.rope, spread)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        for name in ("centre", "projection", "spread"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))


def _turns(rope: Rope | None) -> tuple[Tensor, Tensor] | None:
    return None if rope is None else (rope.partner, rope.frequencies)


def fit_channels(keys: Tensor, positions: Tensor, real: Tensor | None, rope: Rope | None) -> Basis:
    """The basis for keys whose channels have widths of their own: a centre, and the spread of each channel around it.

    Args: as of `fit`, but for positions, which are the same in all rows and heads: int64 `[1, 1, P]`.
    """
    if (compiled := centring(keys.device)) is not None:
        given = keys, positions.flatten(), real, _turns(rope)
        centre = compiled.mean(*given).to(keys.dtype)
        basis = Basis(centre=centre, rope=rope)
        # RoPE turns the squares of a pair into each other, and the mean of the pair is what counts.
        energy = compiled.mean(*given, centre)
    else:
        weight = _weight(real)
        centre = _mean(keys if rope is None else rope.unturned(keys, positions), weight).to(keys.dtype)
        basis = Basis(centre=centre, rope=rope)
        energy = _mean(basis.coordinates(keys, positions).square_(), weight)
    if rope is not None:
        energy = rope.averaged(energy)
    basis.spread = as_spread(energy.sqrt())
    return basis


# What float16 holds, with room for the scales of single tokens.
LEAST_SPREAD, MOST_SPREAD = 2.0**-14, 2.0**15


def as_spread(x: Tensor) -> Tensor:
    """Spreads as they are held."""
    return x.clamp(LEAST_SPREAD, MOST_SPREAD).half()


def _weight(real: Tensor | None) -> Tensor | None:
    return None if real is None else real[:, None, :, None].to(torch.float32)


def _mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """Over the tokens of `x [B, Hkv, P, D]`, float32 `[B, Hkv, 1, D]`."""
    if weight is None:
        return x.float().mean(2, keepdim=True)
    return (x.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)


def fit(
    x: Tensor,
    positions: Tensor,
    real: Tensor | None,
    *,
    centred: bool,
    rotate: bool,
    rank: int | float | None,
    rope: Rope | None = None,
) -> Basis:
    """The basis for tokens `x [B, Hkv, P, D]`, of which those where `real [B, P]` is False do not count.

    Args:
        positions: int64 `[B, Hkv, P]`.
        centred: take off the mean of the tokens. It is large in keys and would fill the quantizer's range.
        rotate: spread the coordinates over each other; see `rotation`.
        rank: how many leading singular directions to keep, or which share of their energy (the sum of squares, a mean
            over heads and rows) they must cover; None: all.
        rope: takes the mean before RoPE; None: as the tokens are.
    """
    weight = _weight(real)
    centre = None
    if centred:
        centre = _mean(x if rope is None else rope.unturned(x, positions), weight).to(x.dtype)
    if rank is None:
        return Basis(rotation(x.shape[-1], x.device) if rotate else None, centre=centre, rope=rope)
    basis = Basis(centre=centre, rope=rope)
    directions = _leading(basis.coordinates(x, positions), weight, rank)
    if rotate:
        directions = directions @ rotation(directions.shape[-1], x.device)
    basis.projection = directions.to(x.dtype)
    return basis


def _leading(x: Tensor, weight: Tensor | None, rank: int | float) -> Tensor:
    """Leading right singular directions of each head's tokens, float32 `[B, Hkv, D, R]`."""
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
