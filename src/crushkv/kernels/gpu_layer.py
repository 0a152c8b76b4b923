"""What the GPU's kernels are told of a layer, whose heads may hold different numbers of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..constants import constant
from ..storage import TieredStorage
from .gpu_launch import address
from .gpu_prepared import (
    Centre,
    Prepared,
    Walk,
    groups_of,
    key_arguments,
    kind_of,
    raw_arguments,
    tile_of,
    value_arguments,
)

Heads = Sequence[tuple[int, ...]]
"""The KV heads of each group; none: there is one group of all."""


@dataclass(frozen=True, eq=False)
class Held:
    """What is told of all blocks of a layer, until one of its groups of heads evicts.

    What belongs to all heads, in the model's order, is named as in `Prepared`.

    Attributes:
        parts: what is prepared of each group of heads.
        table: int64 `[blocks, groups, FIELDS]`, see `gpu_code`.
        walks: of the longest of each block. even: whether all its stretches are full.
    """

    parts: tuple[Prepared, ...]
    table: Tensor
    walks: list[Walk]
    even: list[bool]
    centre: Centre
    channels: Tensor | None
    middles: Tensor | None
    units: Tensor | None

    @classmethod
    def of(cls, stores: Sequence[TieredStorage], parts: Sequence[Prepared], heads: Heads) -> Held:
        """All groups are in the same formats (`alike`)."""
        first, device, sizes = parts[0], stores[0].device, stores[0].sizes().sizes
        places = [head for group in heads for head in group]
        in_order = tuple(sorted(range(len(places)), key=places.__getitem__))

        def joined(of: Callable[[Prepared], Tensor | None], dim: int) -> Tensor | None:
            found = [x for part in parts if (x := of(part)) is not None]
            if len(found) < 2:
                return found[0] if found else None
            return torch.cat(found, dim).index_select(dim, constant(in_order, device))

        programs_for = stores[0].rows * sum(store.kv_heads for store in stores)
        of_blocks = list(zip(*(part.walks for part in parts), strict=True))
        longest = (max(walk.tokens for walk in of_block) for of_block in of_blocks)
        walks = [Walk.over(tokens, tile_of(sizes), programs_for, device) for tokens in longest]
        rows = list[list[int]]()
        for number, walk in enumerate(walks):
            shared = {
                "splits": walk.splits,
                "first_split": sum(each.splits for each in walks[:number]),
                "first_weights": _place(first, number) * programs_for,
            }
            rows += [_fields(_of_block(*of, number) | shared) for of in zip(stores, parts, strict=True)]
        of_first = joined(lambda part: part.centre.of_first, 1)
        of_second = joined(lambda part: part.centre.of_second, 1)
        assert of_first is not None and of_second is not None
        farthest = max((part.centre for part in parts), key=lambda centre: centre.positions)
        return cls(
            tuple(parts),
            torch.tensor(rows).to(device, non_blocking=True),
            walks,
            [all(walk.even for walk in of_block) for of_block in of_blocks],
            replace(farthest, of_first=of_first, of_second=of_second),
            joined(lambda part: part.channels, 1),
            joined(lambda part: part.middles, 1),
            joined(lambda part: part.units, 2),
        )


def _place(part: Prepared, number: int) -> int:
    """Where the weights of a block stand among those of all blocks."""
    return list(part.slots).index(number) if number in part.slots else 0


def _of_block(store: TieredStorage, part: Prepared, number: int) -> dict[str, Any]:
    keys, values = store.blocks[number]
    found = key_arguments(keys) | value_arguments(values)
    found |= {
        "positions": part.positions,
        "positions_length": part.positions.shape[2],
        "P": part.walks[number].tokens,
        "first_slot": sum(each.tokens for each in part.walks[:number]),
        "heads": store.kv_heads,
    }
    if number in part.slots:
        found["lines"] = part.slots[number].lines
    return found


def _fields(of: dict[str, Any]) -> list[int]:
    """An entry of a table."""
    from .gpu_code import FIELDS  # imports Triton

    return [address(of.get(field, 0)) for field in FIELDS]


class Tails:
    """What is told of the tokens of a layer that are not packed, as long as they stay in the same buffers.

    Attributes:
        table: int64 `[groups, FIELDS]`.
        length: how many of them the first group held when this was made.
        refusal: why the kernels cannot read them.
    """

    def __init__(self, stores: Sequence[TieredStorage]) -> None:
        self.length = stores[0].dense.length
        self._buffers = [tuple(map(weakref.ref, _buffers(store))) for store in stores]
        self.refusal = None
        rows = list[list[int]]()
        for store in stores:
            keys, values = _buffers(store)
            if any(x.data_ptr() % 16 or not x.is_contiguous() for x in (keys, values)):
                self.refusal = "tokens that are not packed lie apart"
            fields = raw_arguments("k", keys) | raw_arguments("v", values)
            fields |= {"P": store.dense.length, "heads": store.kv_heads, "first_slot": store.blocked}
            rows.append(_fields(fields))
        self.table = torch.tensor(rows).to(stores[0].device, non_blocking=True)

    def holds(self, stores: Sequence[TieredStorage]) -> bool:
        """Whether these still have their tokens there."""
        return all(
            x() is y
            for former, store in zip(self._buffers, stores, strict=True)
            for x, y in zip(former, _buffers(store), strict=True)
        )

    def grown(self, stores: Sequence[TieredStorage]) -> int:
        """Tokens that came since this was made: as many to each group."""
        return stores[0].dense.length - self.length


def _buffers(store: TieredStorage) -> tuple[Tensor, Tensor]:
    keys, values = store.dense.keys_buffer, store.dense.values_buffer
    assert keys is not None and values is not None
    return keys, values


@lru_cache(maxsize=1024)
def head_map(heads: tuple[tuple[int, ...], ...], kv_heads: int, device: torch.device) -> Tensor:
    """Group of heads, and place in it, of each KV head: int32 `[Hkv, 2]`."""
    of_head = {head: (g, i) for g, group in enumerate(heads) for i, head in enumerate(group)}
    return constant(tuple(of_head.get(head, (0, head)) for head in range(kv_heads)), device, torch.int32)


def alike(stores: Sequence[TieredStorage]) -> bool:
    """Whether all groups of heads hold the same blocks in the same formats, so that one kernel serves them."""

    def kind(store: TieredStorage) -> tuple[Any, ...]:
        assert store.bases is not None
        rope = store.bases[0].rope
        blocks = (tuple((type(each), each.bits, groups_of(each)) for each in block) for block in store.blocks)
        return *blocks, rope if rope is None else kind_of(rope)

    return len({kind(store) for store in stores}) == 1
