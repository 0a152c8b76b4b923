"""Medians of repeated requests, and their ratios to the full cache of the same engine."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .record import ENGINE, FULL, Record, label

# What KVCrush does besides ranking tokens by importance.
OWN_STAGES = ("signatures", "distances", "grouping")
Read = Callable[[Record], float | None]


@dataclass(frozen=True)
class Spread:
    """A median, and the range that it is from."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One method at one length, batch size and budget, over all repeats.

    Attributes:
        kv_share: of what the full cache of the same request would hold.
        ttft_ratio, tpot_ratio: to the full cache of the same engine, each request to the one of the same repeat.
        stages: share of the whole request, by stage.
        own_share: of the stages that are KVCrush's own.
        remarks: notes and errors of the requests, each once.
    """

    engine: str
    method: str
    budget: float | None
    tokens: int
    batch: int
    repeats: int
    ttft: Spread | None
    tpot: Spread | None
    tokens_per_second: Spread | None
    peak_above_start: Spread | None
    kv_bytes: Spread | None
    kv_share: Spread | None
    ttft_ratio: Spread | None
    tpot_ratio: Spread | None
    stages: dict[str, float]
    own_share: float | None
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Method and budget; the engine, where it is another's."""
        engine = "" if self.engine == ENGINE else f"{self.engine}: "
        return engine + label(self.method, self.budget)


def summarize(records: Iterable[Record]) -> list[Figure]:
    """One figure for each method, budget, length and batch size, in the order of their first requests."""
    groups: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    full: dict[tuple[object, ...], Record] = {}
    for record in records:
        groups[record.tokens, record.batch, record.engine, record.method, record.budget].append(record)
        if record.method == FULL and record.error is None:
            full[_round(record)] = record
    return [_figure(group, full) for group in groups.values()]


def _round(record: Record) -> tuple[object, ...]:
    return record.engine, record.tokens, record.batch, record.new_tokens, record.repeat


def _figure(group: Sequence[Record], full: dict[tuple[object, ...], Record]) -> Figure:
    first, made = group[0], [record for record in group if record.error is None]

    def ratio(read: Read) -> Spread | None:
        pairs = [(read(record), read(full[_round(record)])) for record in made if _round(record) in full]
        return _spread([ours / theirs for ours, theirs in pairs if ours is not None and theirs])

    stages = _stages(made)
    return Figure(
        engine=first.engine,
        method=first.method,
        budget=first.budget,
        tokens=first.tokens,
        batch=first.batch,
        repeats=len(made),
        ttft=_spread(_values(made, _ttft)),
        tpot=_spread(_values(made, _tpot)),
        tokens_per_second=_spread(_values(made, lambda record: record.tokens_per_second)),
        peak_above_start=_spread(_values(made, lambda record: record.peak_above_start_bytes)),
        kv_bytes=_spread(_values(made, lambda record: record.kv_bytes)),
        kv_share=_spread(_values(made, _kv_share)),
        ttft_ratio=ratio(_ttft),
        tpot_ratio=ratio(_tpot),
        stages=stages,
        own_share=sum(stages.get(stage, 0.0) for stage in OWN_STAGES) if stages else None,
        remarks=tuple(dict.fromkeys(text for record in group for text in (record.error, record.note) if text)),
    )


def _ttft(record: Record) -> float | None:
    return record.ttft_seconds


def _tpot(record: Record) -> float | None:
    return record.tpot_seconds


def _kv_share(record: Record) -> float | None:
    return record.kv_bytes / record.full_kv_bytes if record.kv_bytes is not None and record.full_kv_bytes else None


def _values(records: Sequence[Record], read: Read) -> list[float]:
    return [value for record in records if (value := read(record)) is not None]


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def _stages(records: Sequence[Record]) -> dict[str, float]:
    """Median share of the whole request."""
    shares: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for stage, seconds in (record.stages or {}).items():
            shares[stage].append(seconds / record.total_seconds if record.total_seconds else 0.0)
    return {stage: statistics.median(values) for stage, values in shares.items()}
