"""docs/structure.md lists every module, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "crushkv"


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
