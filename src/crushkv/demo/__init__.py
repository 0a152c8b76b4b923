"""A document in the public domain, and questions over it, with which the package shows itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

__all__ = ["Question", "document", "load_questions"]


@dataclass(frozen=True)
class Question:
    """A question with the prompt that asks it. An answer is correct if it contains one of the texts in `accept`."""

    question: str
    prompt: str
    answer: str
    accept: tuple[str, ...]

    def is_answered_by(self, text: str) -> bool:
        return any(part in text.lower() for part in self.accept)


def document() -> str:
    """The text of the bundled document, about 6,600 tokens."""
    return _read("document.txt")


def load_questions(count: int) -> list[Question]:
    """The first `count` questions.

    Raises:
        ConfigError: there are fewer.
    """
    bundled: dict[str, Any] = json.loads(_read("questions.json"))
    entries = bundled["questions"]
    if count > len(entries):
        raise ConfigError(f"--questions {count}: accepted are at most {len(entries)}")
    text = document()
    return [
        Question(
            question=entry["question"],
            # The question goes in first: the document is the longer text, and could contain the other mark.
            prompt=bundled["template"].replace("{question}", entry["question"]).replace("{document}", text),
            answer=entry["answer"],
            accept=tuple(entry["accept"]),
        )
        for entry in entries[:count]
    ]


def _read(name: str) -> str:
    from importlib.resources import files

    return (files(__name__) / name).read_text(encoding="utf-8")
