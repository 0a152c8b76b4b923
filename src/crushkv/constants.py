"""Numbers that stay on a device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def constant(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of some numbers, made once: a GPU would have to be sent them each time.

    Args:
        numbers: a number, or tuples of them, as `torch.tensor` takes them.
    """
    with torch.inference_mode(False):  # it serves later calls, with gradients or without
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
