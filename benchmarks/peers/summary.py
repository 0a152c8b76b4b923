"""The table of a comparison, in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from crushkv.timing import FULL, Figure, Spread, record_of, summarize

MIB = 2**20
COLUMNS = ("", "budget", "TTFT", "of its full cache", "TPOT", "of its full cache", "KV held", "peak above start")


def show(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints a table for each prompt length and batch size, and under it what a reader has to know."""
    figures = summarize(record for line in lines if (record := record_of(line)) is not None)
    for tokens, batch in dict.fromkeys((figure.tokens, figure.batch) for figure in figures):
        found = [figure for figure in figures if (figure.tokens, figure.batch) == (tokens, batch)]
        console.print(f"\n{tokens} tokens, batch {batch}\n", highlight=False)
        table = Table(box=box.MARKDOWN, header_style="")
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for figure in found:
            budget = "" if figure.budget is None else f"{figure.budget:g}"
            table.add_row(f"{figure.engine} {figure.method}", budget, *cells(figure))
        console.print(table)
        for line in remarks(found):
            console.print(f"- {line}", highlight=False, soft_wrap=True)


def cells(figure: Figure) -> list[str]:
    ttft, tpot, held, share = figure.ttft, figure.tpot, figure.kv_bytes, figure.kv_share
    if ttft is None or tpot is None or held is None or share is None:
        return ["failed", *[""] * 5]

    def ranged(spread: Spread | None, unit: str, scale: float, digits: int) -> str:
        if spread is None:
            return ""
        median, low, high = (f"{value / scale:.{digits}f}" for value in (spread.median, spread.low, spread.high))
        return f"{median}{unit}" if figure.repeats == 1 else f"{median}{unit} ({low} to {high})"

    def ratio(spread: Spread | None) -> str:
        # The full cache beside itself says nothing.
        return "" if figure.method == FULL else ranged(spread, "x", 1, 2)

    return [
        f"{ttft.median:.2f} s",
        ratio(figure.ttft_ratio),
        f"{1000 * tpot.median:.1f} ms",
        ratio(figure.tpot_ratio),
        f"{held.median / MIB:.1f} MiB ({share.median:.0%})",
        ranged(figure.peak_above_start, " MiB", MIB, 0),
    ]


def remarks(figures: Sequence[Figure]) -> list[str]:
    """Notes and errors, each said once for all methods of an engine that have it."""
    methods: dict[tuple[str, str], list[str]] = defaultdict(list)
    for figure in figures:
        for text in figure.remarks:
            methods[figure.engine, text].append(figure.method)
    return [f"{engine} {', '.join(dict.fromkeys(found))}: {text}" for (engine, text), found in methods.items()]
