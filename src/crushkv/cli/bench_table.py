"""The table of `crushkv bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from .output import result_console, seconds, size

if TYPE_CHECKING:
    from ..benchmark import Figure, Spread


def show(figures: Sequence[Figure]) -> None:
    """A table for each length and batch size, and below it what has to be known of its rows."""
    console = result_console()
    for tokens, batch in dict.fromkeys((figure.tokens, figure.batch) for figure in figures):
        found = [figure for figure in figures if (figure.tokens, figure.batch) == (tokens, batch)]
        rows = "" if batch == 1 else f", batch of {batch}"
        console.print(_table(f"{tokens} tokens{rows}", found))
        for figure in found:
            for remark in figure.remarks:
                console.print(f"{figure.name}: {remark}", markup=False)
    shares = [figure.own_share for figure in figures if figure.own_share]
    if shares:
        console.print("own: signatures, distances and grouping, of the whole request", style="dim")


def _table(title: str, figures: Sequence[Figure]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("TTFT", "to full", "TPOT", "to full", "tokens/s", "KV cache", "peak since prompt", "own"):
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures:
        rate = figure.tokens_per_second
        table.add_row(
            figure.name,
            seconds(_median(figure.ttft)),
            _ratio(figure.ttft_ratio),
            seconds(_median(figure.tpot)),
            _ratio(figure.tpot_ratio),
            "-" if rate is None else f"{rate.median:.1f}",
            "-" if figure.kv_bytes is None else size(figure.kv_bytes.median),
            "-" if figure.peak_above_start is None else size(figure.peak_above_start.median),
            f"{figure.own_share:.3%}" if figure.own_share else "-",
        )
    return table


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _ratio(spread: Spread | None) -> str:
    """`1.02x (0.99 to 1.05)`."""
    return "-" if spread is None else f"{spread.median:.2f}x ({spread.low:.2f} to {spread.high:.2f})"
