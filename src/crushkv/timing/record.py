"""One measured request, as a line of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError

ENGINE = "crushkv"  # of records made here
FULL = "full"
KIND = "request"


@dataclass(frozen=True)
class Record:
    """What one request took, or why it could not be made.

    Attributes:
        engine: what ran; a ratio is taken to the full cache of the same engine.
        method: `full`, or what was done to the cache.
        budget: share of the full cache that is kept. None: the full cache, or a method without a budget.
        tokens, batch, new_tokens: length of the prompt, number of rows, and tokens generated in each row.
        repeat: which round of the run this was.
        ttft_seconds, tpot_seconds: time to first token, and time per output token after it, for all rows together.
        total_seconds: of the request.
        tokens_per_second: new tokens of all rows by the total.
        peak_memory_bytes: most memory in use: of the GPU's allocator, or the resident set of the process.
        peak_above_start_bytes: the same, less what was in use before the request.
        kv_bytes: keys and values held at the end. full_kv_bytes: what the full cache would hold.
        stages: seconds by stage of the eviction. None: nothing is evicted, or the engine does not tell.
        note: a remark about this method.
        error: why there are no figures.
    """

    engine: str
    method: str
    tokens: int
    batch: int
    new_tokens: int
    repeat: int
    budget: float | None = None
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    total_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    peak_above_start_bytes: int | None = None
    kv_bytes: int | None = None
    full_kv_bytes: int | None = None
    stages: dict[str, float] | None = None
    note: str | None = None
    error: str | None = None


def label(method: str, budget: float | None) -> str:
    """Method and budget, unless the method's name tells it."""
    return method if budget is None or "budget=" in method else f"{method} at {budget:g}"


def write_record(file: TextIO, record: Record) -> None:
    """Adds a line."""
    print(json.dumps({"kind": KIND, **dataclasses.asdict(record)}), file=file, flush=True)


def record_of(line: Mapping[str, Any]) -> Record | None:
    """The record that a line holds; None for a line of another kind (the machine's)."""
    values = {**line}
    return Record(**values) if values.pop("kind") == KIND else None


def read_records(files: Sequence[Path]) -> list[Record]:
    """The records of files; lines of another kind (the machine's) are passed over.

    Raises:
        ConfigError: a file cannot be read, or a line is none of ours.
    """
    return [record for file in files for record in _read(file)]


def _read(file: Path) -> list[Record]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if (record := record_of(json.loads(line))) is not None:
                records.append(record)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{str(file)!r}, line {number}: no line of `crushkv bench`") from None
    return records
