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
    console.print("peak: most memory in use since the request began, less what was in use then", style="dim")
    if any(figure.own_share for figure in figures):
        console.print("own: signatures, distances and grouping, as a share of the whole request", style="dim")


def _times(figures: Sequence[Figure]) -> Table:
    table = _table("TTFT", "of full (range)", "TPOT", "of full (range)")
    for figure in figures:
        table.add_row(
            figure.name,
            "-" if figure.ttft is None else seconds(figure.ttft.median),
            _ratio(figure.ttft_ratio),
            "-" if figure.tpot is None else seconds(figure.tpot.median),
            _ratio(figure.tpot_ratio),
        )
    return table


def _memory(figures: Sequence[Figure]) -> Table:
    table = _table("KV cache", "of full", "peak MiB (range)", "tokens/s", "own")
    for figure in figures:
        rate = figure.tokens_per_second
        table.add_row(
            figure.name,
            "-" if figure.kv_bytes is None else size(figure.kv_bytes.median),
            "-" if figure.kv_share is None else f"{figure.kv_share.median:.1%}",
            _ranged(figure.peak_above_start, 0, 2**20),
            "-" if rate is None else f"{rate.median:.1f}",
            f"{figure.own_share:.2%}" if figure.own_share else "-",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold", min_width=20)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ratio(spread: Spread | None) -> str:
    return _ranged(spread, 2, 1, "x")


def _ranged(spread: Spread | None, digits: int, scale: float, unit: str = "") -> str:
    if spread is None:
        return "-"
    median, low, high = (f"{value / scale:.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median}{unit} ({low}-{high})"
