"""The tables of `crushkv run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .figures import bytes_text, tokens_text
from .output import result_console, seconds, size

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
    table = Table("", "full cache", "KVCrush", title="Figures (medians over the questions)", title_justify="left")
    rows = {
        "correct answers": lambda run: f"{run['correct']} of {run['questions']}",
        "KV cache": bytes_text,
        "tokens held per layer and head": tokens_text,
        "beside it (positions, ...)": lambda run: size(int(run["state_bytes"])),
        "first token (TTFT)": lambda run: _time(run, "ttft"),
        "each token after it (TPOT)": lambda run: _time(run, "tpot"),
        "peak memory, at most": lambda run: size(run["peak_memory_bytes"]),
        "  of it since the prompt came": lambda run: size(run["peak_above_start_bytes"]),
    }
    for name, text in rows.items():
        table.add_row(name, text(full), text(crushed))
    return table


def _time(run: dict[str, Any], name: str) -> str:
    """`17.2 s (16.9 to 18.0 s)`."""
    spread = run[f"{name}_range_seconds"]
    median = seconds(run[f"{name}_seconds"])
    return median if spread is None else f"{median} ({seconds(spread[0])} to {seconds(spread[1])})"


def _conclusion(full: dict[str, Any], crushed: dict[str, Any], ratios: dict[str, float | None]) -> Text:
    smaller = full["kv_bytes"] / crushed["kv_bytes"]
    parts = [
        f"{crushed['correct']} of {crushed['questions']} correct (full cache {full['correct']})",
        f"time to first token {_times(ratios['ttft_seconds'])}",
        f"per token {_times(ratios['tpot_seconds'])}",
        f"peak memory {_times(ratios['peak_memory_bytes'])}",
    ]
    return Text(f"KV cache {smaller:.2f}x smaller: {', '.join(parts)} that of the full cache.", style="bold")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
