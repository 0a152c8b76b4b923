"""Attention masks: Transformers makes them over logical positions, attention needs them over physical slots."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

# What an additive mask adds to hide a token, or less: nothing that is meant to weaken attention is as strong.
HIDDEN = -1e4
_BLOCK = 2**24  # entries of a mask that are checked at a time


class MaskReader:
    """Reads the mask of a pass, which all layers of a cache are given, once.

    KVCrush knows which tokens of a row are hidden. A mask that says more than that is refused: what it says would be
    lost in the scores, and with the tokens that are evicted. Queries that see later tokens (`ahead`) see them in their
    own pass alone, which a policy may or may not follow.
    """

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._of: tuple[int, int] = (0, 0)
        self._shown: Tensor | None = None
        self.ahead = False  # the mask read last lets a query see a token behind it

    def shown(self, mask: Tensor | None, count: int, seen: int) -> Tensor | None:
        """Which of the tokens seen the last query may see: bool `[B, seen]` (or `[1, seen]`); None: all.

        Args:
            mask: over logical positions: None, `[B, seen]`, or `[B, 1, q, seen]`, bool or additive.
            count: q, the queries of this pass.
            seen: logical length, with the tokens of this pass.

        Raises:
            UnsupportedModelError: the mask is of a kind that cannot be followed.
        """
        if mask is None:
            self._mask, self.ahead = None, False
            return None
        if self._mask is None or self._mask() is not mask or self._of != (count, seen):
            self._shown, self.ahead = _shown(mask, count, seen)
            self._mask, self._of = weakref.ref(mask), (count, seen)
        return self._shown

    def __deepcopy__(self, memo: object) -> MaskReader:
        return MaskReader()  # it remembers nothing that could not be read again


def _shown(mask: Tensor, count: int, seen: int) -> tuple[Tensor, bool]:
    """What the last query may see, and whether some query sees a token behind it."""
    if mask.ndim not in (2, 4) or mask.shape[-1] < seen:
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(mask.shape)}, where {seen} tokens have been seen: KVCrush follows "
            "masks [batch, tokens seen] and [batch, 1, queries, tokens seen]"
        )
    mask = mask[..., :seen]
    if mask.ndim == 2:
        return mask.bool(), False
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        raise UnsupportedModelError(
            "the attention mask differs between heads, which KVCrush cannot follow when it evicts: pass one mask for "
            "all heads, or use the full cache"
        )
    if mask.is_floating_point() and bool(((mask != 0) & (mask > HIDDEN)).any()):
        raise UnsupportedModelError(
            "the attention mask weakens tokens without hiding them (it adds numbers other than 0 and large negative "
            "ones), which KVCrush's scores cannot follow: use the full cache"
        )
    row = visible(mask[:, 0, -1])
    position = torch.arange(seen, device=mask.device)
    step = max(1, _BLOCK // (mask.shape[0] * seen))
    ahead = False
    for start in range(0, count if count > 1 else 0, step):
        part = visible(mask[:, 0, -count:][:, start : start + step])
        at = position[seen - count :][start : start + step]
        # Padding sees what it likes.
        of_text = row[:, None] & row[:, at][..., None]
        past = position <= at[:, None]
        ahead = ahead or bool((of_text & ~past & part).any())
        if bool((of_text & past & ~part).any()):
            raise UnsupportedModelError(
                "the attention mask hides tokens from some queries that the last query sees, which KVCrush's scores "
                "cannot follow: use the full cache"
            )
    return row, ahead


def visible(mask: Tensor) -> Tensor:
    """A mask, bool or additive, as bool."""
    return mask > HIDDEN if mask.is_floating_point() else mask.bool()


@dataclass(frozen=True)
class Slots:
    """What a mask over physical slots is about: `compressed` slots, then `recent` tokens that came since, of `seen`."""

    rows: int
    compressed: int
    recent: int
    seen: int
    queries: int
    device: torch.device


def physical_mask(mask: Tensor | None, shown: Tensor | None, slots: Slots, aligned: bool) -> Tensor | None:
    """A mask over physical slots: the compressed part, then the tokens that came since.

    Every token of the compressed part lies in the past of every query, so that one flag a slot says all there is to say
    of it. Behind it the given mask holds as it stands.

    Args:
        mask: over logical positions: None, `[B, seen]` (flash attention), or `[B, 1, q, seen]`, bool or additive.
        shown: bool `[B, compressed]`, or `[B, Hq, compressed]` where it differs from head to head; None: every slot
            holds a token that may be seen.
        aligned: the attention implementation aligns a causal mask at the last key by itself.

    Returns:
        None, `[B, P]`, `[B, 1, q, P]` or `[B, Hq, q, P]`, of the kind of `mask`.
    """
    if mask is None:
        if shown is None and (slots.queries == 1 or aligned):
            return None
        if aligned:
            mask = torch.ones((slots.rows, slots.seen), dtype=torch.bool, device=slots.device)
        else:
            position = torch.arange(slots.seen, device=slots.device)
            causal = position <= position[-slots.queries :, None]
            mask = causal.expand(slots.rows, 1, slots.queries, slots.seen)
    behind = mask[..., slots.seen - slots.recent : slots.seen]
    if shown is None:
        size = (*behind.shape[:-1], slots.compressed)
        front = behind.new_zeros(size) if mask.is_floating_point() else behind.new_ones(size)
        return torch.cat([front, behind], dim=-1)
    if mask.ndim == 4:
        shown = shown[:, None] if shown.ndim == 2 else shown
        shown = shown[:, :, None].expand(-1, -1, behind.shape[2], -1)
        behind = behind.expand(*shown.shape[:2], -1, -1)
    if mask.is_floating_point():
        front = torch.zeros(shown.shape, dtype=mask.dtype, device=mask.device)
        front.masked_fill_(~shown, torch.finfo(mask.dtype).min)
    else:
        front = shown.to(mask.dtype)
    return torch.cat([front, behind], dim=-1)
