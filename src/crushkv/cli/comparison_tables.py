"""The tables of `crushkv run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .figures import rows
from .output import result_console

if TYPE_CHECKING:
    from .comparison import Comparison


def show(comparison: Comparison) -> None:
    """Answers side by side, figures side by side, and one line that says what it comes to."""
    console = result_console()
    summary = comparison.summary()
    full, crushed = summary["full"], summary["kvcrush"]
    console.print()
    console.print(_answers(comparison))
    console.print(_figures(full, crushed))
    console.print(_conclusion(full, crushed, comparison.ratios()))


def _answers(comparison: Comparison) -> Table:
    table = Table("question", "full cache", "KVCrush", title="Answers", title_justify="left", show_lines=True)
    for answered in comparison.answered:
        cells = [_answer(answered.runs[kind]) for kind in ("full", "kvcrush")]
        question = Text.assemble(answered.question.question, "\n", (f"({answered.question.answer})", "dim"))
        table.add_row(question, *cells)
    return table


def _answer(run: dict[str, Any]) -> Text:
    mark = ("correct: ", "green") if run["correct"] else ("wrong: ", "red")
    return Text.assemble(mark, run["answer"])


def _figures(full: dict[str, Any], crushed: dict[str, Any]) -> Table:
    table = Table(
        "", "full cache", "KVCrush", title="Figures (medians; the highest of the peaks)", title_justify="left"
    )
    table.columns[0].no_wrap = True
    table.add_row("correct answers", *(f"{run['correct']} of {run['questions']}" for run in (full, crushed)))
    left, right = rows(full), rows(crushed)
    for name in left:
        table.add_row(name, left[name], right[name])
    return table


def _conclusion(full: dict[str, Any], crushed: dict[str, Any], ratios: dict[str, float | None]) -> Text:
    parts = [
        f"KV cache {1 / crushed['bytes_fraction']:.2f}x smaller",
        f"{crushed['correct']} of {crushed['questions']} correct (full cache: {full['correct']})",
        f"TTFT {_times(ratios['ttft_seconds'])}",
        f"TPOT {_times(ratios['tpot_seconds'])}",
        f"peak memory {_times(ratios['peak_memory_bytes'])}",
    ]
    return Text(f"KVCrush against the full cache: {', '.join(parts)}", style="bold")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
