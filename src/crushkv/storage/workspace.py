"""Memory that is used again and again, because taking and giving back megabytes takes longer than filling them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .buffers import writable


class Workspace:
    """One buffer a name, as large as the largest request so far. What it holds is lost at the next request."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        numbers = math.prod(shape)
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.numel() < numbers
            or buffer.dtype != dtype
            or buffer.device != device
            or not writable(buffer)
        ):
            # A little more than asked for: while decoding the next request is one token longer.
            buffer = torch.empty(numbers + numbers // 8, dtype=dtype, device=device)
            self._buffers[name] = buffer
        return buffer[:numbers].view(shape)
