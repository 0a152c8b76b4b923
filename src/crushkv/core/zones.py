"""Which of a row's tokens are always kept, and which are contested: sink, middle, recent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CrushConfig


@dataclass(frozen=True)
class Zones:
    """The layout of each row's real tokens, counted from its first one; every tensor is `[B]`, in main memory.

    A row reads: `sink` tokens | `units` whole pages | rest | `recent` tokens. The rest is what the recent zone
    could not take of a last page that is not whole; it is empty wherever the budget has room for a page.
    """

    real: Tensor  # real tokens
    sink: Tensor
    recent: Tensor  # at least the window: it takes in what would be a broken last page
    units: Tensor  # contested units (pages; tokens with a page size of 1)
    keep: Tensor  # how many of the units are kept
    page_size: int  # tokens of a unit

    @property
    def alike(self) -> bool:
        """Whether all rows are divided alike."""
        return all(bool((x == x[0]).all()) for x in (self.sink, self.recent, self.units, self.keep))

    @property
    def kept(self) -> Tensor:
        """Tokens kept of each row, `[B]`."""
        return self.sink + self.keep * self.page_size + self.recent


def count_real(rows: int, tokens: int, real: Tensor | None) -> Tensor:
    """Real tokens of each row, int64 `[B]` in main memory, where sizes are decided; a GPU is waited for with padding.

    real: bool `[B, S]`, False for padding; None: every token is real.
    """
    return torch.full((rows,), tokens) if real is None else real.sum(-1).cpu()


def divide(real: Tensor, budget: Tensor, config: CrushConfig) -> Zones:
    """Divides rows of `real` tokens so that at most `budget` and more than `budget - page_size` are kept.

    All of a row is kept that has fewer tokens than its budget.

    Pages start behind the sink. What is left over at the end of the middle joins the recent zone, at the cost
    of the contested budget, so that every page is whole and every head keeps the same number of tokens.
    `budget` must be at least `min(real, sink + window)`.
    """
    page_size = config.page_size
    sink = real.clamp(max=config.sink)
    window = (real - sink).clamp(max=config.window)
    middle = real - sink - window
    contested = (budget.minimum(real) - sink - window).clamp(min=0)
    rest = (middle % page_size).minimum(contested)
    units = middle // page_size
    keep = ((contested - rest) // page_size).minimum(units)
    return Zones(real=real, sink=sink, recent=window + rest, units=units, keep=keep, page_size=page_size)
