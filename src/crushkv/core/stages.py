"""Where the time goes: named stages of the selection, timed only while somebody asks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_active: ContextVar[dict[str, float] | None] = ContextVar("crushkv_stages", default=None)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Adds the time spent inside to stage `name`; does nothing unless `record_stages` is active."""
    times = _active.get()
    if times is None:
        yield
        return
    start = _now()
    try:
        yield
    finally:
        times[name] += _now() - start


@contextmanager
def record_stages() -> Iterator[dict[str, float]]:
    """Yields a dict that collects seconds per stage name while the block runs in this thread.

    On a GPU every stage is bracketed by a synchronisation, so that the times are real; the total run is
    slower than without recording.
    """
    times: dict[str, float] = defaultdict(float)
    token = _active.set(times)
    try:
        yield times
    finally:
        _active.reset(token)
