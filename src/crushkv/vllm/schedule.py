"""When a request's cache is compacted, and how much is kept: arithmetic that scheduler and workers share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import torch

from ..budget import Budget
from ..config import CrushConfig
from ..core.zones import divide


@dataclass(frozen=True)
class Eviction:
    """One compaction of one request, as the scheduler decided it.

    Lengths are in tokens. `seen` counts every token of the text so far; `held` those in the cache before, `kept` those
    in it afterwards. Every layer and head keeps the same number.
    """

    seen: int
    held: int
    budget: int
    kept: int


@dataclass(frozen=True)
class EvictionSchedule:
    """Of one request. Both sides compute it from the request alone, so nothing has to be reported back.

    A request is compacted at its *points*: the end of its prompt, and then every `interval` tokens. No step of the
    scheduler crosses a point, so a request that was preempted and starts anew is compacted at the same points, with
    the same queries, and goes on with the same tokens.

    Attributes:
        prompt: tokens of the prompt.
        budgets: each holds; the smallest decides.
        bytes_per_token: keys and values of one token in all layers, for budgets in bytes.
        block_size: tokens in a block of vLLM's; an eviction that frees none does not take place.
    """

    config: CrushConfig
    prompt: int
    budgets: tuple[Budget, ...]
    bytes_per_token: int
    block_size: int = 1

    def is_point(self, seen: int) -> bool:
        return self.next_point(seen - 1) == seen

    def next_point(self, seen: int) -> int | None:
        """The first point behind `seen` tokens, None if there is none."""
        if seen < self.prompt:
            return self.prompt
        interval = self.config.interval
        return self.prompt + ((seen - self.prompt) // interval + 1) * interval if interval else None

    def eviction(self, seen: int, held: int) -> Eviction | None:
        """What happens at the point `seen` to a request that holds `held` tokens; None where all are kept."""
        config = self.config
        budget = max(min(map(self._tokens, self.budgets, repeat(seen))), min(seen, config.sink + config.window))
        if held <= budget:
            return None
        zones = divide(torch.tensor([held]), torch.tensor([budget]), config.sink, config.window, config.page_size)
        kept = int(zones.kept(config.page_size))
        if -(-kept // self.block_size) == -(-held // self.block_size):
            return None  # tokens would be lost, and no block would come free
        return Eviction(seen, held, budget, kept)

    def _tokens(self, budget: Budget, seen: int) -> int:
        if budget.kind == "fraction" and seen < self.config.min_tokens:
            return seen
        return int(budget.tokens(torch.tensor([seen]), self.bytes_per_token))

    def most_held(self, seen: int) -> int:
        """The most tokens that the request holds at a time until it has seen `seen`, from the beginning."""
        if seen <= self.prompt:
            return seen
        most = held = point = self.prompt
        while True:
            if (eviction := self.eviction(point, held)) is not None:
                held = eviction.kept
            following = self.next_point(point)
            end = seen if following is None else min(seen, following)
            held += end - point
            most = max(most, held)
            if end == seen:
                return most
            point = end
