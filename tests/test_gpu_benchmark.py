"""`benchmarks/gpu.py` runs where there is no GPU, with a tiny model: the same code, so that a GPU finds it working."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crushkv.presets import PRESETS

pytestmark = pytest.mark.slow  # half a minute of one core
ROOT = Path(__file__).parents[1]
SIZES = [(512, 1), (512, 2)]
RATIOS = ("ttft_seconds", "tpot_seconds", "kv_bytes", "memory_bytes", "peak_above_start_bytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What is printed, and gpu.json."""
    folder = tmp_path_factory.mktemp("gpu")
    return started(folder), json.loads((folder / "gpu.json").read_text())


def started(folder: Path, *options: str) -> str:
    """Runs it, and returns what it prints."""
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "-o", str(folder), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "60"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_preset_is_measured_at_each_size(run: tuple[str, dict[str, Any]]) -> None:
    _, found = run
    assert {"device", "torch", "transformers", "crushkv", "cuda", "triton"} <= set(found["machine"])
    rows = {(row["tokens"], row["batch"], row["method"]): row for row in found["requests"]}
    assert len(rows) == len(found["requests"]) == len(SIZES) * (len(PRESETS) + 2)
    for tokens, batch in SIZES:
        full = rows[tokens, batch, "full"]
        assert full["error"] is None
        assert full["kv_bytes"] == full["full_kv_bytes"]
        for name in [*PRESETS, "quarter in 16 bits"]:
            row = rows[tokens, batch, name]
            assert row["error"] is None
            assert row["kv_bytes"] < 0.55 * full["kv_bytes"]
            assert row["memory_bytes"] < full["memory_bytes"]
            assert row["new_tokens"] == full["new_tokens"] == 4
            assert 0 < row["tpot_least"] <= row["tpot_seconds"] <= row["tpot_most"]
            for ratio in RATIOS:
                if full[ratio] is not None:
                    assert row["ratios"][ratio] == pytest.approx(row[ratio] / full[ratio])
    held = [rows[512, 1, name]["kv_bytes"] for name in ("tiny", "small", "balanced", "safe", "full")]
    assert held == sorted(held)


def test_each_kernel_is_compared_over_each_format(run: tuple[str, dict[str, Any]]) -> None:
    _, found = run
    assert found["copy_bandwidth"] > 0
    usable = [name for name, state in found["implementations"].items() if state == "can run"]
    assert found["chosen"] in usable
    rows = [row for row in found["kernels"] if row["error"] is None]
    for tokens, batch in SIZES:
        of_size = [row for row in rows if (row["tokens"], row["batch"]) == (tokens, batch)]
        (baseline,) = (row for row in of_size if row["implementation"] == "sdpa")
        assert {row["method"] for row in of_size if row["implementation"] == "plain"} == set(PRESETS)
        for row in of_size:
            assert row["speedup"] == pytest.approx(baseline["seconds"] / row["seconds"])
            assert row["of_copy"] == pytest.approx(row["bytes"] / row["seconds"] / found["copy_bandwidth"])
            if row is not baseline:
                assert row["bytes"] < baseline["bytes"]
                assert row["relative_error"] < 1e-2
                assert math.isfinite(row["relative_error"])


def test_tables_are_printed_whole(run: tuple[str, dict[str, Any]]) -> None:
    """Behind a pipe, too: no column is cut off."""
    printed, found = run
    assert "…" not in printed
    for row in found["requests"]:
        assert f"{row['tokens']} x {row['batch']}, {row['method']}: done" in printed
    for word in ("TTFT", "TPOT", "allocated", "peak above weights", "of copy", "speed-up"):
        assert word in printed


def test_a_run_without_time_says_what_it_skipped(tmp_path: Path) -> None:
    started(tmp_path, "--minutes", "0.01", "--batches", "1")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert next(row["method"] for row in found["requests"]) == "full"
    assert all(row["error"] == "skipped: no time is left" for row in found["requests"])
