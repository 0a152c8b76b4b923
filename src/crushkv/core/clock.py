"""When tokens are evicted: at the end of a prompt, and then every so many tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """The *points* at which a stream (a batch, or one request) is evicted, counted in tokens seen.

    Attributes:
        interval: tokens decoded between two points; 0: there is no point while decoding.
        prompt_end: tokens seen at the end of the prompt; None while that is not known, and then each pass over several
            tokens is a whole prompt.
    """

    interval: int
    prompt_end: int | None = None

    def is_prompt(self, before: int, new: int = 1) -> bool:
        """Whether a pass over `new` tokens behind `before` others reads a prompt, and does not decode."""
        return new > 1 or (self.prompt_end is not None and before < self.prompt_end)

    def next_point(self, seen: int, last: int | None = None) -> int | None:
        """The first point behind `seen` tokens; None: there is none.

        Args:
            last: the last point, from which intervals are counted; None: the end of the prompt.
        """
        if self.prompt_end is not None and seen < self.prompt_end:
            return self.prompt_end
        start = self.prompt_end if last is None else last
        if not self.interval or start is None:
            return None
        return start + ((seen - start) // self.interval + 1) * self.interval

    def is_point(self, before: int, new: int = 1, last: int | None = None) -> bool:
        """Whether a pass over `new` tokens behind `before` others ends at a point."""
        seen = before + new
        if self.is_prompt(before, new):
            return self.prompt_end is None or seen >= self.prompt_end
        return self.next_point(before, last) == seen
