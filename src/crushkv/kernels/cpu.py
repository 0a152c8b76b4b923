"""Attention straight from packed tokens on a CPU, by the compiled library (cpu_attention.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiled import cpu_library
from ..compiled.cpu_library import DTYPES
from ..constants import constant
from ..storage import TieredStorage
from .cpu_prepared import Block, Layer, prepare

_CPU = torch.device("cpu")
# Query heads a KV head, as in cpu_attention.h.
_HEADS = 16


def missing() -> str | None:
    if (found := cpu_library.library()) is None:
        return "its library was not built: that takes a C++ compiler (g++) when crushkv is installed from source"
    sizes = found.size_of_layer, found.size_of_block
    for size in sizes:
        size.restype = ctypes.c_int64
    expected = [ctypes.sizeof(Layer), ctypes.sizeof(Block)]
    if [size() for size in sizes] != expected or not hasattr(found, "append"):
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


class _Given:
    """What some groups of heads of a layer hold, as the library is given it, until one of them evicts.

    Args:
        heads: the KV heads of each group; none: there is one of all.
    """

    def __init__(self, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]) -> None:
        self.heads = heads  # what stores hold is found by these, and must not keep them alive
        self.prepared = [prepare(store) for store in stores]
        self.refusal = next((of_store.refusal for of_store in self.prepared if of_store.refusal), None)
        self.kv_heads = sum(map(len, heads)) or stores[0].kv_heads
        self.groups = [Layer.from_buffer_copy(of_store.layer) for of_store in self.prepared]
        for group in self.groups:
            group.all_heads = self.kv_heads
        for group, own in zip(self.groups, heads, strict=False):
            group.head_places = constant(own, _CPU).data_ptr()
        self._array = (ctypes.c_void_p * len(stores))(*map(ctypes.addressof, self.groups))

    def holds(self, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]) -> bool:
        """Whether it is still what these hold."""
        return self.heads == heads and all(
            of_store.version == store.version for of_store, store in zip(self.prepared, stores, strict=True)
        )

    def see_dense(self, stores: Sequence[TieredStorage]) -> None:
        for of_store, store in zip(self.prepared, stores, strict=True):
            of_store.see_dense(store)

    def attend(self, queries: Tensor, stores: Sequence[TieredStorage], scaling: float) -> Tensor:
        """`[B, Hq, 1, Dv]`."""
        queries = queries.contiguous()
        output = self.prepared[0].output_of(queries)
        of_queries, of_output, threads = queries.data_ptr(), output.data_ptr(), torch.get_num_threads()
        for group, store in zip(self.groups, stores, strict=True):
            group.group, group.slots, group.threads = queries.shape[1] // self.kv_heads, store.length, threads
            group.queries, group.output, group.scaling = of_queries, of_output, scaling
        self.see_dense(stores)
        self.call("attend")
        return output

    def call(self, name: str, *given: int) -> None:
        compiled = cpu_library.library()
        assert compiled is not None
        getattr(compiled, name)(self._array, *map(ctypes.c_int64, (len(self.groups), *given)))


# By the first store and how many there are: a group of heads is asked alone, too.
_all_given: WeakKeyDictionary[TieredStorage, dict[int, _Given]] = WeakKeyDictionary()


def _given(stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]] = ()) -> _Given | None:
    """None: the library cannot read them."""
    if not all(store.blocks for store in stores):
        return None
    of_first = _all_given.setdefault(stores[0], {})
    found = of_first.get(len(stores))
    if found is None or not found.holds(stores, heads):
        found = of_first[len(stores)] = _Given(stores, heads)
    return None if found.refusal else found


def append(keys: Tensor, values: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]) -> bool:
    """See `kernels.append`."""
    if not all(store.dense.takes(keys, values) for store in stores) or (given := _given(stores, heads)) is None:
        return False
    given.see_dense(stores)
    given.call("append", keys.data_ptr(), *keys.stride()[:2], values.data_ptr(), *values.stride()[:2])
    for store in stores:
        store.appended()
    return True


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor | None:
    """See `kernels.attend`."""
    given = _given([store])
    if given is None or _of_queries(queries, store.dtype, store.kv_heads):
        return None
    (group,) = given.groups
    group.shown = None
    if shown is not None:
        shown = shown.to(torch.uint8).contiguous()
        group.shown = shown.data_ptr()
        by_head = shown.ndim == 3
        group.shown_head = shown.shape[-1] if by_head else 0
        group.shown_row = shown.shape[-1] * (shown.shape[1] if by_head else 1)
    return given.attend(queries, [store], scaling)


def attend_together(
    queries: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]], scaling: float
) -> Tensor | None:
    """See `kernels.attend_together`."""
    given = _given(stores, heads)
    if given is None or _of_queries(queries, stores[0].dtype, given.kv_heads):
        return None
    return given.attend(queries, stores, scaling)
