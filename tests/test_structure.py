"""docs/structure.md lists every module, imports go down its packages, and a source distribution has every file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "crushkv"

# From the top: a package may import those on the lines below its own, and none beside it.
LAYERS = (
    "__init__ __main__",
    "cli",
    "evaluation",
    "timing",
    "prompts",
    "hf vllm",
    "core",
    "config_text",
    "config",
    "importance kernels",
    "storage",
    "compiled presets profile rope",
    "tensor_file",
    "budget demo embedded fingerprint machine",
    "constants files later text",
    "errors _version",
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}


def imports(file: Path) -> Iterator[str]:
    """The packages and modules directly in crushkv that a file imports, anywhere in it."""
    package = file.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield from [start[0]] if start[0] else [name.name for name in node.names]


def test_the_list_of_modules_is_true() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `([\w/]+\.py)`: \S", page, re.MULTILINE)
    modules = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if not path.name.startswith("_")}
    assert sorted(listed) == sorted(modules), "bring docs/structure.md up to date"


def test_the_life_of_a_request_names_files() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", page)
    assert len(named) > 100
    for name in named:
        assert (SOURCE / name).exists(), name


def test_imports_go_down() -> None:
    found = set()
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).with_suffix("").parts[0]
        for imported in imports(file):
            if imported != name:
                found.add((name, imported))
                assert LAYER[imported] > LAYER[name], f"{file.relative_to(ROOT)} imports {imported}"
    assert len(found) > 80 and ("hf", "core") in found


def test_a_source_distribution_has_every_file(tmp_path: Path) -> None:
    """Those who build from it run the tests, too, which read documentation, benchmarks and examples."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of files")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    copy = tmp_path / "copy"
    for name in listed:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(ROOT / name, copy / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert {name for name in listed if not name.startswith(".")} <= packed
