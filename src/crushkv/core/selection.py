"""The selection of KVCrush: which tokens each KV head keeps, and in which tier (DESIGN: sink, important, ...).

Everything is batched over rows, heads and tokens. Rows may have different numbers of real tokens and budgets;
padding may stand anywhere in a row and is always dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from ..config import CrushConfig
from ..constants import constant
from ..errors import ScoreError
from ..later import Later
from .grouping import Groups, choose_representatives, position_order, random_order, signature_order
from .signatures import token_bits, top_mask, unit_signatures
from .stages import stage
from .zones import Count, Zones, count_real, divide


class Tier(IntEnum):
    """Why a token is in the cache."""

    PADDING = 0  # no token: fills up rows that keep fewer than the longest
    SINK = 1
    IMPORTANT = 2
    REPRESENTATIVE = 3
    RECENT = 4


@dataclass(frozen=True)
class Kept:
    """Some tokens of each head in ascending order. Rows that have fewer than the longest are filled up at the front.

    indices: int64 `[B, Hkv, K]`, into the tokens that were scored; 0 where `tiers` is PADDING.
    tiers: uint8 `[B, Hkv, K]`, values of `Tier`.
    counts: int64 `[B]` in main memory, tokens of each row, the same for all its heads. K is the greatest.
    """

    indices: Tensor
    tiers: Tensor
    counts: Tensor

    @property
    def full(self) -> bool:
        """Whether no row has fewer tokens than another."""
        return bool((self.counts == self.indices.shape[2]).all())

    @staticmethod
    def joined(parts: Sequence[Kept], follow: bool = False) -> Kept:
        """The tokens of all parts, which share none. follow: they follow each other in the text."""
        parts = [part for part in parts if part.indices.shape[2]] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        indices, tiers = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("indices", "tiers"))
        counts = torch.stack([part.counts for part in parts]).sum(0)
        full = all(part.full for part in parts)
        if follow and full:
            return Kept(indices, tiers, counts)
        if not full:
            indices = indices.masked_fill(tiers == Tier.PADDING, -1)  # to the front
        indices, order = indices.sort(dim=-1)
        most = int(counts.max())
        indices, order = indices[..., indices.shape[2] - most :], order[..., order.shape[2] - most :]
        return Kept(indices.clamp(min=0), tiers.gather(-1, order), counts)

    def in_tier(self, tier: Tier, counts: Tensor) -> Kept:
        """Those in a tier, of which rows have so many."""
        slots, empty = _places(self.tiers == tier, counts)
        indices, tiers = self.indices.gather(-1, slots), torch.full_like(slots, tier, dtype=torch.uint8)
        if empty is not None:
            indices, tiers = indices.masked_fill(empty, 0), tiers.masked_fill(empty, Tier.PADDING)
        return Kept(indices, tiers, counts)


class Selection:
    """What is kept.

    Args:
        found: the tokens in all tiers, or those in each; the other one is made when it is asked for.
        by_tier: tokens of each row in each tier, int64 `[B]` in main memory.
        finite: whether all scores are. What is kept means nothing otherwise, and `check` says so.
    """

    def __init__(self, found: Kept | Mapping[Tier, Kept], by_tier: Mapping[Tier, Tensor], finite: Later) -> None:
        self._found, self._by_tier, self.finite = found, by_tier, finite

    @cached_property
    def parts(self) -> Mapping[Tier, Kept]:
        """The tokens in each tier."""
        if not isinstance(self._found, Kept):
            return self._found
        return {tier: self._found.in_tier(tier, counts) for tier, counts in self._by_tier.items()}

    @cached_property
    def kept(self) -> Kept:
        """The tokens in all tiers."""
        if isinstance(self._found, Kept):
            return self._found
        of_tier = self._found
        contested = Kept.joined([of_tier[Tier.IMPORTANT], of_tier[Tier.REPRESENTATIVE]])
        return Kept.joined([of_tier[Tier.SINK], contested, of_tier[Tier.RECENT]], follow=True)

    @property
    def counts(self) -> Tensor:
        """Tokens kept of each row, int64 `[B]` in main memory."""
        return torch.stack(list(self._by_tier.values())).sum(0)

    def check(self) -> None:
        """`check_finite`, of the scores behind it."""
        check_finite(self.finite)


def check_finite(finite: Later) -> None:
    """Waits for the scores.

    Raises:
        ScoreError: a score is NaN or infinite.
    """
    if not bool(finite.read()):
        raise ScoreError("scores hold NaN or infinite values: the importance policy cannot rank these tokens")


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
        budget: integers `[B]` in main memory, at least sink + window or all real tokens of the row.
        real: bool `[B, S]`, False for padding; None means that every token is real.
        seed: for the anchor `random` and for random grouping.

    Raises:
        ScoreError: the shapes do not fit, or a score is not finite. Where a device may still be computing the scores,
            that is for the caller to ask: `Selection.check`.
    """
    if head_score.ndim != 3 or head_score.shape[1] % kv_heads:
        raise ScoreError(
            f"scores of shape {tuple(head_score.shape)}: expected [batch, heads, tokens] with a multiple of "
            f"{kv_heads} KV heads"
        )
    finite = Later(head_score.isfinite().all())
    if not finite.under_way:
        check_finite(finite)
    rows, _, tokens = head_score.shape
    zones = divide(count_real(rows, tokens, real), budget, config)
    represented = representative_units(zones.keep, config.representative_share)
    by_tier = {
        Tier.SINK: zones.sink,
        Tier.IMPORTANT: (zones.keep - represented) * zones.page_size,
        Tier.REPRESENTATIVE: represented * zones.page_size,
        Tier.RECENT: zones.recent,
    }
    by_rank = config.grouping == "score" or not bool(represented.any())
    # Of many units, a CPU finds the best by a threshold in half of the time.
    few = config.page_size > 1 or head_score.device.type != "cpu"
    # Rows that hold as many tokens, and keep as many, are divided alike.
    if real is None and by_rank and few and bool((zones.kept == zones.kept[0]).all()):
        return Selection(_ranked(head_score, kv_heads, zones, int(represented[0]), config), by_tier, finite)

    compact = None
    if real is not None:
        # Real tokens first, in order: from here on a row's tokens are 0 ... count - 1.
        compact = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
        head_score = head_score.gather(-1, compact[:, None].expand_as(head_score))
    tiers = _tiers(head_score, kv_heads, zones, config, seed)
    with stage("indices"):
        indices, empty = _places(tiers != Tier.PADDING, zones.kept)
        tiers = tiers.gather(-1, indices)
        if compact is not None:
            indices = compact[:, None].expand(-1, kv_heads, -1).gather(-1, indices)
        if empty is not None:
            indices, tiers = indices.masked_fill(empty, 0), tiers.masked_fill(empty, Tier.PADDING)
        return Selection(Kept(indices, tiers, zones.kept), by_tier, finite)


