"""Greedy answers of many caches of one prompt, decoded as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..hf.interface import passed
from .recording import Recording


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer, as `generate` has them."""
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset([stop] if isinstance(stop, int) else stop or [])


@dataclass(frozen=True)
class Ending:
    """An answer ends before the first of the strings in `until`, at an end token, or after `max_tokens`."""

    max_tokens: int
    until: tuple[str, ...] = ()

    def reached(self, tokenizer: Any, answer: Sequence[int]) -> bool:
        if len(answer) >= self.max_tokens:
            return True
        return bool(self.until) and any(end in _text(tokenizer, answer) for end in self.until)

    def cut(self, text: str) -> str:
        for end in self.until:
            text = text.split(end)[0]
        return text


@torch.no_grad()
def greedy_answers(recording: Recording, tokenizer: Any, cache: Cache, rows: int, ending: Ending) -> list[str]:
    """The greedy answer of each row of a cache that holds the recorded prompt `rows` times; it is used up."""
    model = recording.model
    stop = stop_tokens(model)
    first = int(recording.logits.argmax())
    answers: list[list[int]] = [[first] for _ in range(rows)]
    alive = list(range(rows))
    while True:
        going = [i for i in alive if answers[i][-1] not in stop and not ending.reached(tokenizer, answers[i])]
        if not going:
            break
        if len(going) < len(alive):  # rows that have ended cost nothing any more
            cache.batch_select_indices(torch.tensor([alive.index(i) for i in going]))
            alive = going
        last = torch.tensor([answers[i][-1:] for i in alive], device=model.device)
        logits = model(input_ids=last, **passed(cache)).logits[:, -1]
        for i, token in zip(alive, logits.argmax(-1).tolist(), strict=True):
            answers[i].append(token)
    return [ending.cut(_text(tokenizer, answer)) for answer in answers]


def _text(tokenizer: Any, answer: Sequence[int]) -> str:
    return str(tokenizer.decode(answer, skip_special_tokens=True))
