"""The tables of docs/accuracy.md are those that the committed results give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "accuracy" / "tables.py"


def printed(*names: str) -> list[str]:
    """The tables that the script prints, each with its title."""
    done = subprocess.run([sys.executable, str(SCRIPT), *names], capture_output=True, text=True, check=True)
    return [table.strip() for table in done.stdout.split("### ")[1:]]


def test_the_documentation_has_the_figures_of_the_results() -> None:
    tables = printed()
    assert len(tables) >= 10
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for table in tables:
        assert table in page, table.splitlines()[0]


def test_the_details_are_printed_when_asked_for() -> None:
    assert len(printed("--details")) >= 22


def test_the_readme_has_the_presets_in_short() -> None:
    (table,) = printed("presets")
    assert table.split("\n\n", 1)[1] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        printed("prestes")
    assert refused.value.returncode == 2 and "known: presets" in refused.value.stderr
