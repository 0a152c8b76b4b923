"""The attention function: attends as the user chose, and shows the queries to the cache.

`CrushCache.update` marks the keys that it returns, and an attention call that receives the very same keys belongs to
the layer that they came from. Nothing on a model changes for that: the functions in Transformers' `AttentionInterface`
are wrapped once per process, and a wrapped function whose keys have no mark calls the original with the arguments it
got.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError, nearest
from ..storage import turn
from . import cpu_attention
from .autograd import full_precision
from .layer import AttentionCall, CrushLayer

if TYPE_CHECKING:
    from .cache import CrushCache

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_installing = threading.Lock()


@dataclass(frozen=True)
class _Mark:
    """Where the keys of an attention call came from, and the values that belong to them."""

    cache: CrushCache
    layer: CrushLayer
    values: Tensor


def mark(keys: Tensor, values: Tensor, layer: CrushLayer, cache: CrushCache) -> None:
    """Marks keys that a cache returns, so that the attention call that receives them is known."""
    keys._crushkv = _Mark(cache, layer, values)  # type: ignore[attr-defined]


def _layer_of(module: torch.nn.Module, key: Tensor, value: Tensor) -> CrushLayer | None:
    """The layer that waits for this attention call, or None: the keys are not from a `CrushCache`."""
    found: _Mark | None = getattr(key, "_crushkv", None)
    if found is None:
        return None
    if value is not found.values:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to values that are not those that the cache returned (it splits or "
            "changes them, as DiffLlama does), so that KVCrush cannot tell what its queries look for"
        )
    if found.cache.waiting is not found.layer:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends twice to the keys that the cache returned once, which is not supported"
        )
    found.cache.waiting = None
    return found.layer


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
        layer = _layer_of(module, key, value)
        if layer is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        given = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if given is None else given
        with full_precision(query.device):
            mask = layer.mask(attention_mask, query, aligned="flash" in self.name)
            turned_keys, turned_values = layer.storage.rotations()
            turned = query if turned_keys is None else turn(query, turned_keys)
        plain = not args and cpu_attention.replaceable(module, attend, query, mask, kwargs)
        output: tuple[Tensor | None, ...]
        mass = None
        if plain and query.shape[2] == 1:
            output = (cpu_attention.decode(turned, key, value, scaling), None)
        elif plain and layer.streams and query.shape[2] == key.shape[2]:
            attended, mass = cpu_attention.prefill_with_mass(query, key, value, scaling)
            output = (attended, None)
        else:
            output = attend(module, turned, key, value, mask, *args, **kwargs)
        call = AttentionCall(query, attention_mask, scaling, kwargs.get("softcap"), mass, kwargs.get("s_aux"))
        with full_precision(query.device):
            if turned_values is not None:
                assert output[0] is not None
                output = (turn(output[0], turned_values.T), *output[1:])
            layer.after_attention(call)
        return output


def _eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    """Eager attention is no registered function: each model's file has its own."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager attention function of its own: use attn_implementation='sdpa'"
    )
