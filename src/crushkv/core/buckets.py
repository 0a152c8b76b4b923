"""What each representative stands for: the selection forgets its buckets, and this computes them again."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import SelectionOptions, Tier, contest
from .zones import divide


def stands_for(head_score: Tensor, kv_heads: int, budget: Tensor, options: SelectionOptions, seed: int = 0) -> Tensor:
    """The representative of every evicted token, for rows without padding.

    The arguments are those of `select`, and the representatives are the ones that it chooses. They stand for
    themselves, too. Nothing stands for a token that is kept for another reason, that was not contested (what is left
    of a page), or, with shared representatives, that was important to another head.

    Args:
        head_score: `[B, H, S]`.
        budget: integers `[B]`.

    Returns:
        int32 `[B, Hkv, S]`: position of the representative token (with pages: of the page's first token), or -1.
    """
    rows, _, tokens = head_score.shape
    count = torch.full((rows,), tokens, device=head_score.device)
    zones = divide(count, budget.to(count.device).minimum(count), options.sink, options.window, options.page_size)
    positions = head_score.new_full((rows, kv_heads, tokens), -1, dtype=torch.int32)
    units, page = int(zones.units.max()), options.page_size
    if not units or not int(zones.keep.max()):
        return positions
    end = options.sink + units * page
    tiers, groups = contest(head_score[..., options.sink : end], kv_heads, zones, options, seed)
    if groups is None:
        return positions
    # With shared representatives, a head may keep candidates as important in the end.
    leaders = groups.leaders().masked_fill(tiers == Tier.IMPORTANT, -1)
    first = torch.where(leaders < 0, -1, options.sink + leaders * page)
    positions[..., options.sink : end] = first.repeat_interleave(page, dim=-1)
    return positions
