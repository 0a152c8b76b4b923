from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerView, Policy, check_integer, check_number
from .registry import register


@register
@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """The attention that future queries are expected to give, if queries are Gaussian (arXiv 2510.00636).

    E[exp(q k / sqrt d)] = exp(mu k / sqrt d + k Sigma k / 2 d), normalised over the tokens and weighted by the
    norm of the value. The paper takes mu and Sigma of queries before RoPE, and averages RoPE over future positions.
    Here both come from the last queries after RoPE. This averages RoPE over the positions just read, and needs no
    knowledge of the model.

    Attributes:
        samples: how many of the last queries give mu and Sigma.
        epsilon: added to the expected attention, so that values count where it vanishes, too.
    """

    name = "expected_attention"
    paper = "Expected Attention, arXiv 2510.00636"

    samples: int = 128
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_integer("samples", self.samples)
        check_number("epsilon", self.epsilon)

    def queries(self, window: int) -> int:
        return self.samples

    def score(self, view: LayerView) -> Tensor:
        assert view.queries is not None
        rows, heads, count, size = view.queries.shape
        kv_heads, tokens = view.keys.shape[1:3]
        group = heads // kv_heads
        queries = view.queries.float()
        if view.queries_real is None:
            weight = queries.new_full((rows, 1, count, 1), 1 / count)
        else:
            real = view.queries_real[:, None, :, None].float()
            weight = real / real.sum(2, keepdim=True).clamp(min=1)
        mean = (queries * weight).sum(2, keepdim=True)  # [B, Hq, 1, D]
        centred = queries - mean
        covariance = (centred * weight).transpose(-1, -2) @ centred  # [B, Hq, D, D]

        keys = view.keys.float() * view.scaling
        first = keys @ mean.view(rows, kv_heads, group, size).transpose(-1, -2)  # [B, Hkv, S, G]
        stacked = keys @ covariance.view(rows, kv_heads, group, size, size).transpose(2, 3).reshape(
            rows, kv_heads, size, group * size
        )
        second = (stacked.view(rows, kv_heads, tokens, group, size) * keys[:, :, :, None]).sum(-1)
        logits = (first + second / 2).transpose(-1, -2)  # [B, Hkv, G, S]
        if (shown := view.shown) is not None:
            shown = shown[:, None] if shown.ndim == 2 else shown
            logits = logits.masked_fill(~shown[:, :, None], torch.finfo(logits.dtype).min)
        expected = logits.softmax(-1) + self.epsilon
        norm = view.values.float().norm(dim=-1)[:, :, None]
        return (expected * norm).view(rows, heads, tokens)
