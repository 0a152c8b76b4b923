"""The tables of `crushkv bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from .output import result_console, seconds, size

if TYPE_CHECKING:
    from ..benchmark import Figure, Spread


def show(figures: Sequence[Figure]) -> None:
    """Time and memory for each length and batch size, and below them what has to be known of their rows."""
    console = result_console()
    for tokens, batch in dict.fromkeys((figure.tokens, figure.batch) for figure in figures):
        found = [figure for figure in figures if (figure.tokens, figure.batch) == (tokens, batch)]
        rows = "" if batch == 1 else f", batch of {batch}"
        console.print(f"\n{tokens} tokens{rows}", style="bold")
        console.print(_times(found))
        console.print(_memory(found))
        for figure in found:
            for remark in figure.remarks:
                console.print(f"{figure.name}: {remark}", markup=False)
    if any(figure.own_share for figure in figures):
        console.print("own: signatures, distances and grouping, as a share of the whole request", style="dim")


def _times(figures: Sequence[Figure]) -> Table:
    table = _table("TTFT", "of full", "range", "TPOT", "of full", "range", "tokens/s", "own")
    for figure in figures:
        rate = figure.tokens_per_second
        table.add_row(
            figure.name,
            _seconds(figure.ttft),
            *_ratio(figure.ttft_ratio),
            _seconds(figure.tpot),
            *_ratio(figure.tpot_ratio),
            "-" if rate is None else f"{rate.median:.1f}",
            f"{figure.own_share:.2%}" if figure.own_share else "-",
        )
    return table


def _memory(figures: Sequence[Figure]) -> Table:
    table = _table("KV cache", "of full", "peak memory since the prompt", "range")
    for figure in figures:
        peak = figure.peak_above_start
        table.add_row(
            figure.name,
            "-" if figure.kv_bytes is None else size(figure.kv_bytes.median),
            "-" if figure.kv_share is None else f"{figure.kv_share.median:.1%}",
            "-" if peak is None else size(peak.median),
            "-" if peak is None else f"{size(peak.low)} to {size(peak.high)}",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold", min_width=16)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _seconds(spread: Spread | None) -> str:
    return seconds(None if spread is None else spread.median)


def _ratio(spread: Spread | None) -> tuple[str, str]:
    return ("-", "-") if spread is None else (f"{spread.median:.2f}x", f"{spread.low:.2f}-{spread.high:.2f}")
