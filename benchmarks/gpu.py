"""Time and memory on a GPU, in one run that needs no network and no model files.

    python benchmarks/gpu.py [-o FOLDER] [--minutes 8] [--lengths 8192 32768 65536] [--batches 1 8]
        [--without-tests] [--tiny]

Three sections: the kernels that attend to packed tokens, against PyTorch's attention over all tokens in 16 bits; whole
requests of a model of Llama-3.1-8B's shape with random weights, each preset against Transformers' full cache; and the
tests that need a GPU. Rows are printed as they come, and FOLDER/gpu.json is written anew after each, so that a run that
is cut off leaves its results. `--tiny` runs the same code with a tiny model on whatever is there, in seconds.

Transformers' full cache copies itself for each decoded token, which is a part of its time. While decoding, it
attends without cuDNN, which makes a plan for each new number of tokens; `tpot_with_cudnn_seconds` is its time with it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crushkv import CrushConfig, kernels
from crushkv.presets import PRESETS
from crushkv.timing import FULL
from gpu_kernels import Layer, copy_bandwidth, rows
from gpu_model import (
    LLAMA_8B,
    METHODS,
    TINY,
    Request,
    failed,
    least_bytes,
    measured,
    operations,
    random_model,
    with_profile,
    write_profile,
)
from gpu_report import RATIOS, Clock, Report, console, kernel_table, request_table, say, size_of
from subject import machine

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_kernels_gpu.py", "tests/test_on_gpu.py")
# What is most wanted comes first: a run may have no time for all of it.
ORDER = ((32768, 1), (8192, 1), (8192, 8), (65536, 1), (32768, 8), (65536, 8))
KERNELS_SHARE = 0.25  # of the time, at most
TEST_SECONDS = 60.0  # kept for the tests
GIB = 2**30


def sizes(lengths: Sequence[int], batches: Sequence[int]) -> list[tuple[int, int]]:
    """Lengths and batches, the most wanted first."""
    asked = [(tokens, batch) for tokens in lengths for batch in batches]
    known = [pair for pair in ORDER if pair in asked]
    return known + sorted((pair for pair in asked if pair not in known), key=lambda pair: pair[0] * pair[1])


# Kernels


def measure_kernels(report: Report, clock: Clock, shape: dict[str, Any], asked: list[tuple[int, int]]) -> None:
    device = _device()
    bandwidth = copy_bandwidth(device)
    names = {name: missing or "can run" for name, missing in kernels.available().items()}
    report.note(copy_bandwidth=bandwidth, implementations=names, chosen=kernels.chosen(device))
    say(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s; kernels: {names}; chosen: {kernels.chosen(device)}")
    configs = {name: CrushConfig.preset(name) for name in PRESETS}
    end = clock.passed + KERNELS_SHARE * clock.left
    for tokens, batch in asked:
        if clock.passed > end:
            say(f"kernels, {tokens} x {batch}: skipped, their part of the time is over")
            continue
        layer = Layer(shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"], tokens, batch)
        start = clock.passed
        try:
            for row in rows(layer, configs, device, bandwidth):
                report.add("kernels", row)
        except torch.OutOfMemoryError:
            report.add("kernels", {"tokens": tokens, "batch": batch, "method": "the rest", "error": "out of memory"})
        _give_back()
        say(f"kernels, {tokens} x {batch}: {clock.passed - start:.1f} s")
    console.print(kernel_table(report.found["kernels"]))


# Whole requests


def measure_requests(
    report: Report,
    clock: Clock,
    shape: dict[str, Any],
    asked: list[tuple[int, int]],
    new_tokens: int,
    kept_seconds: float,
) -> None:
    start = clock.passed
    model = random_model(shape, _device())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    say(f"model of {weights / GIB:.2f} GiB: {clock.passed - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        profile = write_profile(model, Path(folder))
        methods = {name: with_profile(config, profile) for name, config in METHODS.items()}
        shortest = min(tokens for tokens, _ in asked)
        for name, config in methods.items():  # prepares libraries, and compiles kernels for each format
            measured(model, Request(min(1024, shortest), 1, 1), name, config)
        say(f"profile and warm-up: {clock.passed - start:.1f} s")
        fastest = 0.0  # operations a second, of the fastest request so far
        for tokens, batch in asked:
            request = Request(tokens, batch, new_tokens)
            full: dict[str, Any] | None = None
            if why_not(model.config, request, None, weights, 0.0, clock.left - kept_seconds) is None:
                measured(model, Request(tokens, batch, 1), FULL, None)  # the first one of a size prepares its attention
            for name, config in methods.items():
                begin = clock.passed
                least = operations(model.config, request) / fastest if fastest else 0.0
                reason = why_not(model.config, request, config, weights, least, clock.left - kept_seconds)
                row = failed(request, name, config, reason) if reason else measured(model, request, name, config)
                took = clock.passed - begin
                if row["error"] is None:
                    fastest = max(fastest, operations(model.config, request) / took)
                    full = row if name == FULL else full
                row |= {"ratios": ratios(row, full), "took_seconds": took}
                report.add("requests", row)
                say(f"[{clock.passed:4.0f} s] {tokens} x {batch}, {name}: {row['error'] or 'done'}, {took:.1f} s")
            console.print(request_table([row for row in report.found["requests"] if size_of(row) == (tokens, batch)]))
            if full is not None and (slow := full["tpot_with_cudnn_seconds"]) is not None:
                say(f"the full cache takes {1000 * slow:.1f} ms a token where PyTorch attends with cuDNN")
    waits = {row["method"]: row["synchronisations"] for row in report.found["requests"] if row.get("synchronisations")}
    if waits:
        say("where a decoded token makes the host wait for the GPU, of the last size:")
        for name, places in waits.items():
            say(f"  {name}: {places}")


def why_not(
    model_config: Any, request: Request, config: CrushConfig | None, weights: int, least_seconds: float, left: float
) -> str | None:
    """Why a request is not tried: by arithmetic it cannot fit, or it would not end in time. None: it is tried."""
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
        budget = 1.0 if config is None else float(config.budget)
        if (needed := least_bytes(model_config, request, budget, weights)) > there:
            return f"skipped: needs {needed / GIB:.0f} GiB at the least, of {there / GIB:.0f}"
    if left <= 0:
        return "skipped: no time is left"
    if least_seconds > left:
        return f"skipped: would take {least_seconds:.0f} s at the least, and {left:.0f} are left"
    return None


def ratios(row: dict[str, Any], full: dict[str, Any] | None) -> dict[str, float]:
    """A row's figures by those of the full cache of the same length and batch, where both are there."""
    if full is None:
        return {}
    return {name: row[name] / full[name] for name in RATIOS if row.get(name) is not None and full.get(name)}


