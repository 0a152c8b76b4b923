"""A worker: one engine in a process of its own that measures what it is asked to, a JSON line a request.

Standard library only: it runs in the environments of the peers, where crushkv is not.

The first line that a worker writes says what it offers. Then each line on stdin is a request, and each line on stdout
its record, in the order of the requests. Whatever else writes to stdout goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROW_OFFSET = 37  # tokens by which the rows of a batch are apart, so that they differ


@dataclass(frozen=True)
class Method:
    """What a worker offers.

    Attributes:
        budget: `"any"` takes the request's; a number is the only one that it has; None keeps everything.
        note: what a reader of its figures has to know.
    """

    budget: float | str | None = "any"
    note: str | None = None


@dataclass(frozen=True)
class Request:
    """One request. `prompts` has `batch` rows of `tokens` ids."""

    method: str
    budget: float | None
    tokens: int
    batch: int
    new_tokens: int
    prompts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Outcome:
    """What answering a request took.

    Attributes:
        times: seconds from the start until each row had its first token, its second, ...
        kv_bytes: keys and values held at the end.
        full_kv_bytes: what the full cache holds of the same tokens in the same dtype.
        note: what happened otherwise than asked.
    """

    times: Sequence[float]
    kv_bytes: int
    full_kv_bytes: int
    note: str | None = None


Run = Callable[[], Outcome]


def arguments() -> argparse.Namespace:
    """What every worker is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder, or GGUF file")
    parser.add_argument("--prompt", type=Path, required=True, help="JSON file with a list of token ids")
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def serve(
    engine: str,
    methods: Mapping[str, Method],
    versions: Mapping[str, str],
    prompt: Path,
    prepare: Callable[[Request], Run],
) -> None:
    """Answers requests until stdin ends.

    Args:
        engine: its name in the records.
        methods: by name.
        versions: of the packages that its figures depend on.
        prompt: a JSON file with a list of token ids.
        prepare: does what is not to be measured, and returns what is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ids = json.loads(prompt.read_text())
    offered = {name: method.budget for name, method in methods.items()}
    print(json.dumps({"engine": engine, "methods": offered, "versions": {**versions}}), file=channel)
    for line in sys.stdin:
        asked = json.loads(line)
        record = {"kind": "request", "engine": engine, **asked}
        try:
            record |= _measure(asked, methods, ids, prepare)
        except Exception as error:  # is the row's content, and no reason to stop
            said = str(error).strip().splitlines() or [""]
            record["error"] = f"{type(error).__name__}: {said[-1][:300]}"
        gc.collect()
        print(json.dumps(record), file=channel)


def _measure(
    asked: Mapping[str, Any], methods: Mapping[str, Method], ids: list[int], prepare: Callable[[Request], Run]
) -> dict[str, Any]:
    name, tokens, batch = asked["method"], asked["tokens"], asked["batch"]
    if name not in methods:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(methods)}")
    if len(ids) < tokens + ROW_OFFSET * (batch - 1):
        raise ValueError(f"the prompt file has {len(ids)} tokens, too few for {batch} rows of {tokens}")
    prompts = [ids[ROW_OFFSET * row :][:tokens] for row in range(batch)]
    run = prepare(Request(name, asked["budget"], tokens, batch, asked["new_tokens"], prompts))
    memory = PeakMemory()
    outcome = run()
    peak = memory.peak()
    total = outcome.times[-1]
    steps = [later - earlier for earlier, later in pairwise(outcome.times)]
    figures: dict[str, Any] = {
        "ttft_seconds": outcome.times[0],
        "tpot_seconds": statistics.median(steps) if steps else None,
        "total_seconds": total,
        "tokens_per_second": batch * asked["new_tokens"] / total,
        "peak_memory_bytes": peak,
        "peak_above_start_bytes": peak - memory.start,
        "kv_bytes": outcome.kv_bytes,
        "full_kv_bytes": outcome.full_kv_bytes,
    }
    notes = [note for note in (methods[name].note, outcome.note) if note]
    return figures | ({"note": " ".join(notes)} if notes else {})


class PeakMemory:
    """The highest resident set of this process since this object was made; bytes, Linux only."""

    def __init__(self) -> None:
        gc.collect()
        # What the allocator only keeps in reserve would hide a smaller peak.
        with contextlib.suppress(OSError, AttributeError):  # not every libc has it
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
        self.start = _resident_set("VmRSS")

    def peak(self) -> int:
        return _resident_set("VmHWM")


def _resident_set(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
