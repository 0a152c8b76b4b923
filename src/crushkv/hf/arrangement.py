"""The order in which kept tokens are held: a block for each format, then what is held as the model made it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import Kept, Selection, Tier
from ..storage import Formats


@dataclass(frozen=True)
class Arrangement:
    """Kept tokens, slot by slot. Within a block they stand in the order of the text; rows that have fewer are filled up
    at the front of each block.

    Attributes:
        indices: int64 `[B, Hkv, P]` into what was selected from; anything where `tiers` is PADDING.
        tiers: uint8 `[B, Hkv, P]`.
        lengths: slots of each block, and last those of what is held as the model made it.
        full: no slot is empty.
    """

    indices: Tensor
    tiers: Tensor
    lengths: tuple[int, ...]
    full: bool


def arrange(selection: Selection, formats: Formats) -> Arrangement:
    """The slots for a selection whose tiers are held in `formats`."""
    if formats.raw:
        blocks = [selection.kept]
    else:
        of_tier = selection.parts
        contested = [of_tier[Tier.IMPORTANT], of_tier[Tier.REPRESENTATIVE]]
        blocks = [Kept.joined(contested)] if len(formats.contested) == 1 else contested
        blocks.append(Kept.joined([of_tier[Tier.SINK], of_tier[Tier.RECENT]], follow=True))
    indices, tiers = (torch.cat([getattr(block, name) for block in blocks], dim=2) for name in ("indices", "tiers"))
    lengths = tuple(block.indices.shape[2] for block in blocks)
    if formats.recent_block:
        lengths = (*lengths, 0)
    return Arrangement(indices, tiers, lengths, all(block.full for block in blocks))
