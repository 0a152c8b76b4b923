"""Attention of one decoded token a row straight from packed tokens, on a GPU, with Triton.

The tokens of a head are divided among programs, block by block, and what these find is joined. A call launches three
kernels: one prepares the queries, one attends to all that is held, and one joins. What these launches need is prepared
once until a layer's blocks change. The host never waits for the device.

Heads that hold different numbers of tokens are attended to by the same launches: a table says where the tokens of each
group of heads lie (`gpu_layer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiled import interpreted, power_of_two, triton_missing, triton_version, where
from ..storage import RAW, TieredStorage
from .gpu_launch import Launch
from .gpu_layer import Heads, Held, Tails, alike, head_map
from .gpu_prepared import (
    ROWS,
    Prepared,
    Walk,
    key_arguments,
    prepared,
    programs,
    room_of,
    tile_of,
    value_arguments,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_ROWS, _MOST_CHANNELS, _MOST_KEY_GROUPS = 64, 256, 8
LAUNCH = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
"""How a block's programs run: a processor's registers hold three of them (`gpu_prepared.programs`)."""
_MEDIUM_LAUNCH = {"num_warps": 4, "num_stages": 1}
_LARGE_LAUNCH = {"num_warps": 8, "num_stages": 1}
_TAIL_TILE = 32  # tokens that are not packed, at a time: there are few of them beside blocks
_MERGED = 32  # channels that a program of `merge` joins
_LOG2E = 1.4426950408889634
_NARROW_TRITON = (3, 5)  # the first that multiplies matrices of eight columns


def missing() -> str | None:
    return triton_missing()


def runs_on(device: torch.device) -> bool:
    return device.type == ("cpu" if interpreted() else "cuda")


def build() -> str:
    return "Triton" + " interpreted" * interpreted()


def refusal(queries: Tensor, store: TieredStorage) -> str | None:
    if queries.requires_grad and torch.is_grad_enabled():
        return "it computes no gradients"
    keys, values = store.dense.keys_buffer, store.dense.values_buffer
    assert keys is not None and values is not None
    if queries.dtype not in _DTYPES or not queries.dtype == keys.dtype == values.dtype:
        return f"queries, keys and values are {queries.dtype}, {keys.dtype} and {values.dtype}"
    group, rest = divmod(queries.shape[1], store.kv_heads)
    if queries.shape[2] != 1 or rest:
        return f"queries have the shape {list(queries.shape)}"
    if max(keys.shape[-1], values.shape[-1]) > _MOST_CHANNELS:
        return f"a head has more than {_MOST_CHANNELS} channels"
    if any(basis.projection is not None for basis in store.bases or ()):
        return "keys and values are projected"
    if (made := prepared(store)) is None:
        return None
    if any(tensor.shape[-1] % 4 for tensor in (keys, values)):
        return "the channels of a head do not divide by 4"
    if keys.shape[-1] % (4 * made.key_groups):
        return "the channels of a range do not divide by 4"
    if group * made.value_groups > _MOST_ROWS or made.key_groups > _MOST_KEY_GROUPS:
        return "a head has too many queries, or a token too many ranges"
    return None


def append(keys: Tensor, values: Tensor, stores: Sequence[TieredStorage], heads: Heads) -> bool:
    """See `kernels.append`."""
    if not all(store.dense.takes(keys, values) for store in stores):
        return False
    with torch.no_grad(), where(keys):
        tails = _tails_of(stores)
        if tails.refusal is not None:
            return False
        given = keys, values, tails.table, head_map(tuple(heads), keys.shape[1], keys.device), tails.grown(stores)
        launch = _append_launch(keys.dtype, keys.device, keys.shape[3], values.shape[3])
        launch((keys.shape[1], keys.shape[0], 1), *given, *keys.stride()[:2], *values.stride()[:2])
    for store in stores:
        store.appended()
    return True


@lru_cache(maxsize=64)
def _append_launch(dtype: torch.dtype, device: torch.device, size: int, size_of_values: int) -> Launch:
    """For tensors of one kind: what is compiled for others is other code."""
    from .gpu_code import append_token

    sizes = {"D": size, "E": size_of_values}
    sizes |= {"D_FILLED": power_of_two(size), "E_FILLED": power_of_two(size_of_values)}
    strides = ("key_row", "key_head", "value_row", "value_head")
    return Launch(append_token, sizes, ("keys", "values", "tails", "head_map", "grown", *strides), num_warps=1)


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor | None:
    """See `kernels.attend`."""
    if queries.requires_grad and torch.is_grad_enabled():
        return None
    if shown is not None:
        shown = shown.view(queries.shape[0], -1, shown.shape[-1])
        shown = (shown if shown.stride(-1) == 1 else shown.contiguous()).view(torch.uint8)
    return _attend(queries, [store], (), scaling, shown)


def attend_together(queries: Tensor, stores: Sequence[TieredStorage], heads: Heads, scaling: float) -> Tensor | None:
    """See `kernels.attend_together`."""
    return _attend(queries, stores, heads, scaling, None)


def _attend(
    queries: Tensor, stores: Sequence[TieredStorage], heads: Heads, scaling: float, shown: Tensor | None
) -> Tensor | None:
    """None: one kernel does not serve all groups of heads."""
    with torch.no_grad(), where(queries):
        queries = queries.contiguous()
        parts = [prepared(store) for store in stores]
        tails = _tails_of(stores)
        key = (*parts, queries.shape, queries.dtype, scaling, shown is not None, stores[0].dtype)
        plans = _plans.setdefault(stores[0], {})
        found = plans.get(len(stores))
        if found is None or found[0] != key:
            found = plans[len(stores)] = key, _plan(queries, stores, parts, heads, scaling, shown is not None)
        plan = None if tails.refusal else found[1]
        return None if plan is None else plan(queries, stores, tails, shown)


def _plan(
    queries: Tensor,
    stores: Sequence[TieredStorage],
    parts: Sequence[Prepared | None],
    heads: Heads,
    scaling: float,
    masked: bool,
) -> _Plan | None:
    of_all = [part for part in parts if part is not None]
    group = queries.shape[1] // sum(store.kv_heads for store in stores)
    if any(refusal(queries[:, : group * store.kv_heads], store) is not None for store in stores):
        return None
    if of_all and (len(of_all) < len(stores) or not alike(stores)):
        return None
    return _Plan(queries, stores, heads, scaling, masked, Held.of(stores, of_all, heads) if of_all else None)


# By the first store and how many there are: a group of heads is asked alone, too.
_plans: WeakKeyDictionary[TieredStorage, dict[int, tuple[tuple[Any, ...], _Plan | None]]] = WeakKeyDictionary()
_tails: WeakKeyDictionary[TieredStorage, dict[int, Tails]] = WeakKeyDictionary()


def _tails_of(stores: Sequence[TieredStorage]) -> Tails:
    of_first = _tails.setdefault(stores[0], {})
    found = of_first.get(len(stores))
    if found is None or not found.holds(stores):
        found = of_first[len(stores)] = Tails(stores)
    return found


class _Plan:
    """The launches of a layer until its blocks change, for queries of one shape.

    Args:
        stores: what is held, by one group of heads or several.
        held: what is told of the blocks; None: there are none.

    Attributes:
        rooms: numbers of what is prepared of the queries: weights, offsets, and the centres' logits.
        packed_splits: parts that the blocks are divided into, of each head.
        most_splits: of these, the most of one block.
    """

    def __init__(
        self,
        queries: Tensor,
        stores: Sequence[TieredStorage],
        heads: Heads,
        scaling: float,
        masked: bool,
        held: Held | None,
    ) -> None:
        store = stores[0]
        self.held = held  # launches have the addresses of its tensors
        self.device, self.factor, self.masked = queries.device, scaling * _LOG2E, masked
        self.rows, self.heads, _, self.size = queries.shape
        self.dtype = queries.dtype
        self.sizes = store.sizes().sizes
        self.kv_heads = sum(each.kv_heads for each in stores)
        self.group = self.heads // self.kv_heads
        self.filled = power_of_two(self.group, 1)
        self.head_map = head_map(tuple(heads), self.kv_heads, queries.device)
        self.tile = tile_of(self.sizes)
        self.slots = (0, 0)
        self.rotations: tuple[Tensor | None, Tensor | None] = (None, None)
        self.packed_splits = self.most_splits = 0
        if held is not None:
            assert store.bases is not None
            self.rotations = store.bases[0].rotation, store.bases[1].rotation
            self._plan_queries(held)
            self.packed_splits = sum(walk.splits for walk in held.walks)
            self.most_splits = max(walk.splits for walk in held.walks)
        self.attention = self._plan_attention(stores, held)
        self.merge = self._plan_merge()

    def __call__(self, queries: Tensor, stores: Sequence[TieredStorage], tails: Tails, shown: Tensor | None) -> Tensor:
        """`[B, Hq, 1, Dv]`."""
        of_tails = 0
        if longest := max(store.dense.length for store in stores):
            of_tails = Walk.over(longest, self.tail_tile, self.rows * self.kv_heads, self.device).splits
        splits = self.packed_splits + of_tails
        rows, size = self.rows * self.heads, self.sizes[1]
        found = self._new(splits * rows * (size + 2))
        flags = (queries, 0, 0)
        if shown is not None:
            flags = (shown, shown.stride(0), shown.stride(1) if shown.shape[1] > 1 else 0)
        of_keys, of_values = self.rotations
        of_queries = (queries, queries, queries, queries)  # nothing is read of them
        if self.held is not None:
            turned = queries if of_keys is None else torch.empty_like(queries)
            weights = self._new(self.rooms[0], dtype=torch.float16)
            of_queries = turned, weights, self._new(self.rooms[1]), self._new(self.rooms[2])
            self.prepare((self.preparing, 1, 1), *of_queries, queries)
        grid = (max(self.most_splits, of_tails), self.kv_heads, self.rows)
        self.attention(grid, found, queries, *of_queries, *flags, tails.table, tails.grown(stores), of_tails, splits)
        out = self._new(self.rows, self.heads, 1, size, dtype=self.dtype)
        rotation = out if of_values is None else of_values
        self.merge((rows, -(-size // _MERGED), 1), out, found, rotation, splits)
        return out

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _plan_queries(self, held: Held) -> None:
        """What is prepared of the queries: weights of codes, and their products with the centres."""
        from .gpu_code import prepare_queries

        of_keys, centre = self.rotations[0], held.centre
        turning, unused = centre.turning, centre.of_first
        rows, heads = self.rows * self.heads, self.rows * self.kv_heads
        if held.channels is not None:
            self.slots = held.channels.shape[0], held.channels.shape[2]
        blocks, slots = self.slots
        of_slots = {"channels": held.channels, "units": held.units, "middles": held.middles}
        self.rooms = rows * blocks * slots, rows * blocks, heads * centre.positions * self.filled
        own = rows if blocks or of_keys is not None else 0
        together = min(64, power_of_two(heads * self.filled))
        parts, tile = -(-heads * self.filled // together), 16 if interpreted() else 64
        shares = min(-(-centre.positions // tile), max(1, 2 * programs(self.device) // parts))
        self.preparing = own + parts * shares
        arguments = {
            **(of_slots if blocks else dict.fromkeys(of_slots, unused)),
            "first": turning.first, "second": turning.second, "of_first": centre.of_first,
            "of_second": centre.of_second, "table": turning.table, "table_rest": turning.table_rest,
            "rotation": unused if of_keys is None else of_keys, "queried": rows, "positions": centre.positions,
            "rows": own, "shares": shares, "factor": self.factor, "D": self.size, "KV_HEADS": self.kv_heads,
            "G": self.group, "G_FILLED": self.filled, "BLOCKS": blocks, "SLOTS": max(slots, 16),
            "K": len(turning.first), "ROWS": together, "TILE": tile, "D_FILLED": power_of_two(self.size),
            "EXACT": self.dtype == torch.float32, "TURNED": of_keys is not None,
        }  # fmt: skip
        changing = ("turned", "weights", "offsets", "of_centre", "queries")
        self.prepare = Launch(prepare_queries, arguments, changing, num_warps=4)

    def _plan_attention(self, stores: Sequence[TieredStorage], held: Held | None) -> Launch:
        from .gpu_code import attend_everywhere

        kinds = list[dict[str, int]]()
        if held is not None:
            for block, even in zip(stores[0].blocks, held.even, strict=True):
                kinds.append(self._kind(key_arguments(block[0]) | value_arguments(block[1]) | {"EVEN": even}))
        kinds.append(self._kind({"K_BITS": RAW, "V_BITS": RAW}))
        widest = max(kind["N"] for kind in kinds)
        options, self.tail_tile = _MEDIUM_LAUNCH, self.tile
        if widest > 16:
            options = _LARGE_LAUNCH
        elif held is not None and widest == 8:
            options = LAUNCH
        if held is not None:
            self.tail_tile = min(self.tile, _TAIL_TILE)
        size_of_keys, size_of_values = self.sizes
        arguments = {
            "table": self.head_map if held is None else held.table, "head_map": self.head_map, "groups": len(stores),
            "factor": self.factor, "of_centre_length": 0 if held is None else held.centre.positions,
            "position_step": int(held is not None and stores[0].centred_before_rope),
            "D": size_of_keys, "E": size_of_values, "D_FILLED": power_of_two(size_of_keys),
            "E_FILLED": power_of_two(size_of_values), "G": self.group, "G_FILLED": self.filled,
            "BLOCKS": len(kinds) - 1, "KINDS": _code(kinds), "SLOTS": max(self.slots[1], 16),
            "ROOM": room_of(size_of_keys), "ROWS": ROWS, "MASKED": self.masked, "TILE": self.tile,
            "TAIL_TILE": self.tail_tile, "PRODUCT": _product_dtype(self.dtype),
        }  # fmt: skip
        of_queries = ("found", "queries", "turned", "weights", "offsets", "of_centre")
        of_tails = ("tails", "grown", "tail_splits", "all_splits")
        changing = (*of_queries, "shown", "shown_row", "shown_head", *of_tails)
        return Launch(attend_everywhere, arguments, changing, **options)

    def _kind(self, of: dict[str, Any]) -> dict[str, int]:
        """What the code for a block is made for; see `gpu_code.KIND`."""
        of = {"K_GROUPS": 1, "V_GROUPS": 1, "EVEN": False} | of
        least = 8 if triton_version() >= _NARROW_TRITON else 16
        return of | {
            "K_GROUPS_FILLED": power_of_two(of["K_GROUPS"], 1),
            "V_GROUPS_FILLED": power_of_two(of["V_GROUPS"], 1),
            "K_GROUP_FILLED": power_of_two(self.size // of["K_GROUPS"]),
            "N": power_of_two(self.group * of["V_GROUPS"], least),
        }

    def _plan_merge(self) -> Launch:
        from .gpu_code import merge

        size = self.sizes[1]
        arguments = {
            "rotated_splits": self.packed_splits, "E": size, "E_FILLED": power_of_two(size), "CHANNELS": _MERGED,
            "ROTATED": self.rotations[1] is not None,
            "SPLITS": 16,
        }  # fmt: skip
        return Launch(merge, arguments, ("out", "found", "rotation", "all_splits"), num_warps=4)


def _code(kinds: Sequence[dict[str, int]]) -> int:
    """All kinds as one number, which Triton has code made for: see `gpu_code.KIND`."""
    from .gpu_code import KIND, KIND_BITS

    numbers = [int(kind[name]) for kind in kinds for name in KIND]
    return sum(number << (KIND_BITS * place) for place, number in enumerate(numbers))


def _product_dtype(dtype: torch.dtype) -> Any:
    """In which numbers of a dtype are multiplied. The interpreter takes bfloat16 for integers there."""
    import triton.language as tl

    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
