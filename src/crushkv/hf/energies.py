"""What is measured of keys and queries while a model reads a text, and then the same text again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import CrushConfig
from ..errors import UnsupportedModelError
from ..importance import LayerView, greatest_attention
from ..rope import Rope
from .cache import CrushCache
from .head_group import AttentionCall
from .layer import CrushLayer
from .support import input_device

SINK = 4  # the first tokens, whose keys are unlike all others
UNSETTLED = 64  # queries that see few tokens


@dataclass(frozen=True)
class Measured:
    """Of one text: `keys` and `queries [L, Hkv, D]`, energies of the channels; `scores [L, Hkv, R]`, the greatest
    attention that its first R tokens receive from any query of a KV head's group while they are read again, which is
    how KVzip (arXiv 2505.23416) tells what a head needs."""

    keys: Tensor
    queries: Tensor
    scores: Tensor


@torch.no_grad()
def measure(model: Any, text: Tensor, between: Tensor, again: int, ropes: list[Rope | None]) -> Measured:
    """Reads the tokens `text [S]` and `between`, and the first `again` tokens of the text once more."""
    cache = _MeasuringCache(model, CrushConfig(budget=1.0, policy="streaming_llm", interval=0))
    layers = [layer for layer in cache.layers if isinstance(layer, _MeasuringLayer)]
    for layer, rope in zip(layers, ropes, strict=True):
        layer.rope, layer.tokens, layer.again = rope, len(text), again
    ids = torch.cat([text, between, text[:again]])
    # Logits are of no use here. `forward`: the hook of a block of KVCrush would put its own cache there.
    model.base_model.forward(input_ids=ids[None].to(input_device(model)), past_key_values=cache, use_cache=True)
    shapes = {tuple(layer.measured[0].shape) for layer in layers}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"{model.config.model_type}: heads differ between layers ({sorted(shapes)})")
    return Measured(*(torch.stack(parts) for parts in zip(*(layer.measured for layer in layers), strict=True)))


class _MeasuringLayer(CrushLayer):
    """Never evicts, and keeps what is measured in one pass."""

    rope: Rope | None = None
    tokens = 0  # of the text, which comes first
    again = 0  # tokens of the text that come again at the end

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self._received = key_states
        return super().update(key_states, value_states, *args, **kwargs)

    def before_attention(self, call: AttentionCall) -> None:
        """Nothing is decided."""

    def after_attention(self, call: AttentionCall) -> None:
        keys, queries = self._received.float(), call.queries.float()
        del self._received
        kv_heads, again = keys.shape[1], self.again
        if self.plan.latent:  # one latent for all heads: there is nothing to divide
            scores = keys.new_zeros((kv_heads, again))
        else:
            last = queries[:, :, -again:]
            view = LayerView(keys, keys, last, call.scaling, softcap=call.softcap, sinks=call.sinks)
            received = greatest_attention(view)
            scores = received[0, :, :again].unflatten(0, (kv_heads, -1)).amax(1)
        # The heads of a group follow each other.
        keys, queries = keys[0], queries[0].unflatten(0, (kv_heads, -1))
        keys, queries = keys[:, : self.tokens], queries[:, :, : self.tokens]
        positions = torch.arange(keys.shape[1], device=keys.device)
        if self.rope is not None:
            keys = self.rope.unturned(keys, positions)
        keys = keys[:, SINK:]
        of_keys = (keys - keys.mean(1, keepdim=True)).pow(2).mean(1)
        of_queries = queries[:, :, UNSETTLED:].pow(2).mean((1, 2))
        if self.rope is not None:
            of_keys, of_queries = self.rope.averaged(of_keys), self.rope.averaged(of_queries)
        self.measured = of_keys.cpu(), of_queries.cpu(), scores.cpu()


class _MeasuringCache(CrushCache):
    layer_class = _MeasuringLayer
