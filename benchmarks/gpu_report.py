"""What `gpu.py` prints and writes: a clock, a file that is written anew with each row, and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crushkv.text import size

RATIOS = ("ttft_seconds", "tpot_seconds", "kv_bytes", "memory_bytes", "peak_above_start_bytes")
console = Console(width=140, highlight=False)  # whole tables behind a pipe, too


class Clock:
    """Seconds since the run began, and those that are left of it."""

    def __init__(self, minutes: float) -> None:
        self._start, self._length = time.monotonic(), 60 * minutes

    @property
    def passed(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return self._length - self.passed


class Report:
    """What was found, in a file that is written anew with each row."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu.json"
        self.found: dict[str, Any] = {"kernels": [], "requests": [], "tests": None}
        self._clock = clock

    def note(self, **values: Any) -> None:
        self.found |= values
        self.write()

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.found[section].append(row)
        self.write()

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found | {"seconds": self._clock.passed}, indent=1) + "\n")
        partial.replace(self.path)


def say(line: str) -> None:
    print(line, flush=True)


def kernel_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="attention of one token over one layer", title_justify="left")
    for name in ("tokens", "batch", "format", "kernels", "time", "speed-up", "bytes", "ratio", "of copy", "error"):
        table.add_column(name, justify="left" if name in ("format", "kernels") else "right", overflow="fold")
    for row in found:
        head = f"{row['tokens']:,}", str(row["batch"]), row["method"], row.get("implementation", "")
        if row["error"] is not None:
            table.add_row(*head, row["error"])
            continue
        off = row["relative_error"]
        table.add_row(
            *head,
            f"{1e6 * row['seconds']:,.0f} us",
            f"{row['speedup']:.2f}x",
            size(row["bytes"]),
            f"{row['bytes_ratio']:.3f}",
            f"{row['of_copy']:.0%}",
            "-" if off is None else f"{off:.1e}",
        )
    return table


def request_table(found: Sequence[dict[str, Any]]) -> Table:
    tokens, batch = size_of(found[0])
    table = Table(title=f"{tokens:,} tokens, batch of {batch}; x: by the full cache", title_justify="left")
    heads = ("cache", "TTFT", "x", "TPOT (least)", "x", "KV", "x", "allocated", "x", "peak above weights", "x", "waits")
    for number, name in enumerate(heads):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in found:
        if row["error"] is not None:
            table.add_row(row["method"], row["error"])
            continue
        cells = []
        for name in RATIOS:
            value, ratio = row[name], row["ratios"].get(name)
            # A busy host doubles medians.
            least = f" ({1000 * row['tpot_least']:.1f})" if name == "tpot_seconds" else ""
            cells += [_figure(name, value) + least, "-" if ratio is None else f"{ratio:.3f}"]
        waits = row["synchronisations"]
        table.add_row(row["method"], *cells, "-" if waits is None else str(sum(waits.values())))
    return table


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "ttft_seconds":
        return f"{value:.2f} s"
    return f"{1000 * value:.1f} ms" if name == "tpot_seconds" else size(int(value))


def size_of(row: dict[str, Any]) -> tuple[int, int]:
    return row["tokens"], row["batch"]
