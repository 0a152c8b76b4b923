"""The tokens of a prompt, each with its piece of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..prompts import render


@dataclass(frozen=True)
class TokenText:
    """Token ids `[1, S]` and S pieces of text.

    A piece is a slice of the prompt, and all pieces joined are the prompt. If several tokens make one character, the
    first has the character, and the others are empty. The piece of a token that the tokenizer adds is its name.
    """

    ids: Tensor
    pieces: tuple[str, ...]


def tokenize(tokenizer: Any, text: str, chat: bool | None = None, system: str | None = None) -> TokenText:
    """The tokens of a prompt.

    Args:
        chat: whether the text goes through the tokenizer's chat template; None: where it has one.
        system: the system message before it; only with the chat template.
    """
    text, special = render(tokenizer, text, chat, system)
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=special, return_offsets_mapping=fast)
    ids = encoded["input_ids"]
    if fast:
        pieces = _slices(tokenizer, text, ids[0].tolist(), encoded["offset_mapping"][0].tolist())
    else:
        # Only fast tokenizers tell which part of the text a token is.
        pieces = [tokenizer.decode([token]) for token in ids[0].tolist()]
    return TokenText(ids, tuple(pieces))


def _slices(tokenizer: Any, text: str, ids: list[int], offsets: list[list[int]]) -> list[str]:
    added = set(tokenizer.all_special_ids)
    pieces, shown = [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start == end and token in added:
            pieces.append(tokenizer.convert_ids_to_tokens(token))
            continue
        # From where the last piece ended: some tokenizers leave white space out of their offsets.
        pieces.append(text[shown:end])
        shown = max(shown, end)
    return pieces
