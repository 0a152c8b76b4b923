"""Where the cache stands apart from PyTorch's automatic machinery: mixed precision and gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

_AS_IT_IS = contextlib.nullcontext()


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off: what is held and scored has its own dtypes, and is not to be rounded once more."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, new: Tensor) -> Tensor:
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedModelError(
            "gradients through a compressed cache are not there: it holds no graph. Call the model outside of KVCrush, "
            "or with use_cache=False, where gradients are wanted"
        )


def refuse_gradient(held: Tensor, new: Tensor) -> Tensor:
    """What a cache holds, such that a backward pass that would go on to `new` is an error.

    A cache keeps numbers without their history. Without this, a backward pass would leave out keys and values in
    silence.
    """
    return _Refuse.apply(held, new) if wants_gradient(new) else held


def wants_gradient(new: Tensor) -> bool:
    """Whether a backward pass may come to these keys or values."""
    return torch.is_grad_enabled() and new.requires_grad