# Tests


def run_tests(report: Report, clock: Clock) -> None:
    """Those that need a GPU, in a process of their own."""
    there = [name for name in TESTS if (ROOT / name).exists()]
    reason = None
    if not there:
        reason = "there are none"
    elif importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed"
    elif clock.left < 10:
        reason = "no time is left"
    if reason is not None:
        report.note(tests={"error": f"skipped: {reason}"})
        return say(f"tests: skipped, {reason}")
    start = clock.passed
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *there]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=clock.left,
        )
        lines = done.stdout.strip().splitlines()
        found: dict[str, Any] = {"error": None, "status": done.returncode, "summary": lines[-1] if lines else ""}
        found["output"] = done.stdout[-20_000:] if done.returncode else ""
        console.print("\n".join(lines[-40:] if done.returncode else lines[-1:]), markup=False)
    except subprocess.TimeoutExpired:
        found = {"error": "out of time"}
    report.note(tests={"files": there, "took_seconds": clock.passed - start, **found})
    say(f"tests: {found.get('summary', found['error'])}")


# The run


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _give_back() -> None:
    """What is not used any more goes back to the GPU, for what needs much of it next."""
    gc.collect()
    torch.cuda.empty_cache()


def about() -> dict[str, Any]:
    """The machine, and the versions that a figure depends on."""
    triton = importlib.util.find_spec("triton")
    found = machine() | {"cuda": torch.version.cuda, "triton": None}
    if triton is not None:
        found["triton"] = importlib.import_module("triton").__version__
    if torch.cuda.is_available():
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def part(report: Report, name: str, run: Callable[[], None]) -> None:
    """Runs a section. One that fails must not take the others with it: what went wrong is printed, and kept."""
    try:
        run()
    except Exception as error:
        report.note(**{f"{name}_failed": f"{type(error).__name__}: {error}"})
        console.print_exception()
    _give_back()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu"), metavar="FOLDER", help="where gpu.json goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="of prompts, in tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=None, help="prompts at a time")
    parser.add_argument("--without-tests", action="store_true", help="measure only")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here (--tiny runs anywhere)")
    clock = Clock(given.minutes)
    shape = TINY if given.tiny else LLAMA_8B
    lengths = given.lengths or ([512] if given.tiny else [8192, 32768, 65536])
    asked = sizes(lengths, given.batches or ([1, 2] if given.tiny else [1, 8]))
    report = Report(given.output, clock)
    report.note(machine=about(), shape=shape)
    say(json.dumps(report.found["machine"]))
    part(report, "kernels", lambda: measure_kernels(report, clock, shape, asked))
    tests = not given.tiny and not given.without_tests
    kept, new_tokens = TEST_SECONDS if tests else 0.0, 4 if given.tiny else 24
    part(report, "requests", lambda: measure_requests(report, clock, shape, asked, new_tokens, kept))
    if tests:
        part(report, "tests", lambda: run_tests(report, clock))
    say(f"{report.path}: {clock.passed:.0f} s in all")
    if any(key.endswith("_failed") for key in report.found):
        sys.exit(1)


if __name__ == "__main__":
    main()
