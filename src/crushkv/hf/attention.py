"""The attention function: attends as the user chose, and shows the queries to the cache.

A `CrushLayer` that has been updated is handed to the attention call that follows in the same thread. Nothing on
a model changes for that: the functions in Transformers' `AttentionInterface` are wrapped once per process, and a
wrapped function that is handed no layer calls the original with the arguments it got.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError, nearest
from ..storage import turn
from . import cpu_attention
from .layer import AttentionCall, CrushLayer

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_installing = threading.Lock()


class _Handover(threading.local):
    """The layer that waits for its attention call, and the cache it belongs to."""

    layer: CrushLayer | None = None
    owner: int = 0


_handover = _Handover()


def hand_over(layer: CrushLayer, owner: int) -> None:
    """Announces the layer to the attention call that follows.

    Raises:
        UnsupportedModelError: the previous layer of the same cache is still waiting, so that its attention was
            computed past the wrapped function.
    """
    if _handover.layer is not None and _handover.owner == owner and _handover.layer is not layer:
        _handover.layer = None
        raise UnsupportedModelError(
            "the attention of this model does not go through Transformers' AttentionInterface, so that KVCrush never "
            "sees its queries (or another package has replaced the attention function since the cache was made)"
        )
    _handover.layer, _handover.owner = layer, owner


def install(name: str) -> None:
    """Wraps the attention implementation `name`, once.

    Raises:
        UnsupportedModelError: crushkv cannot work with that implementation.
    """
    if name not in SUPPORTED:
        raise UnsupportedModelError(
            f"attention implementation {name!r} is not supported.{nearest(str(name), SUPPORTED)} Choose one with "
            "model.set_attn_implementation(...)"
        )
    with _installing:
        present = ALL_ATTENTION_FUNCTIONS.get(name)
        if not isinstance(present, CrushAttention):
            # A local entry: it shadows the registered function and leaves the registry itself alone.
            ALL_ATTENTION_FUNCTIONS[name] = CrushAttention(name, present)


class CrushAttention:
    """A wrapped attention function; see the module's docstring."""

    def __init__(self, name: str, original: Callable[..., Any] | None) -> None:
        self.name = name
        self.original = original

    # A compiled model runs compiled around the attention and the cache, whose state is Python's.
    @torch.compiler.disable
    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`query [B, Hq, q, D]`, `key` and `value [B, Hkv, P, D]` as the cache returned them."""
        attend = self.original or _eager_of(module)
        layer, _handover.layer = _handover.layer, None
        if layer is None:
            shared: _Attended | None = getattr(key, "_crushkv_attended", None)
            if shared is None:
                return attend(module, query, key, value, attention_mask, *args, **kwargs)
            turned = query if shared.turned_keys is None else turn(query, shared.turned_keys)
            output = attend(module, turned, key, value, shared.mask, *args, **kwargs)
            return _turned_back(output, shared.turned_values)
        mask = layer.mask(attention_mask, query.shape[2], aligned="flash" in self.name)
        given = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if given is None else given
        turned_keys, turned_values = layer.storage.rotations()
        turned = query if turned_keys is None else turn(query, turned_keys)
        plain = not args and cpu_attention.replaceable(attend, query, mask, kwargs)
        output: tuple[Tensor | None, ...]
        mass = None
        if plain and query.shape[2] == 1:
            output = (cpu_attention.decode(turned, key, value, scaling), None)
        elif plain and layer.streams and query.shape[2] == key.shape[2]:
            attended, mass = cpu_attention.prefill_with_mass(query, key, value, scaling)
            output = (attended, None)
        else:
            output = attend(module, turned, key, value, mask, *args, **kwargs)
        output = _turned_back(output, turned_values)
        key._crushkv_attended = _Attended(mask, turned_keys, turned_values)  # type: ignore[attr-defined]
        call = AttentionCall(query, attention_mask, scaling, kwargs.get("softcap"), mass)
        if layer.plan.latent:
            call = replace(call, keys=key, values=value)
        layer.after_attention(call)
        return output


@dataclass(frozen=True)
class _Attended:
    """How a layer attended to its keys, for the layers that attend to the very same tensor after it (Gemma 3n)."""

    mask: Tensor | None
    turned_keys: Tensor | None
    turned_values: Tensor | None


def _turned_back(output: tuple[Tensor | None, ...], turned_values: Tensor | None) -> tuple[Tensor | None, ...]:
    """The output of attention over rotated values, without their rotation."""
    if turned_values is None:
        return output
    assert output[0] is not None
    return (turn(output[0], turned_values.T), *output[1:])


def _eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    """Eager attention is no registered function: each model's file has its own."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager attention function of its own: use attn_implementation='sdpa'"
    )
