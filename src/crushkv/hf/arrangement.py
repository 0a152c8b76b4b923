"""The order in which kept tokens are held: a block for each format, then what is held as the model made it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import Selection, Tier
from ..storage import Formats


@dataclass(frozen=True)
class Arrangement:
    """Kept tokens, slot by slot. Within a block they stand in the order of the text; rows that have fewer are filled up
    at the front of each block.

    Attributes:
        indices: int64 `[B, Hkv, P]` into what was selected from; anything where `tiers` is PADDING.
        tiers: uint8 `[B, Hkv, P]`.
        lengths: slots of each block, and last those of what is held as the model made it.
    """

    indices: Tensor
    tiers: Tensor
    lengths: tuple[int, ...]


def arrange(selection: Selection, formats: Formats) -> Arrangement:
    """The slots for a selection whose tiers are held in `formats`."""
    if formats.raw:
        return Arrangement(selection.indices, selection.tiers, (selection.indices.shape[2],))
    important, representative = selection.tiers == Tier.IMPORTANT, selection.tiers == Tier.REPRESENTATIVE
    contested = [important | representative] if len(formats.contested) == 1 else [important, representative]
    always = (selection.tiers == Tier.SINK) | (selection.tiers == Tier.RECENT)
    parts = [_block(selection, members) for members in (*contested, always)]
    indices, tiers = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    lengths = tuple(part.shape[2] for part, _ in parts)
    return Arrangement(indices, tiers, (*lengths, 0) if formats.recent_block else lengths)


def _block(selection: Selection, members: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and tiers of the members, aligned at the right. Every head of a row has the same number."""
    most = int(members.sum(-1).max())
    order = members.to(torch.uint8).argsort(dim=-1, stable=True)[..., members.shape[-1] - most :]
    tiers = selection.tiers.gather(-1, order).masked_fill(~members.gather(-1, order), Tier.PADDING)
    return selection.indices.gather(-1, order), tiers
