"""Several caches of one prompt as the rows of one, so that their answers are decoded together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..core import Tier
from ..errors import UnsupportedModelError
from ..hf.cache import CrushCache
from ..hf.layer import CrushLayer


@torch.no_grad()
def stack(model: PreTrainedModel, caches: Sequence[CrushCache]) -> CrushCache:
    """One cache with a row for each of the given ones, in their order.

    Shorter rows are filled up at the front, and nothing attends to what fills them. The rows may have different
    configurations, so nothing is evicted from the result.

    Args:
        caches: with one row each, and the same logical length. They are not changed.

    Raises:
        UnsupportedModelError: a layer is not compressed by KVCrush (sliding windows).
    """
    lengths = {cache.get_seq_length() for cache in caches}
    if len(lengths) != 1:
        raise ValueError(f"caches of different lengths: {sorted(lengths)}")
    plain = {"bits": 16, "representative_bits": None, "recent_bits": 16, "rank": None, "heads": "equal"}
    result = CrushCache(model, caches[0].config.replace(interval=0, **plain))
    for index, target in enumerate(result.layers):
        layers = [layer for cache in caches if isinstance(layer := cache.layers[index], CrushLayer)]
        if not isinstance(target, CrushLayer) or len(layers) < len(caches):
            raise UnsupportedModelError("only caches whose layers are all compressed can be stacked")
        _stack_layers(target, layers)
    return result


def _stack_layers(target: CrushLayer, layers: list[CrushLayer]) -> None:
    keys, values = zip(*(layer.read() for layer in layers), strict=True)
    held = [layer.length for layer in layers]
    longest = max(held)
    device = keys[0].device
    real = None
    if min(held) < longest:
        free = longest - torch.tensor(held, device=device)
        real = torch.arange(longest, device=device) >= free[:, None]
    evicted = [layer.seen - count for layer, count in zip(layers, held, strict=True)]
    tensors = {
        "keys": _rows(keys, longest),
        "values": _rows(values, longest),
        "positions": _rows([layer.positions[..., None] for layer in layers], longest)[..., 0].to(torch.int32),
        "tiers": _rows([layer.tiers[..., None] for layer in layers], longest)[..., 0],
        "evicted": torch.tensor(evicted, device=device),
    }
    if real is not None:
        tensors["real"] = real
    target.load_state(tensors, {"seen": layers[0].seen, "since_eviction": 0})
    if any(layer.parted for layer in layers):
        target.groups[0].gaps = tensors["tiers"] == Tier.PADDING


def _rows(parts: Sequence[Tensor], longest: int) -> Tensor:
    """`[1, Hkv, P, D]` each, filled up in front to `[B, Hkv, longest, D]`."""
    return torch.cat([F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])
