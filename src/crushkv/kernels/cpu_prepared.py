"""What the CPU kernels read of a storage, as the compiled library takes it: pointers in the structures below."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiled.cpu_basis import interval_tables
from ..compiled.cpu_library import DTYPES, FILLED
from ..rope import Rope, pairs_of
from ..storage import RAW, ChannelFormat, TieredStorage
from ..storage.block import PackedTensor
from ..storage.channels import ChannelTensor

_RAW, _BY_TOKEN, _BY_CHANNEL = range(3)
# Channels of a head, as in cpu_attention.h.
_SIZE = 256

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Numbers(ctypes.Structure):
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


class Block(ctypes.Structure):
    _fields_ = (
        ("tokens", _long),
        ("keys", Numbers),
        ("values", Numbers),
        ("plane_row", _pointer * 3),
        ("width", _pointer),
        ("unit", _pointer),
    )


class Layer(ctypes.Structure):
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


@dataclass(frozen=True)
class _Rows:
    """Where the codes of each channel lie.

    Attributes:
        of_planes: int32 `[Hkv * D]` for each plane of a format, the channel's row in it; -1: it has none.
        widths: uint8 `[Hkv, D]`, its bits.
    """

    of_planes: Sequence[Tensor]
    widths: Tensor

    @classmethod
    def of(cls, form: ChannelFormat) -> _Rows:
        found = []
        for _, channels, _ in form.planes:
            row = torch.full((form.widths.numel(),), -1, dtype=torch.int32)
            row[channels] = torch.arange(len(channels), dtype=torch.int32)
            found.append(row)
        return cls(found, form.widths.to(torch.uint8))


@dataclass(frozen=True)
class _Turns:
    """How RoPE turns the channels: int32 `first [pairs]` with `second`; those that it does not turn, `still`."""

    first: Tensor
    second: Tensor
    still: Tensor
    frequencies: tuple[float, ...]  # of each pair

    @classmethod
    def of(cls, rope: Rope | None, size: int) -> _Turns:
        pairs, still = ([], list(range(size))) if rope is None else pairs_of(rope.partner.tolist())
        first, second = [a for a, _ in pairs], [b for _, b in pairs]
        # R_p x has x[a] cos(p f[a]) + x[b] sin(p f[a]) in channel a.
        frequencies = () if rope is None else tuple(rope.frequencies[first].tolist())
        of_first, of_second, of_still = (torch.tensor(x, dtype=torch.int32) for x in (first, second, still))
        return cls(of_first, of_second, of_still, frequencies)


# Made once for each format and RoPE, which layers and caches share.
_rows: WeakKeyDictionary[ChannelFormat, _Rows] = WeakKeyDictionary()
_turns: WeakKeyDictionary[Rope, _Turns] = WeakKeyDictionary()


def _rows_of(form: ChannelFormat) -> _Rows:
    if (found := _rows.get(form)) is None:
        found = _rows[form] = _Rows.of(form)
    return found


def _turns_of(rope: Rope | None, size: int) -> _Turns:
    if rope is None:
        return _Turns.of(None, size)
    if (found := _turns.get(rope)) is None:
        found = _turns[rope] = _Turns.of(rope, size)
    return found


class Prepared:
    """What stays the same from one eviction to the next, as the library reads it."""

    def __init__(self, store: TieredStorage) -> None:
        self.version = store.version
        self.held: list[Tensor] = []  # referred to by pointers alone
        self._buffers: tuple[Tensor | None, Tensor | None] = (None, None)  # of the tokens that came since
        self.refusal = _refusal(store)
        self.layer = Layer()
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
        self.block_array = (Block * (layer.blocks + 1))()
        self.came = self.block_array[layer.blocks]
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

    def _packed(self, numbers: Numbers, tensor: PackedTensor) -> None:
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

    def _channels(self, block: Block, keys: ChannelTensor, spread: Tensor | None) -> None:
        assert spread is not None
        numbers, form = block.keys, keys.form
        rows = _rows_of(form)
        numbers.kind = _BY_CHANNEL
        for i, (width, channels, _) in enumerate(form.planes):
            block.plane_row[i] = self._held(rows.of_planes[i])
            numbers.planes[i], numbers.plane_rows[i] = self._of_block(keys.tensors[f"plane{width}"]), len(channels)
        numbers.span = self._of_block(keys.tensors["scale"])
        block.width = self._held(rows.widths)
        block.unit = self._held((form.steps * spread.float())[:, :, 0])

    def _turns(self, rope: Rope | None, size: int, seen: int) -> None:
        layer = self.layer
        turns = _turns_of(rope, size)
        layer.pairs, layer.padded = len(turns.first), -(-len(turns.first) // FILLED) * FILLED
        layer.first, layer.second, layer.still = map(self._held, (turns.first, turns.second, turns.still))
        layer.still_count = len(turns.still)
        if turns.frequencies:
            layer.middle, layer.beside = map(self._held, interval_tables(turns.frequencies, seen))

    def see_dense(self, store: TieredStorage) -> None:
        """Tells the library where the tokens are that came since."""
        came, dense = self.came, store.dense
        keys, values = buffers = dense.keys_buffer, dense.values_buffer
        came.tokens = dense.length
        if self._buffers[0] is not keys or self._buffers[1] is not values:
            assert keys is not None and values is not None
            _raw(came.keys, keys)
            _raw(came.values, values)
            self._buffers = buffers


def _raw(numbers: Numbers, tensor: Tensor) -> None:
    """Numbers `[B, Hkv, P, D]` as the model made them."""
    numbers.kind, numbers.raw = _RAW, tensor.data_ptr()
    numbers.row_stride, numbers.head_stride = tensor.stride()[:2]


_prepared_stores: WeakKeyDictionary[TieredStorage, Prepared] = WeakKeyDictionary()


def prepare(store: TieredStorage) -> Prepared:
    """What the library reads of a storage, made anew where packed tokens have moved."""
    found = _prepared_stores.get(store)
    if found is None or found.version != store.version:
        found = _prepared_stores[store] = Prepared(store)
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
