"""What the GPU's kernels need to attend at once to heads that hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..storage import TieredStorage
from .gpu_launch import address
from .gpu_prepared import Centre, Prepared, Slots, Walk, groups_of, key_arguments, kind_of, tile_of, value_arguments


@dataclass(frozen=True, eq=False)
class Joint:
    """What is needed of heads that hold different numbers of tokens, to attend to all of them at once.

    What belongs to all heads, in the model's order, is named as in `Prepared`.

    Attributes:
        parts: what is needed of each group of heads.
        tables: of each block, int64 `[groups, FIELDS]`; see `gpu_code`.
        head_map: int32 `[Hkv, 2]`. heads: int32 `[heads of the group]`, of each group.
        walks: of the longest of each block. even: whether all its stretches are full.
    """

    parts: tuple[Prepared, ...]
    tables: list[Tensor]
    head_map: Tensor
    heads: list[Tensor]
    walks: list[Walk]
    even: list[bool]
    centre: Centre
    slots: dict[int, Slots]
    channels: Tensor | None
    middles: Tensor | None
    units: Tensor | None

    @classmethod
    def of(cls, stores: Sequence[TieredStorage], parts: Sequence[Prepared], numbers: Sequence[Sequence[int]]) -> Joint:
        """numbers: the heads of each group. All groups are in the same formats (`alike`)."""
        from .gpu_code import FIELDS  # imports Triton

        first, device = parts[0], stores[0].device
        places = [number for group in numbers for number in group]
        back = torch.tensor(places).argsort().to(device, non_blocking=True)

        def joined(of: Callable[[Prepared], Tensor | None], dim: int) -> Tensor | None:
            found = [x for part in parts if (x := of(part)) is not None]
            return torch.cat(found, dim).index_select(dim, back) if found else None

        tables, walks, even = [], [], []
        heads = stores[0].rows * len(places)
        for number in range(len(first.walks)):
            own = [part.walks[number] for part in parts]
            even.append(all(each.even for each in own))
            sizes = stores[0].sizes().sizes
            longest = max(each.tokens for each in own)
            walks.append(Walk.over(longest, tile_of(sizes), heads, device))
            rows = [_entry(store, part, number) for store, part in zip(stores, parts, strict=True)]
            table = torch.tensor([[row.get(field, 0) for field in FIELDS] for row in rows])
            tables.append(table.to(device, non_blocking=True))
        of_head = {head: (g, i) for g, group in enumerate(numbers) for i, head in enumerate(group)}
        head_map = torch.tensor([of_head[head] for head in range(len(places))], dtype=torch.int32)
        of_groups = [torch.tensor(group, dtype=torch.int32).to(device, non_blocking=True) for group in numbers]
        of_first, of_second = (
            joined(lambda part: part.centre.of_first, 1),
            joined(lambda part: part.centre.of_second, 1),
        )
        assert of_first is not None and of_second is not None
        farthest = max((part.centre for part in parts), key=lambda centre: centre.positions)
        return cls(
            tuple(parts), tables, head_map.to(device, non_blocking=True), of_groups, walks, even,
            replace(farthest, of_first=of_first, of_second=of_second), first.slots,
            joined(lambda part: part.channels, 1), joined(lambda part: part.middles, 1),
            joined(lambda part: part.units, 2),
        )  # fmt: skip


def _entry(store: TieredStorage, part: Prepared, number: int) -> dict[str, int]:
    """The row of a table for a block of one group of heads."""
    keys, values = store.blocks[number]
    walk = part.walks[number]
    found = key_arguments(keys, store.sizes().sizes[0]) | value_arguments(values)
    found |= {
        "positions": part.positions,
        "positions_length": part.positions.shape[2],
        "P": walk.tokens,
        "length": walk.length,
        "first_slot": sum(each.tokens for each in part.walks[:number]),
        "heads": store.kv_heads,
    }
    if number in part.slots:
        found["lines"] = part.slots[number].lines
    return {name: address(value) for name, value in found.items()}


def alike(stores: Sequence[TieredStorage]) -> bool:
    """Whether all groups of heads hold the same blocks in the same formats, so that one kernel serves them."""

    def kind(store: TieredStorage) -> tuple[Any, ...]:
        assert store.bases is not None
        rope = store.bases[0].rope
        blocks = (tuple((type(each), each.bits, groups_of(each)) for each in block) for block in store.blocks)
        return *blocks, rope if rope is None else kind_of(rope)

    return len({kind(store) for store in stores}) == 1
