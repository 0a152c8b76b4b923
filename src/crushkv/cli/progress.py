"""Progress of a number of runs on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from .output import message_console


class Progress:
    """Use it as a context manager; `begin` and `done` around each of `total` runs, `token` at each new token."""

    def __init__(self, total: int) -> None:
        self.console = message_console()
        self.total = total
        self.finished = 0
        self._text = ""
        self._prompt_tokens = self._tokens = 0
        self._bar: RichProgress | None = None
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.console.print(text, soft_wrap=True)

    def begin(self, text: str, prompt_tokens: int) -> None:
        self._text, self._prompt_tokens, self._tokens = text, prompt_tokens, 0
        if self._bar is not None:
            self._bar.update(self._task, description=f"{text}: reading {prompt_tokens} tokens")

    def token(self) -> None:
        self._tokens += 1
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._text}: writing token {self._tokens}")

    def done(self, result: str) -> None:
        """Ends a run; its line stays on the screen."""
        self.finished += 1
        tokens = f"{self._prompt_tokens} tokens read, {self._tokens} written"
        line = f"[{self.finished}/{self.total}] {self._text}: {tokens}, {result}"
        self.console.print(line, markup=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.finished)
