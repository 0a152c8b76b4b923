"""What all tensors of tokens need: writing to them again and again, and taking some of them out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

Pick = Callable[[Tensor, int], Tensor]
"""Takes some KV heads out of a tensor that has all of a layer at a dimension, `pick(x, dim)`."""


def no_grad(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.no_grad()`, at less cost where gradients are off already, as while decoding."""

    @wraps(function)
    def without(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return without


def writable(buffer: Tensor) -> bool:
    """Whether a buffer may be written to: one made under `inference_mode` cannot be, outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `[..., K, R]` at `indices [..., K]` of `x [..., P, R]`."""
    if x.is_cuda:  # one launch instead of four
        return x.gather(-2, indices[..., None].expand(*indices.shape, x.shape[-1]))
    # Rows are copied whole, which is faster on a CPU.
    *batch, tokens, size = x.shape
    offsets = torch.arange(math.prod(batch), device=x.device).view(*batch, 1) * tokens
    return x.reshape(-1, size).index_select(0, (indices + offsets).flatten()).view(*indices.shape, size)
