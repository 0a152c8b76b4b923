"""Prompts of any length, for which only the length counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..demo import document


def repeated_prompt(tokenizer: Any, tokens: int, batch: int = 1) -> Tensor:
    """The bundled document, repeated as often as it takes: int64 `[batch, tokens]`.

    Each row begins at another place of it.
    """
    ids = tokenizer(document())["input_ids"]
    starts = [row * len(ids) // batch for row in range(batch)]
    return torch.tensor([[ids[(start + i) % len(ids)] for i in range(tokens)] for start in starts])
