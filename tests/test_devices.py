"""A cache lives where its model computes, and a decoded token waits for nothing: seen on a device that is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.utils.backend_registration")
pytestmark = pytest.mark.slow  # half a minute of one core
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def noted() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/fake_device.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_no_operation_mixes_devices(noted: dict[str, Any]) -> None:
    assert {name: of["mixed"] for name, of in noted.items()} == {name: {} for name in noted}


def test_a_decoded_token_waits_for_nothing(noted: dict[str, Any]) -> None:
    """A GPU would stand still at each, once for each layer and token."""
    assert {name: of["decoding"] for name, of in noted.items()} == {name: {} for name in noted}


@pytest.mark.parametrize("stage", ["prompt", "eviction"])
def test_compressing_waits_for_what_was_asked_for_long_before(noted: dict[str, Any], stage: str) -> None:
    """A test that saw no wait at all would see nothing. Widths that no profile has foreseen are asked for at once."""
    for name, of in noted.items():
        places = {place.partition(":")[0] for place in of[stage]}
        assert "later.py" in places and places <= {"later.py", "storage/tiered.py"}, (name, of[stage])
