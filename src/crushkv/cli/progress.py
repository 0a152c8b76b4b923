"""Progress of long work on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from .output import message_console


class Progress:
    """A context manager that shows how much of some work is done, and estimates the time that is left.

    Args:
        weights: one for each item of the work, in proportion to the time that it will take.
        lines: print a line for each finished item where there is no terminal.
    """

    def __init__(self, weights: Sequence[float], lines: bool = True) -> None:
        from rich import progress

        self._console = message_console()
        self._lines = lines
        self._weights = weights
        self._finished = 0
        self._begin = time.monotonic()
        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(weights), left="")

    def __enter__(self) -> Self:
        self._begin = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar off the screen. More calls do nothing."""
        self._bar.stop()

    def begin(self, text: str) -> None:
        """Says what is being done now."""
        self._bar.update(self._task, description=text)

    def done(self, text: str = "") -> None:
        """Ends an item."""
        self._finished += 1
        passed = time.monotonic() - self._begin
        done = sum(self._weights[: self._finished])
        left = f"about {duration(passed / done * sum(self._weights[self._finished :]) if done else 0.0)} left"
        self._bar.update(self._task, completed=self._finished, left=left)
        if self._lines and not self._console.is_terminal:
            line = f"[{self._finished}/{len(self._weights)}] {text}, {left}"
            self._console.print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """For reading: `40 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
