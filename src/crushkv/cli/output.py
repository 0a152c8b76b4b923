"""What commands write: the result on standard output, messages and progress on standard error."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .._version import __version__
from ..errors import ConfigError
from ..text import size as size  # part of what commands write with

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
        raise ConfigError(f"--output {str(output)!r}: this is there already, and is no file")


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


def installed(distribution: str) -> str | None:
    """The version of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def missing(extra: str) -> list[str]:
    """The packages of one of crushkv's extras (`embedded`, `eval`, `vllm`) that are not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = requires("crushkv") or []
    except PackageNotFoundError:  # crushkv itself runs from a folder of source
        return []
    names = [re.match(r"[\w.-]+", line) for line in needed if re.search(rf"""extra == ['"]{extra}['"]""", line)]
    return [name[0] for name in names if name is not None and installed(name[0]) is None]


def versions(*others: str) -> dict[str, str | None]:
    """The versions of everything that a result depends on."""
    packages = {name: installed(name) for name in ("torch", "transformers", "tokenizers", *others)}
    return {"crushkv": __version__, "python": platform.python_version(), **packages}


def seconds(time: float | None) -> str:
    if time is None:
        return "-"
    return f"{time:.2f} s" if time >= 1 else f"{time * 1000:.0f} ms"


def figure_rows(run: Mapping[str, Any]) -> dict[str, str]:
    """What a table shows of one run, or of a summary of several, by the name of the row."""
    tiers = run["tiers"] or {}

    def duration(name: str) -> str:
        """`17.2 s`, and the range where there is one: `17.2 s (16.9 s to 18.0 s)`."""
        text, spread = seconds(run[f"{name}_seconds"]), run.get(f"{name}_range_seconds")
        return text if spread is None else f"{text} ({seconds(spread[0])} to {seconds(spread[1])})"

    return {
        "KV cache at 16 bits": f"{size(run['kv_bytes'])} ({run['bytes_fraction']:.1%})",
        "tokens per KV head": f"{run['tokens_held']:.0f} of {run['tokens_seen']:.0f}",
        **{f"  {name}": f"{tiers[name]:.0f}" if tiers else "-" for name in TIERS},
        "  room to grow": size(run["room_bytes"]),
        "  scores, positions": size(run["state_bytes"]),
        "  allocated in all": size(run["memory_bytes"]),
        "first token (TTFT)": duration("ttft"),
        "token after it (TPOT)": duration("tpot"),
        "peak memory": size(run["peak_memory_bytes"]),
        "  since the prompt": size(run["peak_above_start_bytes"]),
    }


TIERS = ("sink", "important", "representative", "recent")


def add_figures(table: Table, runs: Iterable[Mapping[str, Any]]) -> None:
    """Adds the rows of `figure_rows`, with a column for each run, to a table whose first column has names."""
    table.columns[0].no_wrap = True
    shown = [figure_rows(run) for run in runs]
    for name in shown[0]:
        table.add_row(name, *(rows[name] for rows in shown))


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
