"""The comparison with peer libraries: its workers, what it does where one fails, and its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from crushkv.embedded import embedded_model_path
from interrupts import heed_interrupts

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
ENVIRONMENTS = Path(__file__).parents[1] / ".venv-peers"
sys.path.insert(0, str(PEERS))

from engine import Engine  # noqa: E402
from process import Worker, WorkerError  # noqa: E402
from summary import show  # noqa: E402

TOKENS, NEW = 512, 3
SIZE = {"tokens": TOKENS, "batch": 1, "new_tokens": NEW, "repeat": 0}
STUB = """
import os
from worker import Method, Outcome, arguments, serve

def prepare(request):
    print("chatter")
    if request.method == "raises":
        raise ValueError("first line\\nlast line")
    if request.method == "dies":
        os._exit(3)
    return lambda: Outcome([1.0, 1.5, 2.0], 25 * request.batch, 100 * request.batch, "dynamic.")

methods = {"works": Method(note="static."), "raises": Method(), "dies": Method()}
serve("stub", methods, {"stub": "1"}, arguments().prompt, prepare)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Engine]:
    """An engine whose worker computes nothing."""
    (tmp_path / "stub.py").write_text(f"import sys; sys.path.insert(0, {str(PEERS)!r})\n{STUB}")
    (tmp_path / "prompt.json").write_text(json.dumps(list(range(TOKENS + 100))))
    command = [sys.executable, str(tmp_path / "stub.py"), "--model", "", "--prompt", str(tmp_path / "prompt.json")]
    engine = Engine("stub", command, 1)
    yield engine
    engine.stop()


def request(method: str, **other: Any) -> dict[str, Any]:
    return {"method": method, "budget": 0.25, **SIZE, **other}


def test_a_record(stub: Engine) -> None:
    record = stub.ask(request("works", batch=2))
    peaks = record.pop("peak_memory_bytes"), record.pop("peak_above_start_bytes")
    assert peaks[0] > peaks[1] >= 0
    assert record == {
        "kind": "request",
        "engine": "stub",
        **request("works", batch=2),
        "ttft_seconds": 1.0,
        "tpot_seconds": 0.5,
        "total_seconds": 2.0,
        "tokens_per_second": NEW,
        "kv_bytes": 50,
        "full_kv_bytes": 200,
        "note": "static. dynamic.",
    }
    assert stub.start().versions == {"stub": "1"}


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request("raises"), "ValueError: last line"),
        (request("other"), "ValueError: unknown method 'other'; there are works, raises, dies"),
        (request("works", tokens=9999), "too few for 1 rows of 9999"),
    ],
)
def test_an_exception_is_a_record(stub: Engine, asked: dict[str, Any], error: str) -> None:
    record = stub.ask(asked)
    assert error in record["error"]
    assert record.items() >= {"engine": "stub", **asked}.items()
    worker = stub.start()
    assert "error" not in stub.ask(request("works"))
    assert stub.start() is worker


def test_a_worker_that_dies_is_started_again_once_for_a_method(stub: Engine) -> None:
    for _ in range(2):
        assert "ended with status 3" in stub.ask(request("dies"))["error"]
        assert "error" not in stub.ask(request("works"))
    worker = stub.start()
    assert "not asked again" in stub.ask(request("dies"))["error"]
    assert stub.start() is worker


def test_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="cannot be started"):
        Worker([str(tmp_path / "none")], 1)
    with pytest.raises(WorkerError, match="status 1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"):
        Worker([sys.executable, "-c", "import nothing_of_the_kind"], 1)


def test_the_table() -> None:
    def record(method: str, repeat: int, seconds: float, **other: Any) -> dict[str, Any]:
        figures = {"ttft_seconds": seconds, "tpot_seconds": seconds / 10, "kv_bytes": 2**20, "full_kv_bytes": 2**22}
        budget = None if method == "full" else 0.25
        asked = {"kind": "request", "engine": "e", **request(method, repeat=repeat, budget=budget)}
        return {**asked, **figures, "peak_above_start_bytes": 2**23, **other}

    records = [
        {"kind": "machine"},
        *(record("full", repeat, seconds) for repeat, seconds in enumerate((1, 2, 4))),
        *(record("quick", repeat, 1, note="Said once.") for repeat in range(3)),
        {"kind": "request", "engine": "e", **request("broken"), "error": "It broke."},
    ]
    console = Console(width=200)
    with console.capture() as capture:
        show(records, console)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capture.get().splitlines() if "|" in line]
    assert rows[2:] == [
        ["e full", "", "2.00 s", "", "200.0 ms", "", "1.0 MiB (25%)", "8 MiB (8 to 8)"],
        ["e quick", "0.25", "1.00 s", *["0.50x (0.25 to 1.00)", "100.0 ms", "0.50x (0.25 to 1.00)"]]
        + ["1.0 MiB (25%)", "8 MiB (8 to 8)"],
        ["e broken", "0.25", "failed", *[""] * 5],
    ]
    assert [line for line in capture.get().splitlines() if line.startswith("- ")] == [
        "- e quick: Said once.",
        "- e broken: It broke.",
    ]


