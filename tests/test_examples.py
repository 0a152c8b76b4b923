"""The examples, and the code of the README, run as they stand."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples" / "long_document.ipynb"


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


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@pytest.mark.model
@pytest.mark.slow
def test_the_notebook_runs() -> None:
    """Its cells one after the other, in a process of their own."""
    code = ["".join(cell["source"]) for cell in cells(NOTEBOOK) if cell["cell_type"] == "code"]
    checks = (
        "print(len(answers), [question.is_answered_by(answer) for question, answer in zip(questions, answers)])",
        "print(f'{report.bytes_fraction:.3f}', [len(line.get_xdata()) for line in axis.lines])",
    )
    shown = run("-c", "\n".join(["import matplotlib", "matplotlib.use('Agg')", *code, *checks])).splitlines()
    assert shown[-2] == "3 [True, True, True]"
    fraction, *lines = shown[-1].split(maxsplit=1)
    assert 0.2 < float(fraction) <= 0.25
    assert json.loads(lines[0]) == [16] * 5 + [1], "a line for the full cache and each preset, and what was measured"


def test_the_notebook_shows_its_answers_and_its_plot() -> None:
    """As committed: who reads it without running it sees them."""
    outputs = [output for cell in cells(NOTEBOOK) for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "% of the full cache's" in text and "Irma" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_example_is_explained() -> None:
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_policy_of_the_documentation_is_that_of_the_example() -> None:
    page = (ROOT / "docs" / "own-policy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code in (ROOT / "examples" / "own_policy.py").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
