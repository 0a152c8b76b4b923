from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention import window_mass
from .base import LayerView, Policy
from .registry import register


@register
@dataclass(frozen=True)
class TOVA(Policy):
    """Attention from the last query alone (arXiv 2401.06104). The paper averages over a layer's heads; here
    each KV head keeps its own tokens."""

    name = "tova"
    paper = "TOVA: Transformers are Multi-State RNNs, arXiv 2401.06104"

    def queries(self, window: int) -> int:
        return 1

    def score(self, view: LayerView) -> Tensor:
        return window_mass(view)
