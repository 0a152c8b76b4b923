"""The attention function: attends as the user chose, and shows the queries to the cache.

`CrushCache.update` marks the keys that it returns, and an attention call that receives the very same keys belongs to
the layer that they came from. Nothing on a model changes for that: the functions in Transformers' `AttentionInterface`
are wrapped once per process, and a wrapped function whose keys have no mark calls the original with the arguments it
got.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import kernels
from ..errors import UnsupportedModelError, nearest
from ..importance import LayerView, attention_with_mass
from ..storage import turn
from .autograd import full_precision, refuse_gradient
from .head_group import AttentionCall, HeadGroup
from .layer import CrushLayer
from .masks import visible
from .plain_call import is_causal, is_plain

if TYPE_CHECKING:
    from .cache import CrushCache

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_installing = threading.Lock()


class _Attended(NamedTuple):
    """How a layer attended to its keys, for other layers that attend to the very same tensor after it (Gemma 3n)."""

    module: torch.nn.Module
    mask: Tensor | None  # over physical slots
    turned_keys: Tensor | None
    turned_values: Tensor | None
    parted: bool = False  # the keys that were returned are not those of any head


class _Asked(NamedTuple):
    """How an attention call is to be answered."""

    module: torch.nn.Module
    call: AttentionCall
    plain: bool  # nothing but softmax attention
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Mark:
    """Where the keys of an attention call came from, and the values that belong to them."""

    cache: CrushCache
    layer: CrushLayer
    values: Tensor
    partial: bool = False  # what was returned is not all that the layer holds
    attended: _Attended | None = None

    def belongs(self, key: Tensor) -> bool:
        """Whether keys can have been made of the latents that were returned: as many rows and tokens."""
        return self.cache.waiting is self.layer and self.values.shape[::2] == key.shape[::2]


class _Latent(threading.local):
    """The mark of latents (MLA), which attention never receives: it receives what its model makes of them."""

    mark: _Mark | None = None


_latent = _Latent()


def mark(keys: Tensor, values: Tensor, layer: CrushLayer, cache: CrushCache) -> None:
    """Marks keys that a cache returns, so that the attention call that receives them is known."""
    found = _Mark(cache, layer, values, partial=keys.shape[2] < layer.length)
    if layer.plan.latent:
        _latent.mark = found
    else:
        keys._crushkv = found  # type: ignore[attr-defined]


def _mark_of(module: torch.nn.Module, key: Tensor, value: Tensor) -> _Mark | None:
    """The mark of the layer that waits for this attention call, or has shared its keys; None: they are from no
    `CrushCache`."""
    found: _Mark | None = getattr(key, "_crushkv", None)
    if found is None:
        found, _latent.mark = _latent.mark, None
        if found is None or not found.belongs(key):
            return None
    elif value is not found.values:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to values that are not those that the cache returned (it splits or "
            "changes them, as DiffLlama does), so that KVCrush cannot tell what its queries look for"
        )
    elif found.attended is not None and found.attended.module is module:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends twice to the keys that the cache returned once, which is not supported"
        )
    return found


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
        found = _mark_of(module, key, value)
        if found is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        output: tuple[Tensor | None, ...]
        if (shared := found.attended) is not None:
            # These layers need all keys and values as tensors, and before anything of them is evicted.
            if shared.parted:
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends to the keys of another layer, whose heads hold different numbers "
                    "of tokens: use heads='equal'"
                )
            if found.partial:
                found.layer.plan.reads_packed = False
                raise UnsupportedModelError(
                    f"{type(module).__name__} attends to the keys of another layer, of which its configuration says "
                    "nothing (num_kv_shared_layers): reset() the cache, and read the prompt once more"
                )
            with full_precision(query.device):
                turned = query if shared.turned_keys is None else turn(query, shared.turned_keys)
            output = attend(module, turned, key, value, _last_rows(shared.mask, query.shape[2]), *args, **kwargs)
            with full_precision(query.device):
                return _turned_back(output, shared.turned_values)
        layer, count = found.layer, query.shape[2]
        found.cache.waiting = None
        given = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if given is None else given
        with full_precision(query.device):
            shown = layer.shown(attention_mask, count)
            layer.check_shown(shown, count)
            _check_causal(module, layer, query, attention_mask, kwargs)
            softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
            call = AttentionCall(query, attention_mask, shown, scaling, softcap, sinks=sinks)
            layer.before_attention(call)
        # Eager attention is each model's own function, which may do more than its arguments say.
        plain = not args and self.original is not None and not layer.plan.latent and is_plain(query, kwargs)
        asked = _Asked(module, call, plain, args, kwargs)
        if layer.parted:
            output = self._attend_parted(layer, key, asked)
            found.attended = _Attended(module, None, None, None, parted=True)
        elif plain and count > 1 and attention_mask is None and self._can_give_mass(layer, query, key):
            # The policy would compute QK^T once more.
            attended, mass = attention_with_mass(LayerView(key, value, query, scaling))
            call = call._replace(mass=mass)
            output = (attended.transpose(1, 2).contiguous(), None)
            found.attended = _Attended(module, None, None, None)
        else:
            held = None if found.partial else (key, value)
            output, found.attended = self._attend_group(layer.groups[0], held, asked)
        if layer.plan.latent:
            call = call._replace(keys=key, values=value)
        with full_precision(query.device):
            layer.after_attention(call)
        return output

    def _attend_parted(self, layer: CrushLayer, key: Tensor, asked: _Asked) -> tuple[Tensor | None, ...]:
        """Attention of a layer whose heads hold different numbers of tokens, at once or group by group."""
        call = asked.call
        decodes = asked.plain and call.queries.shape[2] == 1
        if decodes and call.mask is None and all(group.whole for group in layer.groups):
            attended = kernels.attend_together(call.queries, layer.stores, layer.heads, call.scaling)
            if attended is not None:
                return attended.transpose(1, 2), None
        outputs, weights = list[Tensor](), list[Tensor]()
        for group in layer.groups:
            assert group.heads is not None
            of_group = group.of_call(call)
            kwargs = asked.kwargs if of_group.sinks is None else {**asked.kwargs, "s_aux": of_group.sinks}
            held = None
            if not decodes:
                keys, values = group.storage.attended()
                held = refuse_gradient(keys, key), refuse_gradient(values, key)
            output, _ = self._attend_group(group, held, asked._replace(call=of_group, kwargs=kwargs))
            assert output[0] is not None
            outputs.append(output[0])
            if output[1] is not None:
                weights.append(F.pad(output[1], (layer.length - output[1].shape[-1], 0)))
        return layer.joined(outputs, dim=2), layer.joined(weights) if weights else None

    def _attend_group(
        self, group: HeadGroup, held: tuple[Tensor, Tensor] | None, asked: _Asked
    ) -> tuple[tuple[Tensor | None, ...], _Attended]:
        """Attention of the query heads of a group, which alone `asked` is about, and how it attended.

        Args:
            held: their keys and values as `TieredStorage.attended` gives them; None: they are packed.
        """
        query = asked.call.queries
        with full_precision(query.device):
            mask = group.mask(asked.call, aligned="flash" in self.name)
        of_keys, of_values = group.storage.rotations()
        how = _Attended(asked.module, mask, of_keys, of_values)
        if asked.plain and query.shape[2] == 1:
            shown = _slots_shown(mask, group.storage.kv_heads)
            attended = kernels.attend(query, group.storage, asked.call.scaling, shown)
            return (attended.transpose(1, 2), None), how
        attend = self.original or _eager_of(asked.module)
        key, value = group.storage.attended() if held is None else held
        with full_precision(query.device):
            turned = query if of_keys is None else turn(query, of_keys)
        output = attend(asked.module, turned, key, value, mask, *asked.args, **asked.kwargs)
        with full_precision(query.device):
            return _turned_back(output, of_values), how

    def _can_give_mass(self, layer: CrushLayer, query: Tensor, key: Tensor) -> bool:
        """Whether a whole prompt is read on a CPU for a policy that adds up the attention of all queries."""
        on_cpu = self.original is sdpa_attention_forward and query.device.type == "cpu"
        return on_cpu and layer.streams and query.shape[2] == key.shape[2]


def _slots_shown(mask: Tensor | None, kv_heads: int) -> Tensor | None:
    """A mask over physical slots for one token a row, as bool `[B, P]` or `[B, Hkv, P]`."""
    if mask is None:
        return None
    shown = visible(mask if mask.ndim == 2 else mask[:, :, 0])
    # One flag for all query heads, or the same for those of a group.
    return shown if mask.ndim == 2 else shown[:, 0] if shown.shape[1] == 1 else shown[:, :: shown.shape[1] // kv_heads]


def _check_causal(
    module: torch.nn.Module, layer: CrushLayer, query: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> None:
    """Refuses attention to later tokens where the scores would be those of causal attention.

    Pictures whose parts see each other are such attention, too. Policies that read the last queries alone score by
    these, and none of them follows a picture.
    """
    if query.shape[2] == 1:
        return
    if (mask is None or mask.ndim == 2) and not is_causal(module, kwargs):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to later tokens as well (its is_causal is False): KVCrush compresses "
            "caches of text that is read in one direction"
        )
    if layer.streams and layer.plan.masks.ahead:
        raise UnsupportedModelError(
            f"policy={layer.plan.config.policy!r} adds up the attention of all queries, and the attention mask lets "
            "some of them see later tokens (as parts of a picture do), which it does not follow: choose a policy that "
            "reads the last queries, such as readahead"
        )


def _last_rows(mask: Tensor | None, queries: int) -> Tensor | None:
    """The mask of the last queries: a layer that shares keys may be asked for the last token alone (Gemma 4)."""
    return mask if mask is None or mask.ndim == 2 else mask[:, :, -queries:]


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
