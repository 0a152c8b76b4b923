"""Grouping of candidates by their distance to the anchor, and the representative of each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Anchor
from .anchors import anchor_bits
from .signatures import hamming, pack
from .stages import stage


def signature_order(signatures: Tensor, real: Tensor, anchor: Anchor, seed: int) -> Tensor:
    """Units in the order of (distance to the anchor, position).

    Args:
        signatures: bool `[B, U, L]`.
        real: bool `[B, U]`; units that a row does not have come last.

    Returns:
        int64 `[B, U]`, a permutation of the units of each row.
    """
    with stage("signatures"):
        words = pack(signatures)
    with stage("distances"):
        distance = hamming(words, pack(anchor_bits(anchor, signatures, real, seed)))
        distance = distance.masked_fill(~real, signatures.shape[-1] + 1)
    with stage("grouping"):
        return distance.argsort(dim=-1, stable=True)


def random_order(units: int, rows: int, seed: int, device: torch.device) -> Tensor:
    """A seeded permutation, the same for every row: the control for `signature_order`."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return order.to(device).expand(rows, units)


def position_order(units: int, rows: int, device: torch.device) -> Tensor:
    """The order of the text: buckets are stretches of it. The other control."""
    return torch.arange(units, device=device).expand(rows, units)


def choose_representatives(order: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """Cuts each head's candidates, taken in `order`, into buckets of equal count and takes the middle of each.

    Args:
        order: `[B, U]`, a permutation of the units.
        candidates: bool `[B, Hkv, U]`, the units that a head may choose from.
        count: `[B, Hkv]`, buckets; no more than there are candidates.

    Returns:
        bool `[B, Hkv, U]` with `count` True entries a head.
    """
    by_order, candidate, rank, total = candidate_ranks(order, candidates)
    buckets = count[..., None]
    bucket = rank * buckets // total
    # Bucket j holds the ranks from ceil(j * total / buckets) up to the next bucket's first.
    divisor = buckets.clamp(min=1)
    first = (bucket * total + divisor - 1) // divisor
    last = ((bucket + 1) * total + divisor - 1) // divisor - 1
    chosen = (rank == (first + last) // 2) & candidate & (buckets > 0)
    return torch.zeros_like(candidates).scatter(-1, by_order, chosen)


@dataclass(frozen=True)
class Groups:
    """What `choose_representatives` was given, and what it chose: enough to tell who represents whom."""

    order: Tensor
    candidates: Tensor
    count: Tensor
    representative: Tensor

    def leaders(self) -> Tensor:
        """The representative in the bucket of each candidate, int64 `[B, Hkv, U]`; -1 where there is none."""
        by_order, candidate, rank, total = candidate_ranks(self.order, self.candidates)
        bucket = rank.clamp(min=0) * self.count[..., None] // total
        # Units that represent none write into one slot more, which is cut off.
        slots = bucket.shape[-1]
        place = torch.where(self.representative.gather(-1, by_order), bucket, slots)
        leaders = bucket.new_full((*bucket.shape[:-1], slots + 1), -1).scatter(-1, place, by_order)[..., :slots]
        leader = leaders.gather(-1, bucket).masked_fill(~candidate, -1)
        return torch.empty_like(bucket).scatter(-1, by_order, leader)


def candidate_ranks(order: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The units in `order` for each head, which of them are candidates, their rank among these, and how many are."""
    by_order = order[:, None].expand_as(candidates)
    candidate = candidates.gather(-1, by_order)
    return by_order, candidate, candidate.cumsum(-1) - 1, candidate.sum(-1, keepdim=True).clamp(min=1)
