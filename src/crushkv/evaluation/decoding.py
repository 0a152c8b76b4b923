"""Greedy answers of many caches of one prompt, decoded as one batch."""

from __future__ import annotations

from collections.abc import Sequence
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


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    recording: Recording,
    cache: Cache,
    rows: int,
    max_tokens: int,
    until: Sequence[str] = (),
) -> list[str]:
    """The greedy answer of each row of a cache that holds the recorded prompt `rows` times. The cache is used up.

    An answer ends before the first of the strings in `until`, at an end token, or after `max_tokens`.
    """
    stop = stop_tokens(model)
    first = int(recording.logits.argmax())
    answers: list[list[int]] = [[first] for _ in range(rows)]
    alive = list(range(rows))
    while True:
        going = [
            i
            for i in alive
            if answers[i][-1] not in stop and len(answers[i]) < max_tokens and not _ended(tokenizer, answers[i], until)
        ]
        if not going:
            break
        if len(going) < len(alive):  # rows that have ended cost nothing any more
            cache.batch_select_indices(torch.tensor([alive.index(i) for i in going]))
            alive = going
        last = torch.tensor([answers[i][-1:] for i in alive], device=model.device)
        logits = model(input_ids=last, **passed(cache)).logits[:, -1]
        for i, token in zip(alive, logits.argmax(-1).tolist(), strict=True):
            answers[i].append(token)
    return [_cut(_text(tokenizer, answer), until) for answer in answers]


def _text(tokenizer: Any, answer: list[int]) -> str:
    return tokenizer.decode(answer, skip_special_tokens=True)


def _ended(tokenizer: Any, answer: list[int], until: Sequence[str]) -> bool:
    return bool(until) and any(end in _text(tokenizer, answer) for end in until)


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text
