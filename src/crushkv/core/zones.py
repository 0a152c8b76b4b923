"""Which of a row's tokens are always kept, and which are contested: sink, middle, recent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..config import CrushConfig

Count = TypeVar("Count", int, Tensor)
"""Numbers of tokens: of one row, or `[B]` of several, in main memory."""


@dataclass(frozen=True)
class Zones(Generic[Count]):
    """The layout of each row's real tokens, counted from its first one.

    A row reads: `sink` tokens | `units` whole pages | rest | `recent` tokens. The rest is what the recent zone
    could not take of a last page that is not whole; it is empty wherever the budget has room for a page.
    """

    real: Count  # real tokens
    sink: Count
    recent: Count  # at least the window: it takes in what would be a broken last page
    units: Count  # contested units (pages; tokens with a page size of 1)
    keep: Count  # how many of the units are kept
    page_size: int  # tokens of a unit

    @property
    def kept(self) -> Count:
        """Tokens kept of each row."""
        return self.sink + self.keep * self.page_size + self.recent


def count_real(rows: int, tokens: int, real: Tensor | None) -> Tensor:
    """Real tokens of each row, int64 `[B]` in main memory, where sizes are decided; a GPU is waited for with padding.

    real: bool `[B, S]`, False for padding; None: every token is real.
    """
    return torch.full((rows,), tokens) if real is None else real.sum(-1).cpu()


def divide(real: Count, budget: Count, config: CrushConfig) -> Zones[Count]:
    """Divides rows of `real` tokens so that at most `budget` and more than `budget - page_size` are kept.

    All of a row is kept that has fewer tokens than its budget.

    Pages start behind the sink. What is left over at the end of the middle joins the recent zone, at the cost
    of the contested budget, so that every page is whole and every head keeps the same number of tokens.
    `budget` must be at least `min(real, sink + window)`.
    """
    page_size = config.page_size
    sink = _at_most(real, config.sink)
    window = _at_most(real - sink, config.window)
    middle = real - sink - window
    contested = _at_least(_at_most(budget, real) - sink - window, 0)
    rest = _at_most(middle % page_size, contested)
    units = middle // page_size
    keep = _at_most((contested - rest) // page_size, units)
    return Zones(real=real, sink=sink, recent=window + rest, units=units, keep=keep, page_size=page_size)


def _at_most(count: Count, limit: Count | int) -> Count:
    return min(count, limit) if isinstance(count, int) else count.clamp(max=limit)


def _at_least(count: Count, limit: int) -> Count:
    return max(count, limit) if isinstance(count, int) else count.clamp(min=limit)
