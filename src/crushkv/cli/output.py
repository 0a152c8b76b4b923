"""What commands write: the result on standard output, all else on standard error."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from .._version import __version__
from ..errors import ConfigError


def check_folder(output: Path) -> None:
    """Refuses an `--output` that cannot be written, before anything runs."""
    if not output.parent.is_dir():
        raise ConfigError(f"--output {str(output)!r}: the folder does not exist")


def result_console() -> Console:
    return Console(highlight=False)


def message_console() -> Console:
    return Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_result_on_stdout() -> Iterator[None]:
    """What is printed inside, by whatever package, goes to standard error, so that standard output stays JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(value: dict[str, Any]) -> None:
    """One JSON object; NaN and the like, which JSON has not, are a mistake."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def installed(distribution: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of everything a result depends on."""
    packages = {name: installed(name) for name in ("torch", "transformers", "tokenizers")}
    return {"crushkv": __version__, "python": platform.python_version(), **packages}


def size(count: float | None) -> str:
    """Bytes for reading: `12.3 MiB`."""
    if count is None:
        return "not measured here"
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        amount /= 1024
    return f"{amount:.2f} GiB"


def seconds(time: float | None) -> str:
    if time is None:
        return "-"
    return f"{time:.2f} s" if time >= 1 else f"{time * 1000:.0f} ms"