def _ranked(
    head_score: Tensor, kv_heads: int, zones: Zones[Tensor], represented: int, config: CrushConfig
) -> dict[Tier, Kept]:
    """The tokens of each tier where all rows are alike and both contested tiers take the best scores.

    A few operations instead of some dozens: on a GPU, each of them costs the host as much as a long one.
    """
    rows, _, tokens = head_score.shape
    device, page = head_score.device, config.page_size
    sink, recent, units, keep = (int(zone[0]) for zone in (zones.sink, zones.recent, zones.units, zones.keep))
    best = torch.empty((rows, kv_heads, 0), dtype=torch.int64, device=device)
    if keep:
        score = _unit_scores(head_score[..., sink : sink + units * page], kv_heads, config)
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    of_page = torch.arange(sink, sink + page, device=device)
    text = torch.arange(tokens, device=device).expand(rows, kv_heads, -1)

    def contested(units: Tensor) -> Tensor:
        return (units.sort(dim=-1).values[..., None] * page + of_page).flatten(2)

    found = {
        Tier.SINK: text[..., :sink],
        Tier.IMPORTANT: contested(best[..., : keep - represented]),
        Tier.REPRESENTATIVE: contested(best[..., keep - represented :]),
        Tier.RECENT: text[..., tokens - recent :],
    }
    return {
        tier: Kept(x, constant(int(tier), device, torch.uint8).expand_as(x), torch.full((rows,), x.shape[2]))
        for tier, x in found.items()
    }


