"""Layers of a cache that KVCrush leaves to Transformers: which they are, and what they hold as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

# The kind of layers that hold nothing. Transformers before 5.20, which vLLM 0.32 needs, does not have it: None there.
DummyLayer: type | None = getattr(cache_utils, "DummyLayer", None)


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of pictures, which the text attends to (Mllama): they do not grow with the text."""


# Layers that hold no more however long the text gets, or hold nothing (they attend to another layer's keys, or do not
# attend).
LEFT_ALONE = (DynamicSlidingWindowLayer, LinearAttentionLayer, CrossAttentionLayer, DummyLayer)


def state(layer: Any) -> dict[str, Tensor]:
    """Everything that such a layer holds, by name."""
    if isinstance(layer, LinearAttentionLayer):
        kinds = {"conv_states": layer.conv_states, "recurrent_states": layer.recurrent_states}
        states = {f"{kind}.{index}": tensor for kind, found in kinds.items() for index, tensor in found.items()}
    else:
        states = {"keys": layer.keys, "values": layer.values}
    return {name: tensor for name, tensor in states.items() if tensor is not None}


def load_state(layer: Any, tensors: Mapping[str, Tensor], seen: int) -> None:
    """Fills a new layer with what `state` gave, after `seen` tokens."""
    if not tensors:
        return
    if isinstance(layer, LinearAttentionLayer):
        states: Any = layer
        for name, tensor in tensors.items():
            kind, _, index = name.partition(".")
            states.lazy_initialization(**{kind: tensor}, state_idx=int(index))
            getattr(states, kind)[int(index)] = tensor
            states.dtype, states.device = tensor.dtype, tensor.device
            states.has_previous_state[int(index)] = True
        return
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = seen
