"""Buffers that are written to again and again."""

from __future__ import annotations

import torch
from torch import Tensor


def writable(buffer: Tensor) -> bool:
    """Whether a buffer may be written to: one made under `inference_mode` cannot be, outside of it."""
    return torch.is_inference_mode_enabled() or not buffer.is_inference()
