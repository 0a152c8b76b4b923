"""Attention straight from packed tokens on a CPU, by the compiled library (cpu_attention.cpp), which gets pointers in
the structures below."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiled import cpu_library
from ..compiled.cpu_basis import interval_tables
from ..compiled.cpu_library import DTYPES, FILLED
from ..rope import Rope, pairs_of
from ..storage import RAW, TieredStorage
from ..storage.block import PackedTensor
from ..storage.channels import ChannelTensor

_RAW, _BY_TOKEN, _BY_CHANNEL = range(3)
# As in cpu_attention.h.
_HEADS, _SIZE = 16, 256

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Numbers(ctypes.Structure):
    _fields_ = (
        ("kind", _int),
        ("bits", _int),
        ("groups", _int),
        ("unused", _int),
        ("planes", _pointer * 3),
        ("plane_rows", _long * 3),
        ("zero", _pointer),
        ("span", _pointer),
        ("raw", _pointer),
        ("row_stride", _long),
        ("head_stride", _long),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        ("tokens", _long),
        ("keys", _Numbers),
        ("values", _Numbers),
        ("plane_row", _pointer * 3),
        ("width", _pointer),
        ("unit", _pointer),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _long) for name in ("rows", "kv_heads", "group", "size", "value_size")),
        *((name, _long) for name in ("kept", "slots", "blocks", "pairs", "padded")),
        *((name, _pointer) for name in ("block", "positions", "centre", "first", "second", "still")),
        ("still_count", _long),
        *((name, _pointer) for name in ("middle", "beside", "of_keys", "of_values")),
        ("dtype", _int),
        ("threads", _int),
        *((name, _pointer) for name in ("queries", "output")),
        ("all_heads", _long),
        *((name, _pointer) for name in ("head_places", "shown")),
        ("shown_row", _long),
        ("shown_head", _long),
        ("scaling", ctypes.c_float),
    )


takes_groups = True


def missing() -> str | None:
    if (found := cpu_library.library()) is None:
        return "its library was not built: that takes a C++ compiler (g++) when crushkv is installed from source"
    sizes = found.size_of_layer, found.size_of_block
    for size in sizes:
        size.restype = _long
    if [size() for size in sizes] != [ctypes.sizeof(_Layer), ctypes.sizeof(_Block)]:
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
    return _prepared(store).refusal or _of_queries(queries, store.dtype, store.kv_heads)


def _of_queries(queries: Tensor, held: torch.dtype, kv_heads: int) -> str | None:
    if queries.dtype not in DTYPES or queries.dtype != held:
        return f"queries are {queries.dtype}, and what is held is {held}"
    group = queries.shape[1] // kv_heads
    return f"{group} query heads a KV head" if group > _HEADS else None


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor:
    """See `kernels.attend`."""
    queries = queries.contiguous()
    prepared = _prepared(store)
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
    prepared = [_prepared(store) for store in stores]
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
    prepared: Sequence[_Prepared], stores: Sequence[TieredStorage], queries: Tensor, output: Tensor, scaling: float
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
    layers = (_pointer * len(prepared))(*(ctypes.addressof(of_store.layer) for of_store in prepared))
    compiled.attend(layers, _long(len(prepared)))


class _Prepared:
    """What stays the same from one eviction to the next, as the library reads it."""

    def __init__(self, store: TieredStorage) -> None:
        self.version = store.version
        self.held: list[Tensor] = []  # referred to by pointers alone
        self.refusal = _refusal(store)
        self.layer = _Layer()
        if self.refusal is None:
            self._fill(store)

    def output_of(self, queries: Tensor) -> Tensor:
        rows, heads, _, _ = queries.shape
        return queries.new_empty((rows, heads, 1, self.layer.value_size))

    def _fill(self, store: TieredStorage) -> None:
        assert store.bases is not None and store.kept_positions is not None
        of_keys, of_values = store.bases
        layer = self.layer
        keys, values = store.dense.keys, store.dense.values
        assert keys is not None and values is not None
        layer.rows, layer.kv_heads, _, layer.size = keys.shape
        layer.value_size = values.shape[-1]
        layer.kept, layer.blocks = store.kept, len(store.blocks)
        layer.dtype = DTYPES[keys.dtype]
        self.block_array = (_Block * (layer.blocks + 1))()
        layer.block = ctypes.cast(self.block_array, ctypes.c_void_p)
        for block, (of_block, its_values) in zip(self.block_array, store.blocks, strict=False):
            block.tokens = its_values.tokens
            self._packed(block.values, its_values)
            if isinstance(of_block, ChannelTensor):
                self._channels(block, of_block, of_keys.spread)
            else:
                self._packed(block.keys, of_block)
        layer.positions = self._held(store.kept_positions)
        layer.of_keys, layer.of_values = self._held(of_keys.rotation), self._held(of_values.rotation)
        if of_keys.centre is not None:
            layer.centre = self._held(of_keys.centre.float())
            self._turns(of_keys.rope, layer.size, store.seen)

    def _held(self, tensor: Tensor | None) -> int | None:
        """Where a tensor lies, which is kept as long as this is."""
        if tensor is None:
            return None
        contiguous = tensor.contiguous()
        self.held.append(contiguous)
        return contiguous.data_ptr()

    def _of_block(self, tensor: Tensor) -> int | None:
        """Where a tensor of a block lies, which the storage keeps: an eviction has to free it."""
        return tensor.data_ptr() if tensor.is_contiguous() else self._held(tensor)

    def _packed(self, numbers: _Numbers, tensor: PackedTensor) -> None:
        held = tensor.tensors
        numbers.bits = tensor.bits
        if tensor.bits == RAW:
            raw = held["raw"].contiguous()
            if raw is not held["raw"]:
                self.held.append(raw)
            _raw(numbers, raw)
            return
        numbers.kind, numbers.groups = _BY_TOKEN, held["zero"].shape[-1]
        for i, name in enumerate(name for name in held if name.startswith("plane")):
            numbers.planes[i] = self._of_block(held[name])
        numbers.zero, numbers.span = self._of_block(held["zero"]), self._of_block(held["span"])

    def _channels(self, block: _Block, keys: ChannelTensor, spread: Tensor | None) -> None:
        assert spread is not None
        numbers, form = block.keys, keys.form
        numbers.kind = _BY_CHANNEL
        for i, (width, channels, _) in enumerate(form.planes):
            row = torch.full((form.widths.numel(),), -1, dtype=torch.int32)
            row[channels] = torch.arange(len(channels), dtype=torch.int32)
            block.plane_row[i] = self._held(row)
            numbers.planes[i], numbers.plane_rows[i] = self._of_block(keys.tensors[f"plane{width}"]), len(channels)
        numbers.span = self._of_block(keys.tensors["scale"])
        block.width = self._held(form.widths.to(torch.uint8))
        block.unit = self._held((form.steps * spread.float())[:, :, 0])

    def _turns(self, rope: Rope | None, size: int, seen: int) -> None:
        layer = self.layer
        if rope is None:
            first, second, still, frequencies = [], [], list(range(size)), torch.zeros(0)
        else:
            pairs, still = pairs_of(rope.partner.tolist())
            first, second = [a for a, _ in pairs], [b for _, b in pairs]
            # R_p x has x[a] cos(p f[a]) + x[b] sin(p f[a]) in channel a.
            frequencies = rope.frequencies[first]
        layer.pairs, layer.padded = len(first), -(-len(first) // FILLED) * FILLED
        layer.first, layer.second = (self._held(torch.tensor(x, dtype=torch.int32)) for x in (first, second))
        layer.still, layer.still_count = self._held(torch.tensor(still, dtype=torch.int32)), len(still)
        if first:
            tables = interval_tables(tuple(frequencies.tolist()), seen)
            layer.middle, layer.beside = map(self._held, tables)

    def see_dense(self, store: TieredStorage) -> None:
        """Tells the library where the tokens are that came since."""
        block, dense = self.block_array[self.layer.blocks], store.dense
        keys, values = dense.keys_buffer, dense.values_buffer
        assert keys is not None and values is not None
        block.tokens = dense.length
        for numbers, tensor in ((block.keys, keys), (block.values, values)):
            _raw(numbers, tensor)


def _raw(numbers: _Numbers, tensor: Tensor) -> None:
    """Numbers `[B, Hkv, P, D]` as the model made them."""
    numbers.kind, numbers.raw = _RAW, tensor.data_ptr()
    numbers.row_stride, numbers.head_stride = tensor.stride()[:2]


_prepared_stores: WeakKeyDictionary[TieredStorage, _Prepared] = WeakKeyDictionary()


def _prepared(store: TieredStorage) -> _Prepared:
    found = _prepared_stores.get(store)
    if found is None or found.version != store.version:
        found = _prepared_stores[store] = _Prepared(store)
    return found


def _refusal(store: TieredStorage) -> str | None:
    """Why what is held cannot be read as it is."""
    assert store.bases is not None
    if any(basis.projection is not None for basis in store.bases):
        return "keys and values are projected to a lower rank"
    keys, values = store.dense.keys, store.dense.values
    assert keys is not None and values is not None
    if max(keys.shape[-1], values.shape[-1]) > _SIZE:
        return f"heads of more than {_SIZE} channels"
    packed: Sequence[PackedTensor] = [p for pair in store.blocks for p in pair if isinstance(p, PackedTensor)]
    for tensor, size in ((t, t.tensors["zero"]) for t in packed if t.bits != RAW):
        groups, channels = size.shape[-1], tensor.tensors["plane0"].shape[-1]
        if groups * -(-channels // groups // FILLED) * FILLED > _SIZE:
            return f"{groups} groups of {channels // groups} numbers"
    return None
