"""How near a compressed cache stays to the full one: KL divergence, agreement, likelihood of the gold answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..hf import CrushCache
from ..hf.interface import passed
from .decoding import stop_tokens
from .recording import Recording


@dataclass(frozen=True)
class Fidelity:
    """Measured along the full cache's own greedy answer, teacher-forced.

    The first token of an answer comes from the pass over the prompt, which attends to everything. It is the same for
    every cache, so `kl` and `agreement` leave it out.

    Attributes:
        kl: mean of KL(full || this) over the answer's tokens, in nats.
        agreement: share of these tokens that both caches find likeliest.
        gold_nll: mean negative log-likelihood of the gold answer's tokens, in nats; None without a gold answer.
        answer_tokens: number of tokens in the means of `kl` and `agreement`.
    """

    kl: float
    agreement: float
    gold_nll: float | None
    answer_tokens: int


class Reference:
    """The full cache's answer to one prompt, and what other caches are compared with.

    Args:
        recording: the prompt.
        gold: token ids of the gold answer `[G]`, or None.
        tokens: length of the answer, at most; the gold answer is cut there, too.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, recording: Recording, gold: Tensor | None, tokens: int) -> None:
        if tokens < 2:
            raise ValueError(f"tokens={tokens}: expected at least 2, of which the first is not counted")
        self._model = model
        self._recording = recording
        self.answer = _greedy(model, recording, tokens)
        self._gold = None if gold is None or not len(gold) else gold[:tokens]
        self._logits, nll = self._follow(recording.branch(None))
        self.fidelity = Fidelity(0.0, 1.0, nll, len(self._logits))

    @torch.no_grad()
    def compare(self, cache: CrushCache) -> Fidelity:
        """Follows both answers with a cache that `Recording.branch` has made. The cache is used up."""
        logits, nll = self._follow(cache)
        target, given = self._logits.log_softmax(-1), logits.log_softmax(-1)
        kl = (target.exp() * (target - given)).sum(-1)
        same = self._logits.argmax(-1) == logits.argmax(-1)
        return Fidelity(float(kl.mean().clamp(min=0)), float(same.float().mean()), nll, len(logits))

    def _follow(self, cache: Cache) -> tuple[Tensor, float | None]:
        """Logits `[n - 1, V]` behind the answer's first tokens, and the gold answer's mean NLL."""
        rows = [self.answer] if self._gold is None else [self.answer, self._gold]
        logits = continuation_logits(self._model, cache, rows)
        if self._gold is None:
            return logits[0], None
        behind = torch.cat([self._recording.logits[None], logits[1]])
        nll = torch.nn.functional.cross_entropy(behind, self._gold.to(behind.device))
        return logits[0], float(nll)


def continuation_logits(model: PreTrainedModel, cache: Cache, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits behind all tokens of each continuation but its last: float32 `[n - 1, V]` a continuation.

    The continuations `[n]` are rows of one forward pass over as many copies of the cache, and evict nothing.
    """
    longest = max(len(row) for row in rows) - 1
    if not longest:
        return [model.lm_head.weight.new_zeros((0, model.lm_head.weight.shape[0])).float() for _ in rows]
    # What fills up a shorter row stands behind its tokens, where no earlier query sees it.
    inputs = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, tokens in zip(inputs, rows, strict=True):
        row[: len(tokens) - 1] = tokens[:-1]
    if isinstance(cache, CrushCache):
        cache.prefill_end = cache.get_seq_length() + longest + 1
    if len(rows) > 1:
        cache.batch_repeat_interleave(len(rows))
    logits = model(input_ids=inputs.to(model.device), **passed(cache)).logits
    return [row[: len(tokens) - 1].float() for row, tokens in zip(logits, rows, strict=True)]


def _greedy(model: PreTrainedModel, recording: Recording, tokens: int) -> Tensor:
    """The full cache's greedy answer `[n]`, at least two tokens. An end token is part of it."""
    stop = stop_tokens(model)
    logits = recording.logits.clone()
    logits[list(stop)] = -torch.inf  # an empty answer would leave nothing to compare
    cache = recording.branch(None)
    answer = [int(logits.argmax())]
    while len(answer) < tokens and answer[-1] not in stop:
        output = model(input_ids=torch.tensor([answer[-1:]], device=model.device), **passed(cache))
        answer.append(int(output.logits[0, -1].argmax()))
    return torch.tensor(answer)
