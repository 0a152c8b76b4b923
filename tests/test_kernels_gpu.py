"""Runs `kernels_gpu_cases.py` in a process of its own, where no CUDA device is there with Triton's interpreter.

Triton reads at its import whether it interprets, and what runs in this process would choose these kernels from then on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crushkv.kernels import available

CASES = Path(__file__).with_name("kernels_gpu_cases.py")


def run(*options: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout)


@pytest.fixture(autouse=True)
def triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")


def test_they_agree_with_the_plain_kernels() -> None:
    # A device is quick.
    run(*(["-m", ""] if torch.cuda.is_available() else []))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the test above runs all cases on a device")
def test_all_cases_agree() -> None:
    run("-m", "slow")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_they_say_so() -> None:
    assert available()["gpu"] == "there is no CUDA device"
