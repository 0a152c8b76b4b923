"""The figures of a measured run: as JSON has them, and as a table shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import seconds, size

if TYPE_CHECKING:
    from ..hf.measure import Measurement


def figures(run: Measurement, answer: str) -> dict[str, Any]:
    """The JSON form of one run. `tiers` are tokens per layer and KV head; None for the full cache."""
    report = run.report
    return {
        "answer": answer,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": len(run.token_ids),
        "tokens_seen": run.tokens_seen,
        "tokens_held": run.tokens_seen if report is None else round(report.tokens_held, 3),
        "tiers": None if report is None else {name: round(count, 3) for name, count in report.tiers.items()},
        "kv_bytes": run.kv_bytes,
        "full_kv_bytes": run.full_kv_bytes,
        "bytes_fraction": run.kv_bytes / run.full_kv_bytes if run.full_kv_bytes else 1.0,
        "state_bytes": 0 if report is None else report.state_bytes,
        "ttft_seconds": run.ttft,
        "tpot_seconds": run.tpot,
        "peak_memory_bytes": run.peak_memory,
        "memory_before_bytes": run.memory_before,
    }


def tokens_text(run: dict[str, Any]) -> str:
    """`410 of 1640: sink 4, important 300, ...`."""
    text = f"{run['tokens_held']:.0f} of {run['tokens_seen']}"
    if run["tiers"]:
        text += ": " + ", ".join(f"{name} {count:.0f}" for name, count in run["tiers"].items())
    return text


def bytes_text(run: dict[str, Any]) -> str:
    """`12.3 MiB (25.1 %)`."""
    return f"{size(run['kv_bytes'])} ({run['bytes_fraction']:.1%})"


def rows(run: dict[str, Any]) -> dict[str, str]:
    """What a table shows of a run, by the name of the row."""
    above = None
    if run["peak_memory_bytes"] is not None:
        above = run["peak_memory_bytes"] - run["memory_before_bytes"]
    return {
        "KV cache": bytes_text(run),
        "tokens held per layer and KV head": tokens_text(run),
        "beside it (positions, tiers, queries)": size(run["state_bytes"]),
        "time to first token (TTFT)": seconds(run["ttft_seconds"]),
        "time per token after it (TPOT)": seconds(run["tpot_seconds"]),
        "peak memory": size(run["peak_memory_bytes"]),
        "  of it since the prompt came": size(above),
    }
