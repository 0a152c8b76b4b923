from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerView, Policy
from .registry import register


@register
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Sink and recent tokens only: the later, the more important (arXiv 2309.17453).

    Positions stay those of the text; the paper renumbers them within the cache.
    """

    name = "streaming_llm"
    paper = "StreamingLLM: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"

    def score(self, view: LayerView) -> Tensor:
        position = torch.arange(view.keys.shape[2], dtype=torch.float32, device=view.keys.device)
        return position.expand(view.keys.shape[:3])
