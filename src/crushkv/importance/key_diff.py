from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .base import LayerView, Policy
from .registry import register


@register
@dataclass(frozen=True)
class KeyDiff(Policy):
    """Keys least similar to the mean direction of all keys matter most (arXiv 2504.15364). Looks at no query."""

    name = "key_diff"
    paper = "KeyDiff, arXiv 2504.15364"

    def score(self, view: LayerView) -> Tensor:
        directions = F.normalize(view.keys.float(), dim=-1)
        if (shown := view.shown) is not None:
            directions = directions * (shown[:, None] if shown.ndim == 2 else shown)[..., None]
        anchor = directions.sum(2, keepdim=True)
        return -F.cosine_similarity(directions, anchor, dim=-1)
