"""What all tensors of tokens need: writing to them again and again, and taking some of them out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Pick = Callable[[Tensor, int], Tensor]
"""Takes some KV heads out of a tensor that has all of a layer at a dimension, `pick(x, dim)`."""


def writable(buffer: Tensor) -> bool:
    """Whether a buffer may be written to: one made under `inference_mode` cannot be, outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `[..., K, R]` at `indices [..., K]` of `x [..., P, R]`: rows copied whole, faster than a gather."""
    *batch, tokens, size = x.shape
    offsets = torch.arange(math.prod(batch), device=x.device).view(*batch, 1) * tokens
    return x.reshape(-1, size).index_select(0, (indices + offsets).flatten()).view(*indices.shape, size)
