"""Grouping of candidates by their distance to the anchor, and the representative of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .anchors import anchor_bits
from .signatures import hamming, pack
from .stages import stage


def signature_order(signatures: Tensor, real: Tensor, anchors: Sequence[str], seed: int) -> Tensor:
    """Units in the order of (distance to the first anchor, to the second, ..., position).

    The paper compares with one anchor; further anchors split the ties that the earlier ones leave.

    Args:
        signatures: bool `[B, U, L]`.
        real: bool `[B, U]`; units that a row does not have come last.

    Returns:
        int64 `[B, U]`, a permutation of the units of each row.
    """
    with stage("signatures"):
        words = pack(signatures)
    with stage("distances"):
        levels = signatures.shape[-1] + 1
        if levels ** len(anchors) >= 2**63:
            raise ConfigError(f"anchors: {len(anchors)} are too many for signatures of {levels - 1} bits")
        key = torch.zeros_like(real, dtype=torch.long)
        for index, name in enumerate(anchors):
            anchor = pack(anchor_bits(name, signatures, real, seed + index))
            key = key * levels + hamming(words, anchor)
        key = key.masked_fill(~real, levels ** len(anchors))
    with stage("grouping"):
        return key.argsort(dim=-1, stable=True)


def random_order(units: int, rows: int, seed: int, device: torch.device) -> Tensor:
    """A seeded permutation, the same for every row: the control for `signature_order`."""
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return order.to(device).expand(rows, units)


def position_order(units: int, rows: int, device: torch.device) -> Tensor:
    """The order of the text: buckets are stretches of it. The other control."""
    return torch.arange(units, device=device).expand(rows, units)


def choose_representatives(order: Tensor, candidates: Tensor, count: Tensor, score: Tensor | None = None) -> Tensor:
    """Cuts each head's candidates, taken in `order`, into buckets of equal count and takes one from each.

    Args:
        order: `[B, U]`, a permutation of the units.
        candidates: bool `[B, Hkv, U]`, the units that a head may choose from.
        count: `[B, Hkv]`, buckets; no more than there are candidates.
        score: `[B, Hkv, U]` to take the highest-scored of each bucket (ties: the first in `order`);
            None takes its middle element.

    Returns:
        bool `[B, Hkv, U]` with `count` True entries a head.
    """
    by_order, candidate, rank, total = _ranks(order, candidates)
    buckets = count[..., None]
    bucket = rank * buckets // total

    if score is None:
        # Bucket j holds the ranks from ceil(j * total / buckets) up to the next bucket's first.
        divisor = buckets.clamp(min=1)
        first = (bucket * total + divisor - 1) // divisor
        last = ((bucket + 1) * total + divisor - 1) // divisor - 1
        chosen = rank == (first + last) // 2
    else:
        # Stable sorts by score and then by bucket leave the best of each bucket first in its run.
        ranked = score.gather(-1, by_order).masked_fill(~candidate, -torch.inf)
        best_first = ranked.argsort(dim=-1, descending=True, stable=True)
        run = torch.where(candidate, bucket, bucket.shape[-1]).gather(-1, best_first)
        run, to_best = run.sort(dim=-1, stable=True)
        starts = torch.ones_like(candidate)
        starts[..., 1:] = run[..., 1:] != run[..., :-1]
        chosen = torch.zeros_like(candidate).scatter(-1, best_first.gather(-1, to_best), starts)
    chosen &= candidate & (buckets > 0)
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
        by_order, candidate, rank, total = _ranks(self.order, self.candidates)
        bucket = rank.clamp(min=0) * self.count[..., None] // total
        # Units that represent none write into one slot more, which is cut off.
        slots = bucket.shape[-1]
        place = torch.where(self.representative.gather(-1, by_order), bucket, slots)
        leaders = bucket.new_full((*bucket.shape[:-1], slots + 1), -1).scatter(-1, place, by_order)[..., :slots]
        leader = leaders.gather(-1, bucket).masked_fill(~candidate, -1)
        return torch.empty_like(bucket).scatter(-1, by_order, leader)


def _ranks(order: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The units in `order` for each head, which of them are candidates, their rank among these, and how many are."""
    by_order = order[:, None].expand_as(candidates)
    candidate = candidates.gather(-1, by_order)
    return by_order, candidate, candidate.cumsum(-1) - 1, candidate.sum(-1, keepdim=True).clamp(min=1)
