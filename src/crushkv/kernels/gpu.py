"""Attention of one decoded token a row straight from packed tokens, on a GPU, with Triton.

The tokens of a head are divided among programs, block by block, and what these find is joined. A call launches one
kernel that prepares the queries, one for their products with the centres, one a block, one for the tokens that are not
packed, and one that joins. What these launches need is prepared once until a layer's blocks change. The host never
waits for the device.

Heads that hold different numbers of tokens are attended to by the same launches: a table says where the tokens of each
group of heads lie (`gpu_joint`). Only for the tokens that are not packed, there is one launch for each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiled import interpreted, power_of_two, triton_missing, where
from ..storage import RAW, TieredStorage
from .gpu_joint import Joint, alike
from .gpu_launch import Launch
from .gpu_prepared import (
    ROWS,
    Prepared,
    Walk,
    key_arguments,
    prepared,
    programs,
    room_of,
    stretch_of,
    tile_of,
    value_arguments,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_ROWS, _MOST_CHANNELS, _MOST_KEY_GROUPS = 64, 256, 8
LAUNCH = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
"""How a block's programs run: a processor's registers hold three of them (`gpu_prepared.programs`)."""
_MEDIUM_LAUNCH = {"num_warps": 4, "num_stages": 1}
_LARGE_LAUNCH = {"num_warps": 8, "num_stages": 1}
_MERGED = 32  # channels that a program of `merge` joins
_LOG2E = 1.4426950408889634
_LEAST_TRITON, _NARROW_TRITON = (3, 3), (3, 5)  # and the first that multiplies matrices of eight columns


def missing() -> str | None:
    if (reason := triton_missing()) is not None:
        return reason
    if _triton() < _LEAST_TRITON:
        return f"Triton {'.'.join(map(str, _LEAST_TRITON))} or later is needed"
    return None


@lru_cache
def _triton() -> tuple[int, ...]:
    return tuple(map(int, version("triton").split(".")[:2]))


def runs_on(device: torch.device) -> bool:
    return device.type == ("cpu" if interpreted() else "cuda")


def build() -> str:
    return "Triton" + " interpreted" * interpreted()


def refusal(queries: Tensor, store: TieredStorage) -> str | None:
    if queries.requires_grad and torch.is_grad_enabled():
        return "it computes no gradients"
    keys, values = store.dense.keys, store.dense.values
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


def append(keys: Tensor, values: Tensor, stores: Sequence[TieredStorage], heads: Sequence[tuple[int, ...]]) -> bool:
    """See `kernels.append`."""
    return False


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor | None:
    """See `kernels.attend`."""
    if queries.requires_grad and torch.is_grad_enabled():
        return None
    with torch.no_grad(), where(queries):
        queries = queries.contiguous()
        if shown is not None:
            shown = shown.view(queries.shape[0], -1, shown.shape[-1])
            shown = (shown if shown.stride(-1) == 1 else shown.contiguous()).view(torch.uint8)
        tail = _tail(store)
        made = prepared(store)
        key = (made, queries.shape, queries.dtype, scaling, shown is not None, _like(tail))
        found = _plans.get(store)
        if found is None or found[0] != key:
            refused = refusal(queries, store) is not None
            found = _plans[store] = key, None if refused else _Plan(queries, [store], scaling, shown is not None, made)
        return None if found[1] is None else found[1](queries, [tail], shown)


def attend_together(
    queries: Tensor, stores: Sequence[TieredStorage], numbers: Sequence[tuple[int, ...]], scaling: float
) -> Tensor | None:
    """See `kernels.attend_together`."""
    parts = [prepared(store) for store in stores]
    with torch.no_grad(), where(queries):
        queries = queries.contiguous()
        tails = [_tail(store) for store in stores]
        key = (*parts, queries.shape, queries.dtype, scaling, *map(_like, tails))
        found = _plans_together.get(stores[0])
        if found is None or found[0] != key:
            made = _joint(queries, stores, parts, numbers)
            plan = None if made is None else _Plan(queries, stores, scaling, False, made)
            found = _plans_together[stores[0]] = key, plan
        return None if found[1] is None else found[1](queries, tails, None)


def _joint(
    queries: Tensor,
    stores: Sequence[TieredStorage],
    parts: Sequence[Prepared | None],
    numbers: Sequence[tuple[int, ...]],
) -> Joint | None:
    """None: one kernel does not serve all groups of heads."""
    of_all = [part for part in parts if part is not None]
    group = queries.shape[1] // sum(map(len, numbers))
    refused = any(refusal(queries[:, : group * store.kv_heads], store) is not None for store in stores)
    if refused or len(of_all) < len(stores) or not alike(stores):
        return None
    return Joint.of(stores, of_all, numbers)


Tail = tuple[Tensor, Tensor]  # keys and values of the tokens that are not packed
Plans = WeakKeyDictionary[TieredStorage, tuple[tuple[Any, ...], "_Plan | None"]]  # None: refused
_plans: Plans = WeakKeyDictionary()
_plans_together: Plans = WeakKeyDictionary()


def _tail(store: TieredStorage) -> Tail:
    keys, values = store.dense.keys, store.dense.values  # each look at them makes a view anew
    assert keys is not None and values is not None
    return keys, values


def _like(tail: Tail) -> tuple[Any, ...]:
    """Whether numbers are aligned, and small enough for 32 bits: Triton has other code for these."""
    keys, values = tail
    strides = (*keys.stride()[:2], *values.stride()[:2])
    alike = ((stride % 16, stride >> 31) for stride in strides)
    kinds = keys.dtype, values.dtype, keys.shape[-1], values.shape[-1]
    return (*kinds, keys.data_ptr() % 16, values.data_ptr() % 16, *alike)


class _Plan:
    """The launches of a layer until its blocks change, for queries of one shape.

    Args:
        stores: what is held; by several groups of heads if it is `made` a `Joint`.

    Attributes:
        blocks: the launch of each, and how many programs share the tokens of a head.
        room: numbers of what is prepared of the queries: in float16, in float32, and the centres' logits.
        dense: of the tokens that are not packed.
    """

    def __init__(
        self,
        queries: Tensor,
        stores: Sequence[TieredStorage],
        scaling: float,
        masked: bool,
        made: Prepared | Joint | None,
    ) -> None:
        store, self.made = stores[0], made
        keys, values = _tail(store)
        self.device, self.factor, self.masked = queries.device, scaling * _LOG2E, masked
        self.rows, self.heads, _, self.size = queries.shape
        self.dtype = queries.dtype
        self.sizes = (self.size, values.shape[-1])
        self.kv_heads = sum(each.kv_heads for each in stores)
        self.group = self.heads // self.kv_heads
        self.filled = power_of_two(self.group, 1)
        self.tile = tile_of(self.sizes)
        self.slots = (0, 0)
        self.blocks: list[tuple[Launch, int]] = []
        self.packed_splits = 0
        self.packed_tokens = 0
        self.rotations: tuple[Tensor | None, Tensor | None] = (None, None)
        self.head_maps = made.heads if isinstance(made, Joint) else [queries]  # nobody looks
        if made is not None:
            assert store.bases is not None
            self.rotations = store.bases[0].rotation, store.bases[1].rotation
            self._plan_queries(made)
            of_positions = made.parts[0].positions if isinstance(made, Joint) else made.positions
            centred = {
                "of_centre_length": made.centre.positions,
                "position_step": int(store.bases[0].rope is not None),
                "positions": of_positions,
                "positions_length": of_positions.shape[2],
                "CENTRED": True,
            }
            for number, ((keys_of, values_of), walk) in enumerate(zip(store.blocks, made.walks, strict=True)):
                arguments = centred | key_arguments(keys_of, self.size) | value_arguments(values_of)
                if number in made.slots:
                    arguments |= self._slot_arguments(made, number)
                self.blocks.append((self._block(made, number, walk, arguments), walk.splits))
                self.packed_splits += walk.splits
                self.packed_tokens += walk.tokens
        self.dense = self._plan_dense(isinstance(made, Joint))
        self.merge = self._plan_merge()

    def __call__(self, queries: Tensor, tails: Sequence[Tail], shown: Tensor | None) -> Tensor:
        """`[B, Hq, 1, Dv]`."""
        splits, walk = self.packed_splits, None
        if longest := max(keys.shape[2] for keys, _ in tails):
            walk = Walk.over(longest, self.tile, self.rows * self.kv_heads, self.device)
            splits += walk.splits
        rows, size = self.rows * self.heads, self.sizes[1]
        found = self._new(splits * rows * (size + 2))
        flags = (queries, 0, 0)
        if shown is not None:
            flags = (shown, shown.stride(0), shown.stride(1) if shown.shape[1] > 1 else 0)
        of_keys, of_values = self.rotations
        if self.blocks:
            turned = queries if of_keys is None else torch.empty_like(queries)
            halves = self._new(self.room[0], dtype=torch.float16)
            floats, logits = self._new(self.room[1]), self._new(self.room[2])
            self.prepare((rows, 1, 1), halves, floats, turned, queries)
            self.centre(self.centre_grid, logits, halves, floats)
            for launch, of in self.blocks:
                grid = (of, self.kv_heads, self.rows)
                launch(grid, found, splits, turned, *flags, halves, floats, logits)
        if walk is not None:
            for (keys, values), head_map in zip(tails, self.head_maps, strict=True):
                strides = keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)
                tokens = keys.shape[2]
                of_dense = (keys, values, *strides, tokens, stretch_of(tokens), walk.splits, head_map)
                self.dense((walk.splits, keys.shape[1], self.rows), found, splits, queries, *flags, *of_dense)
        out = self._new(self.rows, self.heads, 1, size, dtype=self.dtype)
        rotation = out if of_values is None else of_values
        self.merge((rows, -(-size // _MERGED), 1), out, found, rotation, splits)
        return out

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _plan_queries(self, made: Prepared | Joint) -> None:
        """What is prepared of the queries, and their products with the centres."""
        from .gpu_code import centre_logits, prepare_queries

        of_keys, centre = self.rotations[0], made.centre
        turning, unused = centre.turning, centre.of_first
        rows, width, heads = self.rows * self.heads, len(turning.first), self.rows * self.kv_heads
        exact = self.dtype == torch.float32
        if made.channels is not None:
            self.slots = made.channels.shape[0], made.channels.shape[2]
        blocks, slots = self.slots
        of_slots = {"channels": made.channels, "units": made.units, "middles": made.middles}
        arguments = {
            **(of_slots if blocks else dict.fromkeys(of_slots, unused)),
            "first": turning.first, "second": turning.second, "of_first": centre.of_first,
            "of_second": centre.of_second, "rotation": unused if of_keys is None else of_keys, "queried": rows,
            "factor": self.factor, "D": self.size, "KV_HEADS": self.kv_heads, "G": self.group, "BLOCKS": blocks,
            "SLOTS": max(slots, 16), "K": width, "D_FILLED": power_of_two(self.size), "EXACT": exact,
            "TURNED": of_keys is not None,
        }  # fmt: skip
        self.prepare = Launch(prepare_queries, arguments, ("halves", "floats", "turned", "queries"), num_warps=4)
        of_queries = rows * (blocks * slots + width * (1 + exact)), rows * (blocks + 1)
        self.room = *of_queries, heads * centre.positions * self.filled

        together = min(64, power_of_two(heads * self.filled))
        tiles, tile = -(-heads * self.filled // together), 16 if interpreted() else 64
        shares = min(-(-centre.positions // tile), max(1, 2 * programs(self.device) // tiles))
        self.centre_grid = (shares, tiles, 1)
        arguments = {
            "table": turning.table, "table_rest": turning.table_rest, "heads": heads, "positions": centre.positions,
            "skipped_halves": rows * blocks * slots, "skipped_floats": rows * blocks, "G": self.group,
            "G_FILLED": self.filled, "K": width, "ROWS": together, "TILE": tile, "EXACT": exact,
        }  # fmt: skip
        self.centre = Launch(centre_logits, arguments, ("out", "halves", "floats"), num_warps=4)

    def _slot_arguments(self, made: Prepared | Joint, number: int) -> dict[str, Any]:
        """Arguments of a block whose keys have widths by channel."""
        of = made.slots[number]
        place = list(made.slots).index(number)
        first = place * self.rows * self.heads
        return {"lines": of.lines, "SLOTS": self.slots[1], "ROOM": room_of(self.size), "first_weights": first}

    def _block(self, made: Prepared | Joint, number: int, walk: Walk, arguments: dict[str, Any]) -> Launch:
        even = walk.even
        if isinstance(made, Joint):
            even = made.even[number]
            arguments = arguments | {"table": made.tables[number], "head_map": made.head_map, "JOINT": 1}
        arguments = arguments | {"P": walk.tokens, "length": walk.length, "splits": walk.splits, "EVEN": even}
        return self._attention(arguments, ("weights", "offsets", "of_centre"))

    def _plan_dense(self, some_heads: bool) -> Launch:
        unused = self._new(1)
        arguments = {
            **dict.fromkeys(("weights", "offsets", "of_centre"), unused), "positions": unused, "K_BITS": RAW,
            "V_BITS": RAW, "EVEN": False, "JOINT": 2 * some_heads,
        }  # fmt: skip
        strides = ("k_row", "k_head", "v_row", "v_head")
        return self._attention(arguments, ("k0", "v0", *strides, "P", "length", "splits", "head_map"))

    def _attention(self, arguments: dict[str, Any], changing: tuple[str, ...]) -> Launch:
        """Over one block, or over what is not packed."""
        from .gpu_code import attend_block

        size_of_keys, size_of_values = self.sizes
        least = 8 if _triton() >= _NARROW_TRITON else 16
        columns = power_of_two(self.group * arguments.get("V_GROUPS", 1), least)
        unused = arguments["positions"]
        changing = ("found", "all_splits", "queries", "shown", "shown_row", "shown_head", *changing)
        pointers = ("table", "head_map", "lines", "k1", "k2", "k_zero", "k_span", "v1", "v_zero", "v_span")
        numbers = ("k_row", "k_head", "v_row", "v_head", "first_weights")
        of_positions = ("of_centre_length", "position_step", "positions_length")
        every = (
            dict.fromkeys(pointers, unused)
            | dict.fromkeys((*numbers, *of_positions), 0)
            | {"CENTRED": False, "SLOTS": 16, "ROOM": 16, "K_GROUPS": 1, "K_GROUP_FILLED": 16, "V_GROUPS": 1}
            | {"JOINT": 0}
            | arguments
            | {
                "factor": self.factor, "first_slot": self.packed_tokens, "first_split": self.packed_splits,
                "all_heads": self.kv_heads,
                "D": size_of_keys, "E": size_of_values, "D_FILLED": power_of_two(size_of_keys),
                "E_FILLED": power_of_two(size_of_values), "G": self.group, "G_FILLED": self.filled, "N": columns,
                "K_GROUPS_FILLED": power_of_two(arguments.get("K_GROUPS", 1), 1),
                "V_GROUPS_FILLED": power_of_two(arguments.get("V_GROUPS", 1), 1),
                "ROWS": ROWS, "MASKED": self.masked, "TILE": self.tile, "PRODUCT": _product_dtype(self.dtype),
            }
        )  # fmt: skip
        if columns > 16:
            options = _LARGE_LAUNCH
        else:
            options = LAUNCH if columns == 8 and arguments["K_BITS"] != RAW else _MEDIUM_LAUNCH
        staying = {name: value for name, value in every.items() if name not in changing}
        return Launch(attend_block, staying, changing, **options)

    def _plan_merge(self) -> Launch:
        from .gpu_code import merge

        size = self.sizes[1]
        arguments = {
            "rotated_splits": self.packed_splits, "E": size, "E_FILLED": power_of_two(size), "CHANNELS": _MERGED,
            "ROTATED": self.rotations[1] is not None,
            "SPLITS": 16,
        }  # fmt: skip
        return Launch(merge, arguments, ("out", "found", "rotation", "all_splits"), num_warps=4)


def _product_dtype(dtype: torch.dtype) -> Any:
    """In which numbers of a dtype are multiplied. The interpreter takes bfloat16 for integers there."""
    import triton.language as tl

    if dtype == torch.bfloat16 and interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
