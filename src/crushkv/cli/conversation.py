"""A document and, later, a question about it: one prompt in two pieces."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .prompts import apply_chat, uses_chat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Frame:
    """What stands around a document and a question.

    Attributes:
        before: the prompt up to where the question begins, the document included.
        after: from the end of the question to where the answer begins.
        chat: both come from the chat template, which writes its special tokens itself.
    """

    before: str
    after: str
    chat: bool

    def document_ids(self, tokenizer: Any) -> torch.Tensor:
        """Token ids `[1, S]`."""
        ids: torch.Tensor = tokenizer(
            self.before, return_tensors="pt", add_special_tokens=not self.chat, verbose=False
        ).input_ids
        return ids

    @staticmethod
    def question_ids(tokenizer: Any, question: str, after: str) -> torch.Tensor:
        """Token ids `[1, T]` of what follows the document."""
        ids: torch.Tensor = tokenizer(question + after, return_tensors="pt", add_special_tokens=False).input_ids
        return ids


def frame(tokenizer: Any, document: str, chat: bool | None, system: str | None) -> Frame:
    """The document as the first part of a user's message, with the question to come behind it.

    Args:
        chat: through the tokenizer's chat template; None: where it has one.
        system: the system message; only with the chat template.

    Raises:
        ConfigError: the tokenizer has no chat template, or it changes what it is given.
    """
    if not uses_chat(tokenizer, chat, system):
        return Frame(f"{document.strip()}\n\nQuestion: ", "\nAnswer:", chat=False)
    mark = uuid.uuid4().hex  # where the question will stand
    text = apply_chat(tokenizer, f"{document.strip()}\n\n{mark}", system, tokenize=False)
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("--chat: the chat template of this model changes its messages; use --no-chat")
    return Frame(before, after, chat=True)