def tables(results: Path) -> list[str]:
    """Rows of the tables that the records in a folder make."""
    command = [sys.executable, str(PEERS / "compare.py"), "--show", *map(str, sorted(results.glob("results/*.jsonl")))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return [line.strip() for line in shown.splitlines() if line.startswith("| ")]


def page(name: str) -> str:
    return (PEERS.parents[1] / "docs" / name).read_text(encoding="utf-8")


def test_the_comparison_of_peers_has_the_figures_of_the_results() -> None:
    rows = tables(PEERS)
    assert len(rows) > 20
    assert [row for row in rows if row not in page("peers.md")] == []


def test_the_requests_of_the_documentation_are_those_of_the_results() -> None:
    """A row for each method and budget, with the ratios of TTFT and TPOT at each number of tokens."""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in tables(PEERS.parent)]
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, budget, _, ttft, _, tpot, *_ in cells:
        if "full" not in name and ttft.endswith(("x", ")")):
            key = f"{name} {budget} {'batch' if '(' not in ttft else ''}"
            for ratios, ratio in zip(found.setdefault(key, ([], [])), (ttft, tpot), strict=True):
                ratios.append(ratio.split(" ")[0])
    assert len(found) == 5
    for ttft_ratios, tpot_ratios in found.values():
        assert f"| {' | '.join(ttft_ratios + tpot_ratios)} |" in page("performance.md")


def driver(*options: str) -> list[str]:
    sizes = ("--tokens", str(TOKENS), "--new", str(NEW), "--repeats", "1", "--threads", "1", "--json", "-")
    return [sys.executable, str(PEERS / "compare.py"), *sizes, *options]


def compared(*methods: str) -> dict[str, dict[str, Any]]:
    """Records of the driver, by engine and method; the machine's under `"machine"`."""
    done = subprocess.run(driver("--methods", ",".join(methods)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records[0]["kind"] == "machine"
    return {"machine": records[0]} | {f"{r['engine']}/{r['method']}": r for r in records[1:]}


def check_plausible(record: dict[str, Any]) -> None:
    assert "error" not in record, record["error"]
    assert 0 < record["tpot_seconds"] < record["ttft_seconds"] < record["total_seconds"]
    assert record["peak_memory_bytes"] > record["peak_above_start_bytes"] > 0


@pytest.mark.model
def test_crushkv_is_compared_with_the_full_cache() -> None:
    records = compared("crushkv/snapkv-kvcrush", "crushkv/balanced")
    assert list(records) == ["machine", "crushkv/full", "crushkv/snapkv-kvcrush", "crushkv/balanced"]
    assert set(records["machine"]["versions"]) == {"crushkv"}
    full, ours, balanced = list(records.values())[1:]
    for record in (full, ours, balanced):
        check_plausible(record)
    assert (full["budget"], ours["budget"], balanced["budget"]) == (None, 0.25, 0.25)
    assert full["kv_bytes"] == full["full_kv_bytes"]
    room = 128 / TOKENS  # until the next eviction
    assert 0.25 <= ours["kv_bytes"] / ours["full_kv_bytes"] <= 0.25 + room
    assert balanced["kv_bytes"] < ours["kv_bytes"]


@pytest.mark.model
def test_the_workers_of_transformers_and_crushkv_have_the_same_full_cache(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(list(range(1000, 1000 + TOKENS))))
    command = [sys.executable, str(PEERS / "transformers_worker.py")]
    engine = Engine("transformers", [*command, "--model", str(embedded_model_path()), "--prompt", str(prompt)], 1)
    try:
        full = engine.ask(request("full", budget=None))
        check_plausible(full)
        assert full["kv_bytes"] == full["full_kv_bytes"]
        # Its quantizer is not in this environment.
        assert "quanto" in engine.ask(request("quanto-4bit"))["error"]
    finally:
        engine.stop()


@pytest.mark.model
@pytest.mark.parametrize(
    ("engine", "methods"),
    [
        ("transformers", {"quanto-4bit": 0.25}),
        ("kvpress", {"snapkv": 0.25, "adakv-snapkv": 1.0}),
        ("openvino", {"snapkv": 0.25, "kvcrush": 0.25}),
    ],
)
def test_a_peer(engine: str, methods: dict[str, float]) -> None:
    if not (ENVIRONMENTS / engine / "bin" / "python").exists():
        pytest.skip(f"no environment for {engine}: make bench-peers makes it")
    records = compared(*(f"{engine}/{method}" for method in methods))
    assert set(records) == {"machine", f"{engine}/full", *(f"{engine}/{method}" for method in methods)}
    check_plausible(records[f"{engine}/full"])
    for method, held in methods.items():
        record = records[f"{engine}/{method}"]
        check_plausible(record)
        assert record["kv_bytes"] / record["full_kv_bytes"] == pytest.approx(held, abs=0.1)
        assert "not active" not in record.get("note", "")


@pytest.mark.model
def test_an_interrupt_ends_the_workers() -> None:
    command = driver("--methods", "crushkv")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["kind"] == "machine"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("methods", "error"),
    [
        ("other", "unknown engine other; there are crushkv"),
        ("crushkv/other", "crushkv has no method other; it has full"),
    ],
)
@pytest.mark.model
def test_unknown_names_are_said_before_anything_is_measured(methods: str, error: str) -> None:
    done = subprocess.run(driver("--methods", methods), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert error in done.stderr
    assert not done.stdout
