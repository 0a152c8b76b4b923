"""When a request's cache is compacted, and how much is kept: arithmetic that scheduler and workers share."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import CrushConfig
from ..core import Clock, Shares
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
    """Of one request, as the scheduler keeps it. Workers know its clock, and are told how many tokens are kept.

    No step of the scheduler crosses a point of the clock, so a request that was preempted and starts anew is compacted
    at the same points, with the same queries, and goes on with the same tokens.

    Attributes:
        prompt: tokens of the prompt.
        shares: of the engine's budget, and of the request's own; the smaller one decides.
        bytes_per_token: keys and values of one token in all layers, for budgets in bytes.
        block_size: tokens in a block of vLLM's; an eviction that frees none does not take place.
    """

    config: CrushConfig
    prompt: int
    shares: tuple[Shares, ...]
    bytes_per_token: int
    block_size: int = 1

    @property
    def clock(self) -> Clock:
        """Says when the request is compacted; its workers have the same."""
        return Clock(self.config.interval, self.prompt)

    def eviction(self, seen: int, held: int) -> Eviction | None:
        """The eviction at the point `seen` of a request that holds `held` tokens. None: all tokens stay."""
        budget = min(shares.alike(seen, self.bytes_per_token) for shares in self.shares)
        if self.shares[0].nothing_to_do(held, budget):
            return None
        kept = divide(held, budget, self.config).kept
        if -(-kept // self.block_size) == -(-held // self.block_size):
            return None  # tokens would be lost, and no block would come free
        return Eviction(seen, held, budget, kept)

    def most_held(self, seen: int) -> int:
        """The most tokens that the request holds at a time until it has seen `seen`, from the beginning."""
        if seen <= self.prompt:
            return seen
        most = held = point = self.prompt
        while True:
            if (eviction := self.eviction(point, held)) is not None:
                held = eviction.kept
            following = self.clock.next_point(point)
            end = seen if following is None else min(seen, following)
            held += end - point
            most = max(most, held)
            if end == seen:
                return most
            point = end
