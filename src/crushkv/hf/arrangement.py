"""The order in which kept tokens are held: a block for each format, then what is held as the model made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import Selection, Tier, members_at
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
    full: bool  # no row has fewer than another


def arrange(selection: Selection, formats: Formats) -> Arrangement:
    """The slots for a selection whose tiers are held in `formats`."""
    if formats.raw:
        held = selection.indices.shape[2]
        return Arrangement(selection.indices, selection.tiers, (held,), bool((selection.counts == held).all()))
    contested = (Tier.IMPORTANT, Tier.REPRESENTATIVE)
    of_blocks = [contested] if len(formats.contested) == 1 else [(tier,) for tier in contested]
    parts = [_block(selection, tiers) for tiers in (*of_blocks, (Tier.SINK, Tier.RECENT))]
    indices, tiers = (torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True))
    lengths = tuple(part.shape[2] for part, _ in parts)
    full = bool((selection.counts == sum(lengths)).all())
    return Arrangement(indices, tiers, (*lengths, 0) if formats.recent_block else lengths, full)


def _block(selection: Selection, tiers: Sequence[Tier]) -> tuple[Tensor, Tensor]:
    """Indices and tiers of the tokens in some tiers, aligned at the right."""
    members = torch.stack([selection.tiers == tier for tier in tiers]).any(0)
    slots, empty = members_at(members, torch.stack([selection.by_tier[tier] for tier in tiers]).sum(0))
    found = selection.tiers.gather(-1, slots)
    return selection.indices.gather(-1, slots), found if empty is None else found.masked_fill(empty, Tier.PADDING)
