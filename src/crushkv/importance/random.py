from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerView, Policy
from .registry import register


@register
@dataclass(frozen=True)
class Random(Policy):
    """Scores drawn at random from the seed: the control that every other policy has to beat."""

    name = "random"
    paper = "control"

    def score(self, view: LayerView) -> Tensor:
        kv_heads, tokens = view.keys.shape[1:3]
        drawn = torch.rand((kv_heads, tokens), generator=torch.Generator().manual_seed(view.seed))
        return drawn.to(view.keys.device).expand(view.keys.shape[:3])
