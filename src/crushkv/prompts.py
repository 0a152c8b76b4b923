"""How text becomes tokens, through the chat template or not, and how tokens become a cache."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.cache_utils import Cache


def encode(tokenizer: Any, text: str, chat: bool | None = None, system: str | None = None) -> Tensor:
    """A prompt as token ids `[1, S]`.

    Args:
        chat: whether the text goes through the tokenizer's chat template. None uses the template if there is one.
        system: the system message that comes before the text. It needs the chat template.

    Raises:
        ConfigError: the tokenizer has no chat template, or its template refuses the messages.
    """
    text, special = render(tokenizer, text, chat, system)
    return _ids(tokenizer, text, special)


def render(tokenizer: Any, text: str, chat: bool | None, system: str | None) -> tuple[str, bool]:
    """The text that is tokenized, and whether the tokenizer has to add its special tokens to it.

    A chat template writes the special tokens itself. See `encode` for the arguments and the errors.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("--chat: the tokenizer of this model has no chat template; use --no-chat")
    uses_chat = has_template if chat is None else chat
    if system is not None and not uses_chat:
        why = "--no-chat leaves it out" if has_template else "the tokenizer of this model has none"
        raise ConfigError(f"--system: needs the chat template, and {why}")
    if not uses_chat:
        return text, True
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), False
    except Exception as error:  # a template raises errors of any type, for example for roles that it does not know
        option = "--chat" if system is None else "--system"
        reason = one_line(str(error))
        raise ConfigError(f"{option}: the chat template of this model refuses the messages: {reason}") from error


def _ids(tokenizer: Any, text: str, special: bool) -> Tensor:
    ids: Tensor = tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False)["input_ids"]
    return ids


@dataclass(frozen=True)
class Frame:
    """The prompt around a document and a question that is asked later.

    Attributes:
        before: the prompt up to where the question begins, the document included.
        after: the text between the end of the question and the answer.
        chat: `before` and `after` come from the chat template, which writes the special tokens itself.
    """

    before: str
    after: str
    chat: bool

    def document_ids(self, tokenizer: Any) -> Tensor:
        """Token ids `[1, S]` of the document and what stands before it."""
        return _ids(tokenizer, self.before, special=not self.chat)

    @staticmethod
    def question_ids(tokenizer: Any, question: str, after: str) -> Tensor:
        """Token ids `[1, T]` of the question and what stands after it."""
        return _ids(tokenizer, question + after, special=False)


def frame(tokenizer: Any, document: str, chat: bool | None = None, system: str | None = None) -> Frame:
    """The document as the first part of a user's message. The question will be its second part.

    Raises:
        ConfigError: as `encode`, or the chat template changes the text that it is given.
    """
    mark = uuid.uuid4().hex  # stands where the question will be
    text, special = render(tokenizer, f"{document.strip()}\n\n{mark}", chat, system)
    if special:
        return Frame(f"{document.strip()}\n\nQuestion: ", "\nAnswer:", chat=False)
    before, found, after = text.partition(mark)
    if not found:
        raise ConfigError("--chat: the chat template of this model changes its messages; use --no-chat")
    return Frame(before, after, chat=True)


def read_prompt(model: Any, ids: Tensor, cache: Cache, chunk: int | None = None) -> Tensor:
    """Reads a prompt `[B, S]` into an empty cache, and returns the logits `[B, 1, V]` behind it.

    Args:
        chunk: read the prompt in pieces of this many tokens. None reads it in one pass.
    """
    import torch

    from .hf import CrushCache
    from .hf.interface import passed

    tokens = ids.shape[1]
    if isinstance(cache, CrushCache):
        cache.prefill_end = tokens
    with torch.no_grad():
        for part in ids.to(model.device).split(chunk or tokens, dim=1):
            output = model(input_ids=part, **passed(cache), logits_to_keep=1)
    if isinstance(cache, CrushCache):
        cache.prefill_end = None
    logits: Tensor = output.logits
    return logits
