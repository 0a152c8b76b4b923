"""What commands write: the result on standard output, messages and progress on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def check_output(output: Path | None) -> None:
    """Refuses an `--output` that cannot be written, before anything runs."""
    if output is None:
        return
    target = output.expanduser().resolve()
    if not target.parent.is_dir():
        raise ConfigError(f"--output {str(output)!r}: the folder does not exist")
    if target.exists() and not target.is_file():
        raise ConfigError(f"--output {str(output)!r}: it exists and is not a file")


def console(messages: bool = False) -> Console:
    """The console of the result, or of messages."""
    from rich.console import Console

    return Console(stderr=messages, highlight=False)


def plain_table(first: str, columns: Iterable[str]) -> Table:
    """A table with few lines: numbers on the right of each column, and names in the first one."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def names_and_values(rows: Iterable[tuple[str, Any]], style: str) -> Table:
    """Two columns without lines. `style` is that of the names."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style=style, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_result_on_stdout(wanted: bool) -> Iterator[None]:
    """If wanted, what any package prints inside goes to standard error, so that standard output stays JSON."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON object. NaN and infinity are no JSON, and raise an error."""
    print(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))


def add_figures(table: Table, runs: Iterable[Mapping[str, Any]]) -> None:
    """Adds the rows of figures, with a column for each run, to a table whose first column has names."""
    from ..timing.figures import rows

    table.columns[0].no_wrap = True
    shown = [rows(run) for run in runs]
    for name in shown[0]:
        table.add_row(name, *(run[name] for run in shown))


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Shows how much of some work is done and estimates the time that is left: a bar on a terminal, else lines.

    Args:
        weights: one for each item of the work, in proportion to the time that it will take.
        lines: print a line for each finished item where there is no terminal.
    """

    def __init__(self, weights: Sequence[float], lines: bool = True) -> None:
        from rich import progress

        self._console = console(messages=True)
        self._lines = lines and not self._console.is_terminal
        self._weights = weights
        self._finished = 0
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

    def __exit__(self, *error: object) -> None:
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
        done, rest = sum(self._weights[: self._finished]), sum(self._weights[self._finished :])
        left = f"about {_about(passed / done * rest if done else 0.0)} left"
        self._bar.update(self._task, completed=self._finished, left=left)
        if self._lines:
            line = f"[{self._finished}/{len(self._weights)}] {text}, {left}"
            self._console.print(line, markup=False, soft_wrap=True)


def _about(seconds: float) -> str:
    """For reading: `40 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
