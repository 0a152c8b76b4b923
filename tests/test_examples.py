"""The examples, and the code of the README, run as they stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.model
@pytest.mark.parametrize("example", [path for path in EXAMPLES if "vllm" not in path.name], ids=lambda path: path.stem)
def test_an_example_runs(example: Path) -> None:
    shown = run(str(example))
    part = re.search(r"([\d.]+)% of the full cache's", shown)
    assert part is not None, shown
    assert float(part[1]) < 60, "the cache was compressed"
    assert len(shown.splitlines()) >= 4, "an answer stands beside the report"


@pytest.mark.model
def test_the_code_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = run("-c", code)
    assert "red ship" in shown and "% of the full cache's" in shown


def test_every_example_is_explained() -> None:
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_links_lead_to_files() -> None:
    """Links of the README and of `docs` to files beside them."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
