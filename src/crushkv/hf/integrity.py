"""Whether the state of a layer that a file holds is one that a cache can be in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import Tier
from .head_group import HeadGroup
from .layer import CrushLayer, of_groups


class Damaged(ValueError):
    """What is wrong, in a few words."""


def check_counts(counts: object, names: tuple[str, ...], seen: int) -> None:
    """Checks the numbers beside a layer's tensors: these names, integers from 0 up to the tokens seen."""
    if not isinstance(counts, dict) or set(counts) != set(names):
        raise Damaged(f"a layer's numbers are not {', '.join(names)}")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= seen:
            raise Damaged(f"{name}={value!r} of a layer, where {seen} tokens were seen")
    if counts["seen"] != seen:
        raise Damaged(f"a layer has seen {counts['seen']} tokens, and there are {seen} tokens")


def check_layer(layer: CrushLayer, tensors: Mapping[str, Tensor], input_ids: Tensor) -> None:
    """Checks a layer that was filled with `tensors` against the tokens `[B, S]` that it has seen.

    Raises:
        Damaged: a shape, a dtype or a position is one that no cache has.
    """
    rows = len(input_ids)
    parts = of_groups(tensors)
    if layer.parted:
        numbers = [held["heads"] for held in parts if "heads" in held]
        if len(numbers) < len(parts) or sorted(torch.cat(numbers).tolist()) != list(range(layer.kv_heads)):
            raise Damaged("the groups of heads are not all heads of the layer")
    for group, held in zip(layer.groups, parts, strict=True):
        _check_group(group, held, input_ids)
    # Queries look for the keys that a layer makes of latents (MLA), which have another size.
    size = None if layer.plan.latent else layer.any_storage.sizes().sizes[0]
    heads = _shape_of(tensors, "queries")[1] or layer.kv_heads
    if heads % layer.kv_heads:
        raise Damaged(f"{heads} query heads, and {layer.kv_heads} KV heads")
    _check(tensors, "query_energy", torch.float32, (None, size))
    _check(tensors, "queries", None, (rows, heads, None, size))
    _check(tensors, "queries_real", torch.bool, (rows, _shape_of(tensors, "queries")[2]))


def _check_group(group: HeadGroup, tensors: Mapping[str, Tensor], input_ids: Tensor) -> None:
    rows, seen = input_ids.shape
    if tensors["keys"].shape[:3] != tensors["values"].shape[:3]:
        raise Damaged(f"keys of shape {tuple(tensors['keys'].shape)}, values of {tuple(tensors['values'].shape)}")
    keys, values = group.storage.read()
    kv_heads, length = group.storage.kv_heads, group.storage.length
    if group.heads is not None and len(group.heads) != kv_heads:
        raise Damaged(f"{kv_heads} heads, where there are {len(group.heads)} in the group")
    for name, x in (("keys", keys), ("values", values)):
        if x.ndim != 4 or x.shape[:3] != (rows, kv_heads, length) or not x.is_floating_point():
            raise Damaged(f"{name} of shape {tuple(x.shape)}, where {(rows, kv_heads, length)} tokens are held")
    compressed = group.compressed
    if not 0 <= compressed <= length or length - compressed > seen:
        raise Damaged(f"{length} slots, {compressed} of them compressed, where {seen} tokens were seen")
    heads = _shape_of(tensors, "mass")[1] or kv_heads
    if heads % kv_heads:
        raise Damaged(f"{heads} query heads, and {kv_heads} KV heads")
    _check(tensors, "positions", torch.int32, (rows, kv_heads, compressed))
    _check(tensors, "tiers", torch.uint8, (rows, kv_heads, compressed))
    _check(tensors, "real", torch.bool, (rows, length))
    _check(tensors, "evicted", torch.int64, (rows,))
    _check(tensors, "mass", torch.float32, (rows, heads, None))
    if ("positions" in tensors) != ("tiers" in tensors):
        raise Damaged("positions and tiers belong together")
    if (mass := tensors.get("mass")) is not None and (mass.shape[2] > length or not bool(torch.isfinite(mass).all())):
        raise Damaged("the attention mass is not that of the tokens held")
    if (evicted := tensors.get("evicted")) is not None and not bool(((evicted >= 0) & (evicted <= seen)).all()):
        raise Damaged("more tokens are evicted than were seen")
    if compressed:
        _check_positions(tensors["positions"].long(), tensors["tiers"], seen - (length - compressed))


def _check_positions(positions: Tensor, tiers: Tensor, before: int) -> None:
    """Every slot holds a token of its own from before the last eviction, and each tier is in the order of the text."""
    filled = tiers != Tier.PADDING
    if int(tiers.max()) > max(Tier):
        raise Damaged("there is no such tier")
    if bool(((positions < 0) | (positions >= before))[filled].any()):
        raise Damaged("a position is out of range")
    last = torch.where(filled, positions, before + torch.arange(positions.shape[-1])).sort(-1).values
    if bool((last[..., 1:] == last[..., :-1]).any()):
        raise Damaged("a head holds a token twice")
    for tier in Tier:
        order = positions.masked_fill(tiers != tier, -1).cummax(-1).values
        if tier != Tier.PADDING and bool(((positions < order) & (tiers == tier)).any()):
            raise Damaged("positions are not ascending")


def _shape_of(tensors: Mapping[str, Tensor], *names: str) -> tuple[Any, ...]:
    """Of the first of these tensors that is there; four ones where none is."""
    found = next((tensors[name].shape for name in names if name in tensors), torch.Size((1, 0, 1, 1)))
    if len(found) < 3:
        raise Damaged(f"{names[0]} of shape {tuple(found)}")
    return tuple(found)


def _check(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int | None, ...]) -> None:
    x = tensors.get(name)
    if x is None:
        return
    fits = x.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, x.shape, strict=True))
    if not fits or (x.dtype != dtype if dtype is not None else not x.is_floating_point()):
        wanted = tuple("any" if size is None else size for size in shape)
        raise Damaged(f"{name} of shape {tuple(x.shape)} and {x.dtype}, where the cache has {wanted}")
