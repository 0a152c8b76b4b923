"""Attention straight from packed tokens on a CPU, by the compiled library (cpu_attention.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..compiled import cpu_library
from ..compiled.cpu_library import DTYPES
from ..storage import TieredStorage
from .cpu_prepared import Block, Layer, Prepared, prepare

# Query heads a KV head, as in cpu_attention.h.
_HEADS = 16


def missing() -> str | None:
    if (found := cpu_library.library()) is None:
        return "its library was not built: that takes a C++ compiler (g++) when crushkv is installed from source"
    sizes = found.size_of_layer, found.size_of_block
    for size in sizes:
        size.restype = ctypes.c_int64
    if [size() for size in sizes] != [ctypes.sizeof(Layer), ctypes.sizeof(Block)]:
        return "its library was built from another version of crushkv: install crushkv again"
    return None


def build() -> str:
    """The instructions that the library in use was built for."""
    return cpu_library.build() or "none"


def runs_on(device: torch.device) -> bool:
    return device.type == "cpu"


def refusal(queries: Tensor, store: TieredStorage) -> str | None:
    if not store.blocks:
        return "nothing is packed"
    return prepare(store).refusal or _of_queries(queries, store.dtype, store.kv_heads)


def _of_queries(queries: Tensor, held: torch.dtype, kv_heads: int) -> str | None:
    if queries.dtype not in DTYPES or queries.dtype != held:
        return f"queries are {queries.dtype}, and what is held is {held}"
    group = queries.shape[1] // kv_heads
    return f"{group} query heads a KV head" if group > _HEADS else None


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor | None:
    """See `kernels.attend`."""
    if refusal(queries, store) is not None:
        return None
    queries = queries.contiguous()
    prepared = prepare(store)
    layer = prepared.layer
    output = prepared.output_of(queries)
    layer.all_heads, layer.head_places, layer.shown = layer.kv_heads, None, None
    if shown is not None:
        shown = shown.to(torch.uint8).contiguous()
        layer.shown = shown.data_ptr()
        by_head = shown.ndim == 3
        layer.shown_head = shown.shape[-1] if by_head else 0
        layer.shown_row = shown.shape[-1] * (shown.shape[1] if by_head else 1)
    _run([prepared], [store], queries, output, scaling)
    return output


def attend_together(
    queries: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]], scaling: float
) -> Tensor | None:
    """See `kernels.attend_together`."""
    all_heads = sum(map(len, heads))
    if not all(store.blocks for store in stores):
        return None
    prepared = [prepare(store) for store in stores]
    if any(of_store.refusal for of_store in prepared) or _of_queries(queries, stores[0].dtype, all_heads):
        return None
    queries = queries.contiguous()
    output = prepared[0].output_of(queries)
    for of_store, own in zip(prepared, heads, strict=True):
        layer = of_store.layer
        layer.all_heads, layer.head_places, layer.shown = all_heads, _places(own).data_ptr(), None
    _run(prepared, stores, queries, output, scaling)
    return output


@lru_cache(maxsize=1024)
def _places(heads: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(heads)


def _run(
    prepared: Sequence[Prepared], stores: Sequence[TieredStorage], queries: Tensor, output: Tensor, scaling: float
) -> None:
    for of_store, store in zip(prepared, stores, strict=True):
        layer = of_store.layer
        layer.group = queries.shape[1] // layer.all_heads
        layer.slots = store.length
        layer.threads = torch.get_num_threads()
        layer.queries, layer.output, layer.scaling = queries.data_ptr(), output.data_ptr(), scaling
        of_store.see_dense(store)
    compiled = cpu_library.library()
    assert compiled is not None
    layers = (ctypes.c_void_p * len(prepared))(*(ctypes.addressof(of_store.layer) for of_store in prepared))
    compiled.attend(layers, ctypes.c_int64(len(prepared)))
