"""What the GPU's kernels need of a layer besides the tokens: made once for each eviction, or once for many layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..compiled import interpreted, power_of_two
from ..rope import Rope, angles, pairs_of
from ..storage import RAW, ChannelFormat, TieredStorage
from ..storage.basis import Basis
from ..storage.block import PackedTensor
from ..storage.channels import ChannelTensor

ROWS = 32
"""Channels of a plane that are multiplied at a time."""
TILE_NUMBERS = 16384
"""Numbers of a tile of values."""
STRETCHES = 8
"""Of a block; see `gpu_code`."""
_PROGRAMS_A_PROCESSOR = 3  # as many as run at a time: one more would run alone at the end
_MOST_SPLITS = 128


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs a device runs at a time, about."""
    if device.type != "cuda":
        return 12
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * _PROGRAMS_A_PROCESSOR


@dataclass(frozen=True)
class Walk:
    """How the tokens of a block, or those that are not packed, are walked and divided.

    Attributes:
        tokens: P.
        splits: programs that share the tokens of a head.
    """

    tokens: int
    splits: int

    @classmethod
    def over(cls, tokens: int, tile: int, heads: int, device: torch.device) -> Walk:
        """heads: of all rows."""
        of_stretch = -(-tokens // STRETCHES)
        tiles = -(-of_stretch // (tile // STRETCHES))
        return cls(tokens, max(1, min(tiles, programs(device) // heads, _MOST_SPLITS)))

    @property
    def even(self) -> bool:
        """Whether the stretches are full."""
        return self.tokens % STRETCHES == 0


def tile_of(sizes: tuple[int, int]) -> int:
    """Tokens a tile, for head sizes of keys and values: what the registers of a program hold."""
    if interpreted():  # whose time goes by numbers
        return 32
    return max(32, min(128, TILE_NUMBERS // power_of_two(max(sizes))))


def room_of(size: int) -> int:
    """Slots of a plane."""
    return -(-size // ROWS) * ROWS


@dataclass(frozen=True)
class Slots:
    """Where the rows of the planes of one format stand among the weights of a query.

    Attributes:
        channels: int32 `[Hkv, SLOTS]`, the channel of each slot.
        powers: float32 `[Hkv, SLOTS]`, the place value of the plane's lowest bit in the code; 0: the slot is empty.
        middles: float32 `[Hkv, SLOTS]`, half of the greatest number in the plane.
        lines: int32 `[Hkv, planes, 3]`, see `gpu_code._head_lines`.
    """

    channels: Tensor
    powers: Tensor
    middles: Tensor
    lines: Tensor

    @classmethod
    def of(cls, form: ChannelFormat) -> Slots:
        heads, size = form.widths.shape
        room = room_of(size)
        slots = power_of_two(3 * room)
        channels = torch.zeros(heads, slots, dtype=torch.int32)
        powers, middles = torch.zeros(heads, slots), torch.zeros(heads, slots)
        lines = torch.zeros(heads, 3, 3, dtype=torch.int32)
        for number, (width, flat, shift) in enumerate(form.planes_here):
            head = flat // size
            count = head.bincount(minlength=heads)
            start = count.cumsum(0) - count
            slot = number * room + torch.arange(len(flat)) - start[head]
            channels[head, slot] = (flat % size).int()
            powers[head, slot] = (1 << shift.long()[:, 0]).float()
            middles[head, slot] = ((1 << width) - 1) / 2
            lines[:, number, 0], lines[:, number, 1], lines[:, number, 2] = (
                width * start,
                width * count,
                width * len(flat),
            )
        device = form.weight.device
        return cls(*(x.to(device, non_blocking=True) for x in (channels, powers, middles, lines)))


_slots: WeakKeyDictionary[ChannelFormat, Slots] = WeakKeyDictionary()


def _slots_of(form: ChannelFormat) -> Slots:
    if form not in _slots:
        with torch.inference_mode(False):
            _slots[form] = Slots.of(form)
    return _slots[form]


@dataclass(frozen=True)
class Turning:
    """The product of a query with a turned centre, as a product with a table: see `gpu_code.centre_logits`.

    Attributes:
        first, second: int32 `[K]`, channels of the query. of_first, of_second: int64 `[K]`, those of the centre that
            they are multiplied with. signs: float32 `[K]` each, 0 where nothing is added.
        table, table_rest: float16 `[positions, K]`, cosines and sines, and what float16 rounds off them.
    """

    first: Tensor
    second: Tensor
    of_first: Tensor
    of_second: Tensor
    first_signs: Tensor
    second_signs: Tensor
    table: Tensor
    table_rest: Tensor


@lru_cache(maxsize=4)
def _turning(partner: tuple[int, ...], frequencies: tuple[float, ...], reach: int, device: torch.device) -> Turning:
    """For all positions below `reach`."""
    pairs, still = pairs_of(partner)
    # A row: the query's channels, the centre's, their signs, and the frequency of a cosine (0) or a sine (1). The
    # product of a pair is (q_a c_a + q_b c_b) cos + (q_a c_b - q_b c_a) sin.
    rows: list[tuple[float, ...]] = [(a, b, a, b, 1, 1, frequencies[a], 0) for a, b in pairs]
    rows += [(a, b, b, a, 1, -1, frequencies[a], 1) for a, b in pairs]
    for i in range(0, len(still), 2):
        a, b = still[i], still[min(i + 1, len(still) - 1)]
        rows.append((a, b, a, b, 1, float(b != a), 0, 0))
    rows += [(0,) * 8] * (power_of_two(len(rows)) - len(rows))
    with torch.inference_mode(False):
        columns = torch.tensor(rows, dtype=torch.float64, device=device).unbind(-1)
        first, second = (column.int() for column in columns[:2])
        of_first, of_second = (column.long() for column in columns[2:4])
        first_signs, second_signs, turns, is_sine = (column.float() for column in columns[4:])
        found = angles(torch.arange(reach, device=device), turns)
        exact = torch.where(is_sine > 0, found.sin(), found.cos()).float()
        table = exact.half()
        rest = (exact - table.float()).half()
        return Turning(first, second, of_first, of_second, first_signs, second_signs, table, rest)


_kinds: WeakKeyDictionary[Rope, tuple[tuple[int, ...], tuple[float, ...]]] = WeakKeyDictionary()


def kind_of(rope: Rope) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Partners and frequencies, equal where layers turn alike."""
    if rope not in _kinds:
        _kinds[rope] = tuple(rope.partner.tolist()), tuple(rope.frequencies.tolist())
    return _kinds[rope]


def _turning_of(rope: Rope | None, size: int, positions: int, device: torch.device) -> Turning:
    """Layers that turn alike share it."""
    if rope is None:
        return _turning(tuple(range(size)), (0.0,) * size, 1, device)
    return _turning(*kind_of(rope), 1 << max(positions - 1, 1).bit_length(), device)


@dataclass(frozen=True)
class Centre:
    """turning; factors of its first and second channels, float32 `[B, Hkv, K]`; and the number of positions."""

    turning: Turning
    of_first: Tensor
    of_second: Tensor
    positions: int

    @classmethod
    def of(cls, basis: Basis, seen: int) -> Centre:
        assert basis.centre is not None
        centre = basis.centre[:, :, 0].float()
        turning = _turning_of(basis.rope, centre.shape[-1], seen, centre.device)
        first = centre[..., turning.of_first] * turning.first_signs
        second = centre[..., turning.of_second] * turning.second_signs
        return cls(turning, first, second, 1 if basis.rope is None else seen)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is needed of a layer until its blocks change.

    Attributes:
        version: of the storage whose addresses launches have.
        positions: `store.kept_positions`, contiguous.
        walks: of the blocks.
        slots: of the blocks whose keys have widths by channel, by the block's number.
        channels, middles: their `Slots`, stacked `[blocks, Hkv, SLOTS]`. units: float32 `[blocks, B, Hkv, SLOTS]`, what
            one step of a plane's number is worth in a channel.
        key_groups, value_groups: the most that a block has, see `groups_of`.
    """

    version: int
    positions: Tensor
    walks: list[Walk]
    centre: Centre
    slots: dict[int, Slots]
    key_groups: int
    value_groups: int
    channels: Tensor | None = None
    middles: Tensor | None = None
    units: Tensor | None = None

    @classmethod
    def of(cls, store: TieredStorage) -> Prepared:
        assert store.bases is not None and store.kept_positions is not None
        basis = store.bases[0]
        sizes = store.sizes().sizes
        walks, slots, units = [], dict[int, Slots](), []
        for number, (keys, _) in enumerate(store.blocks):
            heads = store.rows * store.kv_heads
            walks.append(Walk.over(keys.tokens, tile_of(sizes), heads, store.device))
            if isinstance(keys, ChannelTensor):
                assert basis.spread is not None
                found = slots[number] = _slots_of(keys.form)
                unit = (keys.form.steps * basis.spread.float())[:, :, 0]
                units.append(unit.gather(-1, found.channels.long().expand(len(unit), -1, -1)) * found.powers)
        stacked: dict[str, Any] = {}
        if slots:
            stacked = {
                name: torch.stack([getattr(s, name) for s in slots.values()]) for name in ("channels", "middles")
            } | {"units": torch.stack(units)}
        centre = Centre.of(basis, store.seen)
        key_groups, value_groups = (max(groups_of(block[i]) for block in store.blocks) for i in range(2))
        return cls(
            store.version, store.kept_positions.contiguous(), walks, centre, slots, key_groups, value_groups, **stacked
        )


_prepared: WeakKeyDictionary[TieredStorage, Prepared] = WeakKeyDictionary()


def prepared(store: TieredStorage) -> Prepared | None:
    """None: it holds no blocks."""
    if not store.blocks:
        _prepared.pop(store, None)
        return None
    found = _prepared.get(store)
    if found is None or found.version != store.version:
        found = _prepared[store] = Prepared.of(store)
    return found


def groups_of(part: PackedTensor | ChannelTensor) -> int:
    """Groups of channels with a range of their own in each token."""
    if isinstance(part, ChannelTensor) or part.bits == RAW:
        return 1
    return math.prod(part.tensors["span"].shape[3:])


def key_arguments(part: PackedTensor | ChannelTensor) -> dict[str, Any]:
    """What a kernel is told of the keys of a block, and what its code is made for: FIELDS and KIND of `gpu_code`."""
    tensors = part.tensors
    if isinstance(part, ChannelTensor):
        planes = {f"k{i}": tensors[f"plane{width}"] for i, width in enumerate((4, 2, 1))}
        return {**planes, "k_zero": tensors["scale"], "K_BITS": 0}
    return _arguments("k", part)


def value_arguments(part: PackedTensor) -> dict[str, Any]:
    """The same of its values."""
    return _arguments("v", part)


def raw_arguments(side: str, numbers: Tensor) -> dict[str, Any]:
    """The same of keys (k) or values (v) as the model made them, `[B, Hkv, P, D]`."""
    of_row, of_head, of_token, _ = numbers.stride()
    return {
        f"{side}0": numbers, f"{side}_row": of_row // of_token, f"{side}_head": of_head // of_token,
        f"{side.upper()}_BITS": RAW,
    }  # fmt: skip


def _arguments(side: str, part: PackedTensor) -> dict[str, Any]:
    tensors, of = part.tensors, side.upper()
    if part.bits == RAW:
        return raw_arguments(side, tensors["raw"])
    planes = {f"{side}{i}": tensors[f"plane{i}"] for i in range(2) if f"plane{i}" in tensors}
    ranges = {f"{side}_zero": tensors["zero"], f"{side}_span": tensors["span"]}
    return {**planes, **ranges, f"{of}_BITS": part.bits, f"{of}_GROUPS": groups_of(part)}
