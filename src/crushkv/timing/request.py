"""One request, measured as a user makes it: with `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..config import CrushConfig
from ..core import record_stages
from .measure import measure
from .record import ENGINE, FULL, Record

Method = TypeVar("Method")


def measure_request(
    model: Any,
    prompt: Tensor,
    new_tokens: int,
    config: CrushConfig | None,
    method: str = FULL,
    repeat: int = 0,
    **options: Any,
) -> Record:
    """Generates exactly `new_tokens` greedily from `prompt [B, S]`, with the full cache (None) or a compressed one.

    Args:
        options: further arguments of `generate`.

    Raises:
        ConfigError: the prompt is longer than the model's positions.
    """
    with record_stages() as stages:
        run = measure(
            model,
            prompt,
            config,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **options,
        )
    total = run.ttft + (run.tpot or 0.0) * (new_tokens - 1)
    peak, before = run.peak_memory, run.memory_before
    return Record(
        engine=ENGINE,
        method=method,
        budget=share(config),
        tokens=prompt.shape[1],
        batch=prompt.shape[0],
        new_tokens=new_tokens,
        repeat=repeat,
        ttft_seconds=run.ttft,
        tpot_seconds=run.tpot,
        total_seconds=total,
        tokens_per_second=prompt.shape[0] * new_tokens / total,
        peak_memory_bytes=peak,
        peak_above_start_bytes=None if peak is None or before is None else peak - before,
        kv_bytes=run.kv_bytes,
        full_kv_bytes=run.full_kv_bytes,
        stages=None if config is None else dict(stages),
    )


def rotated(methods: Sequence[Method], repeat: int) -> list[Method]:
    """The order of the methods in a round. Each round begins with another one."""
    first = repeat % len(methods)
    return [*methods[first:], *methods[:first]]


def share(config: CrushConfig | None) -> float | None:
    """A configuration's budget, if it is a share of the full cache."""
    return config.budget if config is not None and isinstance(config.budget, float) else None
