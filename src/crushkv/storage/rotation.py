"""A fixed orthogonal matrix that spreads every channel over all of them.

What one channel holds, a quantizer with one scale for all would spend its range on. After the rotation the numbers of a
token are near to equally large, and near to normally distributed (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def turn(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` along the last axis, in float32, in the dtype of `x`."""
    return (x.float() @ matrix).to(x.dtype)


@lru_cache(maxsize=64)
def rotation(size: int, device: torch.device) -> Tensor:
    """Orthogonal float32 `[size, size]`: a Hadamard matrix as far as powers of two go, a cosine transform for the rest.

    To be multiplied from the right: `x @ rotation`.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    matrix = _cosines(odd)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix.float().to(device, non_blocking=True)


def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II)."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place[:, None] + 0.5) * place) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix
