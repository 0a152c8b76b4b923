"""The tables of docs/accuracy.md are those that the committed results give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "least", "first_in_readme"),
    [("tables.py", 8, False), ("format_tables.py", 5, False), ("preset_tables.py", 5, True)],
)
def test_the_documentation_has_the_figures_of_the_results(script: str, least: int, first_in_readme: bool) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy" / script)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    tables = [table.strip() for table in printed.split("### ")[1:]]
    assert len(tables) >= least
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for table in tables:
        assert table in page, table.splitlines()[0]
    if first_in_readme:
        rows = tables[0].split("\n\n", 1)[1]
        assert rows in (ROOT / "README.md").read_text(encoding="utf-8")
