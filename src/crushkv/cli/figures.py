"""The figures of a measured run: as JSON has them, and as a table shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import seconds, size

if TYPE_CHECKING:
    from ..hf.measure import Measurement

TIERS = ("sink", "important", "representative", "recent")


def figures(run: Measurement, answer: str) -> dict[str, Any]:
    """The JSON form of one run. `tiers` are tokens per layer and KV head; None for the full cache."""
    report = run.report
    peak, before = run.peak_memory, run.memory_before
    return {
        "answer": answer,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": len(run.token_ids),
        "tokens_seen": run.tokens_seen,
        "tokens_held": run.tokens_seen if report is None else round(report.tokens_held, 3),
        "tiers": None if report is None else {name: round(count, 3) for name, count in report.tiers.items()},
        "untouched_rows": 0 if report is None else report.untouched_rows,
        "rope_layers": 0 if report is None else report.rope_layers,
        "widened_layers": {} if report is None else dict(report.widened_layers),
        "profile": None if report is None else report.profile,
        "kv_bytes": run.kv_bytes,
        "full_kv_bytes": run.full_kv_bytes,
        "bytes_fraction": run.bytes_fraction,
        "state_bytes": 0 if report is None else report.state_bytes,
        "ttft_seconds": run.ttft,
        "tpot_seconds": run.tpot,
        "peak_memory_bytes": peak,
        "memory_before_bytes": before,
        "peak_above_start_bytes": None if peak is None or before is None else peak - before,
    }


def rows(run: dict[str, Any]) -> dict[str, str]:
    """What a table shows of one run, or of a summary of several, by the name of the row."""
    tiers = run["tiers"] or {}
    return {
        "KV cache": size(run["kv_bytes"]),
        "  at 16 bits a number": f"{run['bytes_fraction']:.1%}",
        "tokens per KV head": f"{run['tokens_held']:.0f} of {run['tokens_seen']:.0f}",
        **{f"  {name}": f"{tiers[name]:.0f}" if tiers else "-" for name in TIERS},
        "scores, positions": size(run["state_bytes"]),
        "first token (TTFT)": _time(run, "ttft"),
        "token after it (TPOT)": _time(run, "tpot"),
        "peak memory": size(run["peak_memory_bytes"]),
        "  since the prompt": size(run["peak_above_start_bytes"]),
    }


def _time(run: dict[str, Any], name: str) -> str:
    """`17.2 s`, and the range where there is one: `17.2 s (16.9 s to 18.0 s)`."""
    text = seconds(run[f"{name}_seconds"])
    spread = run.get(f"{name}_range_seconds")
    return text if spread is None else f"{text} ({seconds(spread[0])} to {seconds(spread[1])})"
