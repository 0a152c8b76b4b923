"""Speed and memory of crushkv beside its peers: the same prompts in one run, each engine in a process of its own.

    make bench-peers                                          # or, where the environments of the peers are:
    python benchmarks/peers/compare.py --tokens 4096,8192 --json results.jsonl
    python benchmarks/peers/compare.py --show results.jsonl   # the table of an earlier run

All methods of all engines take turns. Each is compared with the full cache of its own engine. An engine or a method
that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from crushkv.embedded import DISTRIBUTION, embedded_model_path
from crushkv.machine import cpu
from crushkv.timing import FULL, repeated_prompt
from engine import Engine, Record
from process import WorkerError
from summary import show
from worker import ROW_OFFSET

HERE = Path(__file__).parent
TURNS = 3  # repeats until the order of the methods comes round again
ENVIRONMENTS = HERE.parents[1] / ".venv-peers"


def main() -> None:
    given = options()
    if given.show:
        show([json.loads(line) for path in given.show for line in path.read_text().splitlines()], console(sys.stdout))
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        prompt = Path(folder) / "prompt.json"
        prompt.write_text(json.dumps(prompt_ids(max(given.tokens) + ROW_OFFSET * given.batch)))
        started = engines(prompt, given.threads)
        for engine in started.values():
            stack.callback(engine.stop)
        output = None
        if given.json:
            output = sys.stdout if given.json == "-" else stack.enter_context(open(given.json, "a"))
        records = []
        for record in compare(started, given):
            records.append(record)
            if output:
                print(json.dumps(record), file=output, flush=True)
            print(line(record), file=sys.stderr, flush=True)
    if given.json != "-":
        show(records, console(sys.stdout))


def options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def fractions(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=numbers, default=[4096, 8192], help="prompt lengths")
    parser.add_argument("--budgets", type=fractions, default=[0.25], help="fractions of the tokens that are kept")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first-repeat", type=int, default=0, help="its number, to add to the file of an earlier run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=[], help="engines, or ENGINE/METHOD; default: all"
    )
    parser.add_argument("--json", metavar="FILE", help="add the records to it; - for stdout, without the table")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="measure nothing: show these records")
    return parser.parse_args()


def prompt_ids(least: int) -> list[int]:
    ids: list[int] = repeated_prompt(AutoTokenizer.from_pretrained(embedded_model_path()), least)[0].tolist()
    return ids


def engines(prompt: Path, threads: int) -> dict[str, Engine]:
    """crushkv runs in this environment, each peer in one of its own."""
    model = embedded_model_path()
    # OpenVINO reads the file that the model was converted from.
    gguf = next(file.locate() for file in metadata.files(DISTRIBUTION) or () if file.suffix == ".gguf")
    pythons = {"crushkv": Path(sys.executable)} | {
        peer: ENVIRONMENTS / peer / "bin" / "python" for peer in ("transformers", "kvpress", "openvino")
    }
    return {
        name: Engine(
            name,
            [
                *(str(python), str(HERE / f"{name}_worker.py")),
                *("--model", str(gguf if name == "openvino" else model), "--prompt", str(prompt)),
            ],
            threads,
        )
        for name, python in pythons.items()
    }


def compare(engines: Mapping[str, Engine], given: argparse.Namespace) -> Iterator[Record]:
    """First what the machine is, then a record for each request; see the workers for its fields."""
    wanted = {entry.partition("/")[0] for entry in given.methods} or set(engines)
    if unknown := wanted - set(engines):
        raise SystemExit(f"error: unknown engine {', '.join(sorted(unknown))}; there are {', '.join(engines)}")
    versions: dict[str, Mapping[str, str]] = {}
    failed: list[Record] = []
    methods: list[tuple[Engine, str, float | str | None]] = []
    for name in [name for name in engines if name in wanted]:
        try:
            worker = engines[name].start()
        except WorkerError as error:
            failed.append({"kind": "request", "engine": name, "method": "*", "budget": None, "error": str(error)})
            continue
        versions[name] = worker.versions
        methods += [
            (engines[name], method, worker.methods[method]) for method in chosen(name, worker.methods, given.methods)
        ]
    yield {"kind": "machine", **machine(), "threads": given.threads, "versions": versions}
    for tokens in given.tokens:
        size = {"tokens": tokens, "batch": given.batch, "new_tokens": given.new}
        for repeat in range(given.first_repeat, given.first_repeat + given.repeats):
            yield from ({**record, **size, "repeat": repeat} for record in failed)
            first = repeat * len(methods) // TURNS % max(1, len(methods))  # none is always the first
            for engine, method, budget in methods[first:] + methods[:first]:
                for share in given.budgets if budget == "any" else [budget]:
                    yield engine.ask({"method": method, "budget": share, **size, "repeat": repeat})


def chosen(engine: str, offered: Mapping[str, Any], entries: Sequence[str]) -> list[str]:
    """The methods of an engine that are to run: its full cache in any case."""
    if not entries or engine in entries:
        return list(offered)
    named = [entry.partition("/")[2] for entry in entries if entry.startswith(f"{engine}/")]
    if unknown := set(named) - set(offered):
        raise SystemExit(f"error: {engine} has no method {', '.join(sorted(unknown))}; it has {', '.join(offered)}")
    return [method for method in offered if method == FULL or method in named]


def machine() -> Record:
    name, cores = cpu()
    return {"cpu": name, "cores": cores}


def line(record: Record) -> str:
    """What is shown of a record while the comparison runs."""
    if record["kind"] == "machine":
        return f"{record['cpu']}, {record['threads']} threads; {', '.join(record['versions'])}"
    name = f"{record['tokens']} tokens, repeat {record['repeat']}: {record['engine']} {record['method']}"
    if "error" in record:
        return f"{name}: {record['error']}"
    return f"{name}: TTFT {record['ttft_seconds']:.2f} s, TPOT {1000 * (record['tpot_seconds'] or 0):.1f} ms"


def console(file: Any) -> Console:
    # Without a terminal there is no width that a table has to fit.
    return Console(file=file) if file.isatty() else Console(file=file, width=200)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
