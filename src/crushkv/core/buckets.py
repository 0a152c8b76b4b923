"""What each representative stands for: the selection forgets its buckets, and this computes them again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import CrushConfig
from .selection import contest
from .zones import count_real, divide


def stands_for(head_score: Tensor, kv_heads: int, budget: Tensor, config: CrushConfig, seed: int = 0) -> Tensor:
    """The representative of every evicted token, for rows without padding.

    The arguments are those of `select`, and the representatives are the ones that it chooses. They stand for
    themselves, too. Nothing stands for a token that is kept for another reason, or that was not contested (what is
    left of a page).

    Args:
        head_score: `[B, H, S]`.
        budget: integers `[B]` in main memory.

    Returns:
        int32 `[B, Hkv, S]`: position of the representative token (with pages: of the page's first token), or -1.
    """
    rows, _, tokens = head_score.shape
    zones = divide(count_real(rows, tokens, None), budget, config)
    positions = head_score.new_full((rows, kv_heads, tokens), -1, dtype=torch.int32)
    units, page = int(zones.units.max()), config.page_size
    if not units or not int(zones.keep.max()):
        return positions
    end = config.sink + units * page
    _, groups = contest(head_score[..., config.sink : end], kv_heads, zones, config, seed)
    if groups is None:
        return positions
    leaders = groups.leaders()
    first = torch.where(leaders < 0, -1, config.sink + leaders * page)
    positions[..., config.sink : end] = first.repeat_interleave(page, dim=-1)
    return positions
