"""Attention masks: Transformers makes them over logical positions, attention needs them over physical slots."""

from __future__ import annotations

import torch
from torch import Tensor


def last_query_row(mask: Tensor | None, count: int, seen: int) -> Tensor | None:
    """Which of the last `count` tokens are real: `[B, count]` bool, or None where all are.

    The last query sees every token of its row but padding, so its row of the mask is the padding mask.
    """
    if mask is None:
        return None
    row = mask if mask.ndim == 2 else mask[:, 0, -1]
    row = row[..., seen - count : seen]
    return row >= 0 if row.is_floating_point() else row.bool()


def physical_mask(
    mask: Tensor | None,
    filled: Tensor | None,
    compressed: int,
    recent: int,
    seen: int,
    queries: int,
    aligned: bool,
    rows: int,
    device: torch.device,
) -> Tensor | None:
    """A mask over physical slots: the compressed part, then the tokens that came since.

    Every token of the compressed part lies in the past of every query, and none is padding, so only slots that
    fill up shorter rows are hidden there. Behind it the given mask holds as it stands.

    Args:
        mask: over logical positions: None, `[B, seen]` (flash attention), or `[B, 1, q, seen]`, bool or additive.
        filled: bool `[B, compressed]`, or None where every slot holds a token.
        compressed, recent: slots of the two parts.
        seen: logical length.
        queries: q, the queries of this pass.
        aligned: the attention implementation aligns a causal mask at the last key by itself.
        rows, device: B, and where the mask is needed.

    Returns:
        None, `[B, compressed + recent]` or `[B, 1, q, compressed + recent]`, of the kind of `mask`.
    """
    if mask is None:
        if filled is None and (queries == 1 or aligned):
            return None
        if aligned:
            mask = torch.ones((rows, seen), dtype=torch.bool, device=device)
        else:
            position = torch.arange(seen, device=device)
            mask = (position <= position[-queries:, None]).expand(rows, 1, queries, seen)
    behind = mask[..., seen - recent : seen]
    if mask.is_floating_point():
        hidden = torch.finfo(mask.dtype).min
        front = mask.new_zeros((*mask.shape[:-1], compressed))
        if filled is not None:
            front.masked_fill_(~_over(filled, mask), hidden)
    else:
        front = mask.new_ones((*mask.shape[:-1], compressed))
        if filled is not None:
            front &= _over(filled, mask).to(mask.dtype)
    return torch.cat([front, behind], dim=-1)


def _over(filled: Tensor, mask: Tensor) -> Tensor:
    """`[B, compressed]` with the axes of `mask`."""
    return filled if mask.ndim == 2 else filled[:, None, None]
