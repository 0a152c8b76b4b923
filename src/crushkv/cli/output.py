"""What commands write: the result on standard output, all else on standard error."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        raise ConfigError(f"--output {str(output)!r}: it exists and is not a file")


def result_console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def message_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def plain_table(first: str, columns: Iterable[str]) -> Table:
    """A table with few lines: numbers on the right of each column, and names in the first one."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
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
