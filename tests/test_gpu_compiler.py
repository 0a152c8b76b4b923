"""The GPU's kernels, made by Triton's compiler for GPUs that are not here: what its interpreter does not see.

The interpreter runs Triton's operations one by one. It checks neither what the compiler refuses, nor PTX, nor whether
what a program holds fits into registers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crushkv.presets import PRESETS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compiled(folder: Path, *options: str) -> dict[str, Any]:
    """What `benchmarks/gpu_code.py` finds. Nothing is taken from a cache."""
    command = [sys.executable, "benchmarks/gpu_code.py", "--json", *options]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Warning" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any], presets: list[str]) -> None:
    assert {row["preset"] for row in found["rows"]} == set(presets)
    assert {row["together"] for row in found["rows"]} == {False, True}
    assert {"_coordinates", "_sums", "_range_codes", "_pack", "prepare_queries", "merge"} <= set(found["others"])
    narrow = tuple(map(int, found["triton"].split(".")[:2])) >= (3, 5)
    for row in found["rows"]:
        assert row["instructions"] is None or 300 < row["instructions"] < 3000
        if narrow and row["columns"] == 8:
            # With 8 bits, registers are short: that ranges are read ahead gains more on an H100 than it costs.
            assert row["registers"] <= 168 and row["KiB"] <= 75, row
            assert row["instructions"] is None or row["spills"] <= (60 if row["keys"] == 8 else 0), row


def test_an_h100_runs_three_programs_at_a_time(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--preset", "balanced")
    check(found, ["balanced"])
    assert all(row["instructions"] for row in found["rows"])
    assert {"_channel_codes", "_spread_errors"} <= set(found["others"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shape", "presets"),
    [(80, "llama-8b", list(PRESETS)), (100, "qwen-7b", ["small"]), (120, "smollm2", ["small"])],
)
def test_other_gpus_and_models(capability: int, shape: str, presets: list[str], tmp_path: Path) -> None:
    given = ["--capability", str(capability), "--shape", shape, "--preset", *presets]
    check(compiled(tmp_path, *given), presets)
