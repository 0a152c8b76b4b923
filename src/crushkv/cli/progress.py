"""Progress of a number of runs on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from .bar import Bar


class Progress(Bar):
    """Use it as a context manager; `begin` and `done` around each of `total` runs, `token` at each new token."""

    def __init__(self, total: int) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            total=total,
        )
        self.total = total
        self.finished = 0
        self._text = ""
        self._prompt_tokens = self._tokens = 0

    def say(self, text: str) -> None:
        if self.visible:
            self.update(description=text)
        else:
            self.console.print(text, soft_wrap=True)

    def begin(self, text: str, prompt_tokens: int) -> None:
        self._text, self._prompt_tokens, self._tokens = text, prompt_tokens, 0
        self.update(description=f"{text}: reading {prompt_tokens} tokens")

    def token(self) -> None:
        self._tokens += 1
        self.update(description=f"{self._text}: writing token {self._tokens}")

    def done(self, result: str) -> None:
        """Ends a run; its line stays on the screen."""
        self.finished += 1
        tokens = f"{self._prompt_tokens} tokens read, {self._tokens} written"
        line = f"[{self.finished}/{self.total}] {self._text}: {tokens}, {result}"
        self.console.print(line, markup=False, soft_wrap=True)
        self.update(completed=self.finished)
