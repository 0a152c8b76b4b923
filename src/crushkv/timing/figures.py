"""Measured runs as figures: as JSON has them, several as one, and as the rows of a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import seconds, size
from .measure import Measurement

TIERS = ("sink", "important", "representative", "recent")
# What a report would say of the full cache.
_FULL: dict[str, Any] = {
    "tiers": None,
    "untouched_rows": 0,
    "room_bytes": 0,
    "state_bytes": 0,
    "rope_layers": 0,
    "widened_layers": {},
    "profile": None,
    "kernels": None,
}
_MEDIANS = (
    "kv_bytes",
    "full_kv_bytes",
    "bytes_fraction",
    "room_bytes",
    "state_bytes",
    "memory_bytes",
    "tokens_seen",
    "tokens_held",
    "ttft_seconds",
    "tpot_seconds",
)


def figures(run: Measurement) -> dict[str, Any]:
    """The figures of one run. `tiers` are tokens per layer and KV head; None for the full cache."""
    report = _FULL | {"tokens_held": run.tokens_seen} if run.report is None else dataclasses.asdict(run.report)
    return {
        **report,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": len(run.token_ids),
        "tokens_seen": run.tokens_seen,
        "kv_bytes": run.kv_bytes,
        "full_kv_bytes": run.full_kv_bytes,
        "bytes_fraction": run.bytes_fraction,
        "memory_bytes": run.memory_bytes,
        "ttft_seconds": run.ttft,
        "tpot_seconds": run.tpot,
        "peak_memory_bytes": run.peak_memory,
        "memory_before_bytes": run.memory_before,
        "peak_above_start_bytes": run.peak_above_start,
    }


def joined(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several runs of one configuration as those of one.

    Medians of bytes, tokens and times, with the ranges of times; means of the tiers; the highest of the peaks.
    """

    def values(name: str) -> list[float]:
        return [run[name] for run in runs if run[name] is not None]

    tiers = runs[0]["tiers"]
    return {
        **{name: statistics.median(values(name)) if values(name) else None for name in _MEDIANS},
        **{
            f"{name}_range_seconds": [min(found), max(found)] if (found := values(f"{name}_seconds")) else None
            for name in ("ttft", "tpot")
        },
        "tiers": tiers and {tier: statistics.fmean(run["tiers"][tier] for run in runs) for tier in tiers},
        **{name: max(values(name), default=None) for name in ("peak_memory_bytes", "peak_above_start_bytes")},
    }


def rows(run: Mapping[str, Any]) -> dict[str, str]:
    """The figures of one run, or of several that are joined, for reading: by the name of the row."""
    tiers = run["tiers"] or {}

    def duration(name: str) -> str:
        """`17.2 s`, and the range where there is one: `17.2 s (16.9 s to 18.0 s)`."""
        text, spread = seconds(run[f"{name}_seconds"]), run.get(f"{name}_range_seconds")
        return text if spread is None else f"{text} ({seconds(spread[0])} to {seconds(spread[1])})"

    return {
        "KV cache at 16 bits": f"{size(run['kv_bytes'])} ({run['bytes_fraction']:.1%})",
        "tokens per KV head": f"{run['tokens_held']:.0f} of {run['tokens_seen']:.0f}",
        **{f"  {name}": f"{tiers[name]:.0f}" if tiers else "-" for name in TIERS},
        "  room to grow": size(run["room_bytes"]),
        "  scores, positions": size(run["state_bytes"]),
        "  allocated in all": size(run["memory_bytes"]),
        "first token (TTFT)": duration("ttft"),
        "token after it (TPOT)": duration("tpot"),
        "peak memory": size(run["peak_memory_bytes"]),
        "  since the prompt": size(run["peak_above_start_bytes"]),
    }
