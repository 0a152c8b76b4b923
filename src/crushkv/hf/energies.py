"""Energies of keys and queries, channel by channel, while a model reads a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import CrushConfig
from ..errors import UnsupportedModelError
from ..rope import Rope
from .cache import CrushCache
from .layer import AttentionCall, CrushLayer
from .support import input_device

SINK = 4  # the first tokens, whose keys are unlike all others
UNSETTLED = 64  # queries that see few tokens


@torch.no_grad()
def energies_of(model: Any, ids: Tensor, ropes: list[Rope | None]) -> tuple[Tensor, Tensor]:
    """Of keys and queries, `[L, Hkv, D]` each, while the model reads `ids [S]`."""
    cache = _MeasuringCache(model, CrushConfig(budget=1.0, policy="streaming_llm", interval=0))
    layers = [layer for layer in cache.layers if isinstance(layer, _MeasuringLayer)]
    for layer, rope in zip(layers, ropes, strict=True):
        layer.rope = rope
    # Logits are of no use here. `forward`: the hook of a block of KVCrush would put its own cache there.
    model.base_model.forward(input_ids=ids[None].to(input_device(model)), past_key_values=cache, use_cache=True)
    energies = [layer.energies for layer in layers]
    shapes = {tuple(of_keys.shape) for of_keys, _ in energies}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"{model.config.model_type}: heads differ between layers ({sorted(shapes)})")
    return torch.stack([of_keys for of_keys, _ in energies]), torch.stack([of_queries for _, of_queries in energies])


class _MeasuringLayer(CrushLayer):
    """Never evicts, and keeps the energies of one pass."""

    rope: Rope | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self._received = key_states
        return super().update(key_states, value_states, *args, **kwargs)

    def after_attention(self, call: AttentionCall) -> None:
        keys, queries = self._received[0].float(), call.queries[0].float()
        del self._received
        positions = torch.arange(keys.shape[1], device=keys.device)
        if self.rope is not None:
            keys = self.rope.unturned(keys, positions)
        keys = keys[:, SINK:]
        of_keys = (keys - keys.mean(1, keepdim=True)).pow(2).mean(1)
        # The heads of a group follow each other.
        of_queries = queries[:, UNSETTLED:].unflatten(0, (keys.shape[0], -1)).pow(2).mean((1, 2))
        if self.rope is not None:
            of_keys, of_queries = self.rope.averaged(of_keys), self.rope.averaged(of_queries)
        self.energies = of_keys.cpu(), of_queries.cpu()


class _MeasuringCache(CrushCache):
    layer_class = _MeasuringLayer
