"""The bundled document and the questions over it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from ..errors import ConfigError


@dataclass(frozen=True)
class Question:
    """A question with the prompt that asks it.

    accept: lowercase texts; an answer that has one of them is correct.
    """

    question: str
    prompt: str
    answer: str
    accept: tuple[str, ...]

    def is_answered_by(self, text: str) -> bool:
        return any(part in text.lower() for part in self.accept)


def load_questions(count: int) -> list[Question]:
    """The first `count` questions.

    Raises:
        ConfigError: there are fewer.
    """
    demo = files("crushkv") / "demo"
    document = (demo / "document.txt").read_text(encoding="utf-8")
    bundled = json.loads((demo / "questions.json").read_text(encoding="utf-8"))
    entries = bundled["questions"]
    if count > len(entries):
        raise ConfigError(f"--questions {count}: there are {len(entries)}")
    return [
        Question(
            question=entry["question"],
            # The question first: the document is the longer text, and may contain any other.
            prompt=bundled["template"].replace("{question}", entry["question"]).replace("{document}", document),
            answer=entry["answer"],
            accept=tuple(entry["accept"]),
        )
        for entry in entries[:count]
    ]
