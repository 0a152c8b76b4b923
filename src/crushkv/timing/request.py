"""One request, measured as a user makes it: with `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ..config import CrushConfig
from ..core import record_stages
from .measure import measure
from .record import ENGINE, FULL, Record, label

Method = TypeVar("Method")


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        tokens, batch, new_tokens: of the prompt, rows, and to be generated in each row.
        method: its name in results.
        config: what KVCrush keeps; None is the full cache.
        repeat: which round of the run this is.
    """

    tokens: int
    batch: int
    new_tokens: int
    method: str = FULL
    config: CrushConfig | None = None
    repeat: int = 0

    def __str__(self) -> str:
        return f"{self.tokens} tokens, batch of {self.batch}, {label(self.method, share(self.config))}"

    def record(self, **found: Any) -> Record:
        """The record of this request, with the figures or the error that were found."""
        asked = {name: getattr(self, name) for name in ("tokens", "batch", "new_tokens", "method", "repeat")}
        return Record(engine=ENGINE, budget=share(self.config), **asked, **found)


def measure_request(model: Any, prompt: Tensor, request: Request, **options: Any) -> Record:
    """Generates exactly as many tokens as the request asks for, greedily, from `prompt [B, S]`.

    Args:
        options: further arguments of `generate`.

    Raises:
        ConfigError: the prompt is longer than the model's positions.
    """
    length: dict[str, Any] = {
        "max_new_tokens": request.new_tokens,
        "min_new_tokens": request.new_tokens,
        "do_sample": False,
    }
    with record_stages() as stages:
        run = measure(model, prompt, request.config, **length, **options)
    total = run.ttft + (run.tpot or 0.0) * (request.new_tokens - 1)
    return request.record(
        ttft_seconds=run.ttft,
        tpot_seconds=run.tpot,
        total_seconds=total,
        tokens_per_second=request.batch * request.new_tokens / total,
        peak_memory_bytes=run.peak_memory,
        peak_above_start_bytes=run.peak_above_start,
        kv_bytes=run.kv_bytes,
        full_kv_bytes=run.full_kv_bytes,
        stages=None if request.config is None else dict(stages),
    )


def rotated(methods: Sequence[Method], repeat: int) -> list[Method]:
    """The order of the methods in a round. Each round begins with another one."""
    first = repeat % len(methods)
    return [*methods[first:], *methods[:first]]


def share(config: CrushConfig | None) -> float | None:
    """A configuration's budget, if it is a share of the full cache."""
    return config.budget if config is not None and isinstance(config.budget, float) else None
