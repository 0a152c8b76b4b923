"""The table of a comparison: medians, and ratios to the full cache of the same engine in the same repeat."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]
MIB = 2**20
FULL = "full"
COLUMNS = ("", "budget", "TTFT", "of its full cache", "TPOT", "of its full cache", "KV held", "peak above start")


def show(records: Sequence[Record], console: Console) -> None:
    """Prints a table for each prompt length and batch size, and under it what a reader has to know."""
    requests = [record for record in records if record["kind"] == "request"]
    workloads: dict[tuple[int, int, int], list[Record]] = defaultdict(list)
    for record in requests:
        workloads[record["tokens"], record["batch"], record["new_tokens"]].append(record)
    for (tokens, batch, new_tokens), made in workloads.items():
        console.print(f"\n{tokens} tokens, batch {batch}, {new_tokens} new tokens\n", highlight=False)
        table = Table(box=box.MARKDOWN, header_style="")
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        methods: dict[tuple[str, str, float | None], list[Record]] = defaultdict(list)
        for record in made:
            methods[record["engine"], record["method"], record["budget"]].append(record)
        for (engine, method, budget), repeats in methods.items():
            # The full cache beside itself says nothing.
            base = () if method == FULL else methods.get((engine, FULL, None), ())
            full = {r["repeat"]: r for r in base if "error" not in r}
            shown = "" if budget is None else f"{budget:g}"
            table.add_row(f"{engine} {method}", shown, *cells(repeats, full))
        console.print(table)
        for line in remarks(made):
            console.print(f"- {line}", highlight=False, soft_wrap=True)


def cells(repeats: Iterable[Record], full: Mapping[int, Record]) -> list[str]:
    measured = [r for r in repeats if "error" not in r]
    if not measured:
        return ["failed", *[""] * 5]

    def median(name: str) -> float:
        return statistics.median(r[name] for r in measured)

    def peak() -> str:
        peaks = [r["peak_above_start_bytes"] / MIB for r in measured]
        shown = f"{statistics.median(peaks):.0f} MiB"
        return shown if len(peaks) == 1 else f"{shown} ({min(peaks):.0f} to {max(peaks):.0f})"

    def ratio(name: str) -> str:
        ratios = [r[name] / full[r["repeat"]][name] for r in measured if r["repeat"] in full]
        if not ratios:
            return ""
        shown = f"{statistics.median(ratios):.2f}x"
        return shown if len(ratios) == 1 else f"{shown} ({min(ratios):.2f} to {max(ratios):.2f})"

    return [
        f"{median('ttft_seconds'):.2f} s",
        ratio("ttft_seconds"),
        f"{1000 * median('tpot_seconds'):.1f} ms",
        ratio("tpot_seconds"),
        f"{median('kv_bytes') / MIB:.1f} MiB ({median('kv_bytes') / median('full_kv_bytes'):.0%})",
        peak(),
    ]


def remarks(records: Iterable[Record]) -> list[str]:
    """Notes and errors, each said once for all methods of an engine that have it."""
    of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        for text in (record.get("note"), record.get("error")):
            methods = of[record["engine"], text] if text else []
            if record["method"] not in methods:
                methods.append(record["method"])
    return [f"{engine} {', '.join(methods)}: {text}" for (engine, text), methods in of.items()]
