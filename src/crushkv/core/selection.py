"""The selection of KVCrush: which tokens each KV head keeps, and in which tier (DESIGN: sink, important, ...).

Everything is batched over rows, heads and tokens. Rows may have different numbers of real tokens and budgets;
padding may stand anywhere in a row and is always dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ..config import CrushConfig
from ..errors import ScoreError
from .grouping import Groups, choose_representatives, position_order, random_order, signature_order
from .signatures import token_bits, top_mask, unit_signatures
from .stages import stage
from .zones import Zones, divide


class Tier(IntEnum):
    """Why a token is in the cache."""

    PADDING = 0  # no token: fills up rows that keep fewer than the longest
    SINK = 1
    IMPORTANT = 2
    REPRESENTATIVE = 3
    RECENT = 4


@dataclass(frozen=True)
class Selection:
    """What is kept. K is the largest number kept by a row; shorter rows are filled up at the front.

    indices: int64 `[B, Hkv, K]`, ascending, into the tokens that were scored; 0 where `tiers` is PADDING.
    tiers: uint8 `[B, Hkv, K]`, values of `Tier`.
    counts: int64 `[B]`, tokens kept, the same for every head of a row.
    """

    indices: Tensor
    tiers: Tensor
    counts: Tensor


def select(
    head_score: Tensor,
    kv_heads: int,
    budget: Tensor,
    config: CrushConfig,
    real: Tensor | None = None,
    seed: int = 0,
) -> Selection:
    """Chooses exactly `budget` tokens a row and KV head (with pages of p: at most, and more than `budget - p`).

    Args:
        head_score: `[B, H, S]`, H a multiple of `kv_heads`: one score a query head, or one a KV head.
            Finite, higher is more important.
        kv_heads: Hkv.
        budget: integers `[B]`, at least sink + window or all real tokens of the row.
        real: bool `[B, S]`, False for padding; None means that every token is real.
        seed: for the anchor `random` and for random grouping.

    Raises:
        ScoreError: a score is NaN, or the shapes do not fit.
    """
    _check(head_score, kv_heads)
    rows, _, tokens = head_score.shape
    device = head_score.device
    count = torch.full((rows,), tokens, device=device) if real is None else real.sum(-1)
    zones = divide(count, budget.to(device), config)

    compact = None
    if real is not None:
        # Real tokens first, in order: from here on a row's tokens are 0 ... count - 1.
        compact = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
        head_score = head_score.gather(-1, compact[:, None].expand_as(head_score))

    tiers = _tiers(head_score, kv_heads, zones, config, seed)
    with stage("indices"):
        return _as_indices(tiers, zones, compact)


def _check(head_score: Tensor, kv_heads: int) -> None:
    if head_score.ndim != 3 or head_score.shape[1] % kv_heads:
        raise ScoreError(
            f"scores of shape {tuple(head_score.shape)}: expected [batch, heads, tokens] with a multiple of "
            f"{kv_heads} KV heads"
        )
    if not torch.isfinite(head_score).all():
        raise ScoreError("scores hold NaN or infinite values: the importance policy cannot rank these tokens")


def _tiers(head_score: Tensor, kv_heads: int, zones: Zones, config: CrushConfig, seed: int) -> Tensor:
    """Tier of every token, uint8 `[B, Hkv, S]`, with PADDING for what is dropped."""
    rows, _, tokens = head_score.shape
    page = config.page_size
    position = torch.arange(tokens, device=head_score.device)
    tiers = torch.zeros((rows, kv_heads, tokens), dtype=torch.uint8, device=head_score.device)

    units = int(zones.units.max())
    if units and int(zones.keep.max()):
        # The sink is full in every row that has units, so the middle starts at the same place in all of them.
        middle = head_score[..., config.sink : config.sink + units * page]
        unit_tiers, _ = contest(middle, kv_heads, zones, config, seed)
        tiers[..., config.sink : config.sink + units * page] = unit_tiers.repeat_interleave(page, dim=-1)

    tiers.masked_fill_((position < zones.sink[:, None])[:, None], Tier.SINK)
    recent = (position >= (zones.real - zones.recent)[:, None]) & (position < zones.real[:, None])
    return tiers.masked_fill_(recent[:, None], Tier.RECENT)


def contest(
    middle: Tensor, kv_heads: int, zones: Zones, config: CrushConfig, seed: int
) -> tuple[Tensor, Groups | None]:
    """Important and representative units among the contested ones, uint8 `[B, Hkv, U]`, and how they were grouped.

    `middle [B, H, U * page]` holds the contested tokens' scores. Without representatives, or with those of the
    next best scores, there are no groups.
    """
    rows, heads, tokens = middle.shape
    units = tokens // config.page_size
    group = heads // kv_heads
    real = torch.arange(units, device=middle.device) < zones.units[:, None]  # [B, U]

    grouped = middle.view(rows, kv_heads, group, units, config.page_size)
    by_head = grouped.mean(2) if config.aggregate == "mean" else grouped.amax(2)
    score = by_head.mean(-1).float().masked_fill(~real[:, None], -torch.inf)  # [B, Hkv, U]

    keep = zones.keep[:, None].expand(rows, kv_heads)
    count = representative_units(keep, config.representative_share)
    important = top_mask(score, keep - count)
    if not int(count.max()):
        return important.to(torch.uint8) * Tier.IMPORTANT, None

    if config.grouping == "score":
        tier = top_mask(score, keep).to(torch.uint8) * Tier.REPRESENTATIVE
        return tier.masked_fill_(important, Tier.IMPORTANT), None
    candidates = real[:, None] & ~important
    order = _order(middle, real, zones.keep - count[:, 0], config, seed)
    with stage("grouping"):
        representative = choose_representatives(order, candidates, count)
    tier = important.to(torch.uint8) * Tier.IMPORTANT
    tier.masked_fill_(representative, Tier.REPRESENTATIVE)
    return tier, Groups(order, candidates, count, representative)


def representative_units(keep: Tensor, share: float) -> Tensor:
    """How many of `keep` units are representatives, rounded half up."""
    return (keep * share + 0.5).long()


def _order(middle: Tensor, real: Tensor, important: Tensor, config: CrushConfig, seed: int) -> Tensor:
    """The order in which the units are cut into buckets, `[B, U]`.

    `middle [B, H, U * page]` holds scores, `real [B, U]` says which units a row has, `important [B]` how many of them
    are kept as important: a head's bit is 1 for as many tokens.
    """
    rows, units = real.shape
    if config.grouping == "random":
        return random_order(units, rows, seed, middle.device)
    if config.grouping == "position":
        return position_order(units, rows, middle.device)
    with stage("signatures"):
        retained = (important * config.page_size)[:, None].expand(rows, middle.shape[1])
        if not bool(real.all()):
            tokens_real = real.repeat_interleave(config.page_size, dim=-1)
            middle = middle.masked_fill(~tokens_real[:, None], -torch.inf)
        bits = token_bits(middle, retained)
        signatures = unit_signatures(bits, config.page_size)
    return signature_order(signatures, real, config.anchor, seed)


def _as_indices(tiers: Tensor, zones: Zones, compact: Tensor | None) -> Selection:
    """Kept tokens of every head in ascending order, rows aligned at the right."""
    rows, kv_heads, _ = tiers.shape
    counts = zones.kept
    most = int(counts.max())
    row, head, token = tiers.nonzero(as_tuple=True)
    if bool((counts == most).all()):
        indices = token.view(rows, kv_heads, most)
        kept_tiers = tiers[tiers != Tier.PADDING].view(rows, kv_heads, most)
    else:
        place = (tiers != Tier.PADDING).cumsum(-1)[row, head, token] - 1 + (most - counts)[row]
        indices = token.new_zeros((rows, kv_heads, most))
        indices[row, head, place] = token
        kept_tiers = tiers.new_zeros((rows, kv_heads, most))
        kept_tiers[row, head, place] = tiers[row, head, token]
    if compact is not None:
        original = compact[:, None].expand(rows, kv_heads, -1).gather(-1, indices)
        indices = original.masked_fill(kept_tiers == Tier.PADDING, 0)
    return Selection(indices, kept_tiers, counts)