def _places(members: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where members stand, in ascending order, rows aligned at the right.

    Args:
        members: bool `[B, Hkv, S]`.
        counts: `[B]` in main memory: members of each row, the same for all its heads. K is the greatest.

    Returns:
        int64 `[B, Hkv, K]`, 0 in the slots that a row leaves empty; and which these are, bool `[B, 1, K]`, or None.
    """
    most, device = int(counts.max()), members.device
    alike = bool((counts == most).all())
    if alike and device.type == "cpu":  # a GPU would be waited for
        found = members.nonzero()[:, 2]
        if len(found) == members[..., 0].numel() * most:
            return found.view(*members.shape[:2], most), None
    place, empty = members.cumsum(-1) - 1, None
    if not alike:
        missing = (most - counts).to(device, non_blocking=True)[:, None, None]
        place += missing
        empty = torch.arange(most, device=device) < missing
    # What is no member is written into one slot more, which is cut off. So is what scores that are not finite have let
    # in too much: the device has to live until they are looked at.
    place.masked_fill_(~members, most).clamp_(max=most)
    position = torch.arange(members.shape[-1], device=device).expand_as(place)
    places = place.new_zeros((*place.shape[:-1], most + 1)).scatter_(-1, place, position)
    return places[..., :most].contiguous(), empty


def _tiers(head_score: Tensor, kv_heads: int, zones: Zones[Tensor], config: CrushConfig, seed: int) -> Tensor:
    """Tier of every token, uint8 `[B, Hkv, S]`, with PADDING for what is dropped."""
    rows, _, tokens = head_score.shape
    page = config.page_size
    device = head_score.device
    position = torch.arange(tokens, device=device)
    tiers = torch.zeros((rows, kv_heads, tokens), dtype=torch.uint8, device=device)

    units = int(zones.units.max())
    if units and int(zones.keep.max()):
        # The sink is full in every row that has units, so the middle starts at the same place in all of them.
        middle = head_score[..., config.sink : config.sink + units * page]
        unit_tiers, _ = contest(middle, kv_heads, zones, config, seed)
        tiers[..., config.sink : config.sink + units * page] = unit_tiers.repeat_interleave(page, dim=-1)

    ends = torch.stack([zones.sink, zones.real - zones.recent, zones.real])[..., None, None]
    sink, recent, end = ends.to(device, non_blocking=True)
    tiers.masked_fill_(position < sink, Tier.SINK)
    return tiers.masked_fill_((position >= recent) & (position < end), Tier.RECENT)


def contest(
    middle: Tensor, kv_heads: int, zones: Zones[Tensor], config: CrushConfig, seed: int
) -> tuple[Tensor, Groups | None]:
    """Important and representative units among the contested ones, uint8 `[B, Hkv, U]`, and how they were grouped.

    `middle [B, H, U * page]` holds the contested tokens' scores. Without representatives, or with those of the
    next best scores, there are no groups.
    """
    rows, _, tokens = middle.shape
    units = tokens // config.page_size
    device = middle.device
    real = torch.arange(units, device=device) < zones.units.to(device, non_blocking=True)[:, None]  # [B, U]

    score = _unit_scores(middle, kv_heads, config).masked_fill(~real[:, None], -torch.inf)

    keep = zones.keep[:, None].expand(rows, kv_heads)
    count = representative_units(keep, config.representative_share)
    important = top_mask(score, keep - count)
    if not int(count.max()):
        return important.to(torch.uint8) * Tier.IMPORTANT, None

    if config.grouping == "score":
        tier = top_mask(score, keep).to(torch.uint8) * Tier.REPRESENTATIVE
        return tier.masked_fill_(important, Tier.IMPORTANT), None
    candidates = real[:, None] & ~important
    alike = bool((zones.units == units).all())
    order = _order(middle, real, alike, zones.keep - count[:, 0], config, seed)
    count = count.to(device, non_blocking=True)
    with stage("grouping"):
        representative = choose_representatives(order, candidates, count)
    tier = important.to(torch.uint8) * Tier.IMPORTANT
    tier.masked_fill_(representative, Tier.REPRESENTATIVE)
    return tier, Groups(order, candidates, count, representative)


def _unit_scores(middle: Tensor, kv_heads: int, config: CrushConfig) -> Tensor:
    """Scores of the units for each KV head, float32 `[B, Hkv, U]`, of `middle [B, H, U * page]`."""
    grouped = middle.unflatten(-1, (-1, config.page_size)).unflatten(1, (kv_heads, -1))
    by_head = grouped.mean(2) if config.aggregate == "mean" else grouped.amax(2)
    return by_head.mean(-1).float()


def representative_units(keep: Count, share: float) -> Count:
    """How many of `keep` units are representatives, rounded half up."""
    return int(keep * share + 0.5) if isinstance(keep, int) else (keep.double() * share + 0.5).long()


def _order(middle: Tensor, real: Tensor, alike: bool, important: Tensor, config: CrushConfig, seed: int) -> Tensor:
    """The order in which the units are cut into buckets, `[B, U]`.

    `middle [B, H, U * page]` holds scores, `real [B, U]` says which units a row has (`alike`: all rows have all),
    `important [B]` how many of them are kept as important: a head's bit is 1 for as many tokens.
    """
    rows, units = real.shape
    if config.grouping == "random":
        return random_order(units, rows, seed, middle.device)
    if config.grouping == "position":
        return position_order(units, rows, middle.device)
    with stage("signatures"):
        retained = (important * config.page_size)[:, None].expand(rows, middle.shape[1])
        if not alike:
            tokens_real = real.repeat_interleave(config.page_size, dim=-1)
            middle = middle.masked_fill(~tokens_real[:, None], -torch.inf)
        bits = token_bits(middle, retained)
        signatures = unit_signatures(bits, config.page_size)
    return signature_order(signatures, real, config.anchor, seed)
