"""A progress bar on standard error, where that is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.progress import Progress, ProgressColumn

from .output import message_console


class Bar:
    """A context manager with a bar. Without a terminal there is none, and `update` does nothing."""

    def __init__(self, *columns: ProgressColumn, total: int, **fields: Any) -> None:
        self.console = message_console()
        self.visible = self.console.is_terminal
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.visible)
        self._task = self._bar.add_task("", total=total, **fields)

    def __enter__(self) -> Self:
        if self.visible:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.visible:
            self._bar.stop()

    def update(self, **changes: Any) -> None:
        if self.visible:
            self._bar.update(self._task, **changes)
