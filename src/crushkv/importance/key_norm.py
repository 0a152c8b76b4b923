from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import LayerView, Policy
from .registry import register


@register
@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keys with a small norm matter most (arXiv 2406.11430). Looks at no query."""

    name = "key_norm"
    paper = "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430"

    def score(self, view: LayerView) -> Tensor:
        return -view.keys.float().norm(dim=-1)
