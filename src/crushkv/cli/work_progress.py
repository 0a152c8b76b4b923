"""Progress of long work whose items take unequal time, with an estimate of what is left."""

from __future__ import annotations

import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from .bar import Bar


class WorkProgress(Bar):
    """Use it as a context manager, and `done` after each item.

    Args:
        weights: of the items, in proportion to the time that they will take.
    """

    def __init__(self, weights: list[float]) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            total=len(weights),
            left="",
        )
        self._weights = weights
        self._finished = 0
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        self._begin = time.monotonic()
        return super().__enter__()

    def begin(self, text: str) -> None:
        self.update(description=text)

    def done(self, text: str) -> None:
        """Ends an item."""
        self._finished += 1
        passed = time.monotonic() - self._begin
        done = sum(self._weights[: self._finished])
        left = passed / done * sum(self._weights[self._finished :]) if done else 0.0
        if self.visible:
            self.update(completed=self._finished, left=f"about {duration(left)} left")
        else:
            line = f"[{self._finished}/{len(self._weights)}] {text}, about {duration(left)} left"
            self.console.print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """For reading: `40 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
