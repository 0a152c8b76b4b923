"""The reference: unpack, then attend with PyTorch's own function. It runs everywhere and refuses nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..storage import TieredStorage, turn


def missing() -> str | None:
    return None


def runs_on(device: torch.device) -> bool:
    return True


def build() -> str:
    return ""


def refusal(queries: Tensor, store: TieredStorage) -> str | None:
    return None


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor:
    """See `kernels.attend`. The query heads of a group become queries of its KV head: keys are read once for them."""
    keys, values = store.attended()
    of_keys, of_values = store.rotations()
    turned = queries if of_keys is None else turn(queries, of_keys)
    rows, heads, _, size = queries.shape
    if shown is not None:
        shown = shown.view(rows, -1, 1, shown.shape[-1])
    packed = turned.reshape(rows, keys.shape[1], -1, size)
    output = F.scaled_dot_product_attention(packed, keys, values, attn_mask=shown, scale=scaling)
    output = output.reshape(rows, heads, 1, -1)
    return output if of_values is None else turn(output, of_values.T)


def append(keys: Tensor, values: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]) -> bool:
    """See `kernels.append`: nothing is gained by it here."""
    return False


def attend_together(
    queries: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]], scaling: float
) -> Tensor | None:
    """See `kernels.attend_together`: nothing is gained by it here."""
    return None
