"""How a budget in bytes is split between the tiers: what `CrushLayer` does, and what `plan` shows beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .config import CrushConfig
from .core.selection import representative_units
from .core.zones import divide
from .storage import LayerSizes


@dataclass(frozen=True)
class Split:
    """Tokens of one row that a layer keeps for each KV head, by tier, and the bytes that hold them."""

    sink: int
    important: int
    representative: int
    recent: int
    nbytes: int

    @property
    def tokens(self) -> int:
        return self.sink + self.important + self.representative + self.recent


def split_tokens(budget: int, held: int, config: CrushConfig, sizes: LayerSizes) -> Split:
    """What `core.select` makes of `budget` tokens when a row holds `held` real ones."""
    zones = divide(
        torch.tensor([held]), torch.tensor([min(budget, held)]), config.sink, config.window, config.page_size
    )
    units = representative_units(zones.keep, config.representative_share)
    sink, recent = int(zones.sink), int(zones.recent)
    important, representative = (int(part) * config.page_size for part in (zones.keep - units, units))
    # Where nothing is contested yet, nothing is quantized either.
    untouched = held <= config.sink + config.window
    nbytes = sizes.raw(held) if untouched else sizes.tiers(sink + recent, important, representative)
    return Split(sink, important, representative, recent, nbytes)


@lru_cache(maxsize=1024)
def split_bytes(limit: int, held: int, config: CrushConfig, sizes: LayerSizes) -> Split:
    """The most tokens that fit into `limit` bytes; sink and window are kept in any case."""
    fits, above = min(held, config.sink + config.window), held
    while fits < above:  # bytes never shrink when tokens are added
        middle = (fits + above + 1) // 2
        if split_tokens(middle, held, config, sizes).nbytes <= limit:
            fits = middle
        else:
            above = middle - 1
    return split_tokens(fits, held, config, sizes)
