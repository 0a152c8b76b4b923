"""Attention of one decoded token a row straight from packed tokens, on a GPU, with Triton.

The tokens of a head are divided among programs, block by block, and what these find is joined. A call launches one
kernel for the weights of the queries where channels have widths of their own, one for the product of queries and
centres, one a block, one for the tokens that are not packed, and one that joins. The host never waits for the device.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..storage import RAW, TieredStorage, turn
from ..storage.block import PackedTensor
from ..storage.channels import ChannelTensor
from .gpu_prepared import Centre, Prepared, Walk, groups_of, power_of_two, prepared, room_of, tile_of

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_ROWS, _MOST_CHANNELS, _MOST_KEY_GROUPS = 64, 256, 8
LAUNCH = {"num_warps": 8, "num_stages": 1, "maxnreg": 128}
"""How a block's programs run: a processor's registers hold two of them."""
_LARGE_LAUNCH = {"num_warps": 8, "num_stages": 1}
_LOG2E = 1.4426950408889634


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for the device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device"
    return None


def runs_on(device: torch.device) -> bool:
    return device.type == ("cpu" if _interpreted() else "cuda")


def build() -> str:
    return "Triton" + " interpreted" * _interpreted()


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
    groups = max((groups_of(values) for _, values in store.blocks), default=1)
    if group * groups > _MOST_ROWS or any(groups_of(keys) > _MOST_KEY_GROUPS for keys, _ in store.blocks):
        return "a head has too many queries, or a token too many ranges"
    return None


def attend(queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> Tensor:
    """See `kernels.attend`."""
    with torch.no_grad(), torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
        return _Call(queries, store, scaling, shown).output()


class _Call:
    """One call of `attend`."""

    def __init__(self, queries: Tensor, store: TieredStorage, scaling: float, shown: Tensor | None) -> None:
        assert store.dense.keys is not None and store.dense.values is not None
        self.store, self.queries, self.factor = store, queries.contiguous(), scaling * _LOG2E
        self.keys, self.values = store.dense.keys, store.dense.values
        self.rows, self.heads, _, self.size = queries.shape
        self.sizes = (self.size, self.values.shape[-1])
        self.group = self.heads // store.kv_heads
        self.shown = None if shown is None else shown.view(self.rows, -1, shown.shape[-1])
        if self.shown is not None and self.shown.stride(-1) != 1:
            self.shown = self.shown.contiguous()
        self.prepared = prepared(store)
        self.tile = tile_of(self.sizes, queries.device)
        self.walks = list(self.prepared.walks) if self.prepared else []
        if self.keys.shape[2]:
            heads = self.rows * store.kv_heads
            self.walks.append(Walk.over(self.keys.shape[2], 1, self.tile, heads, queries.device))
        self.splits = sum(walk.splits for walk in self.walks)
        # Sums, totals and greatest logits of all splits.
        self.found = [self._new(self.splits, self.rows * self.heads, *more) for more in ((self.sizes[1],), (), ())]

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.queries.device)

    def output(self) -> Tensor:
        """`[B, Hq, 1, Dv]`."""
        rotation, packed_splits, first_split, first_slot = None, 0, 0, 0
        if self.prepared is not None:
            assert self.store.bases is not None
            of_keys, of_values = self.store.bases
            rotation = of_values.rotation
            queries = self.queries if of_keys.rotation is None else turn(self.queries, of_keys.rotation)
            centred = self._centre_arguments(self.prepared, self.prepared.centre)
            weights = self._weights(self.prepared)
            for number, ((keys, values), walk) in enumerate(zip(self.store.blocks, self.walks, strict=False)):
                arguments = centred | self._key_arguments(keys, queries) | _value_arguments(values)
                if number in weights:
                    arguments |= weights[number]
                self._launch(walk, first_slot, first_split, arguments)
                first_slot += walk.tokens
                first_split += walk.splits
            packed_splits = first_split
        if self.keys.shape[2]:
            self._launch(self.walks[-1], first_slot, first_split, self._dense_arguments())
        return self._merged(rotation, packed_splits)

    def _weights(self, made: Prepared) -> dict[int, dict[str, Any]]:
        """Arguments for each block whose keys have widths by channel."""
        from .gpu_code import query_weights

        if made.channels is None:
            return {}
        blocks, kv_heads, slots = made.channels.shape
        weights = self._new(blocks, self.rows * self.heads, slots, dtype=torch.float16)
        offsets = self._new(blocks, self.rows * self.heads)
        query_weights[(self.rows * self.heads, blocks)](
            weights, offsets, self.queries, made.channels, made.units, made.middles, self.factor, self.size, kv_heads,
            G=self.group, SLOTS=slots, num_warps=4,
        )  # fmt: skip
        return {
            number: {"weights": weights[i], "offsets": offsets[i], "runs": of.runs, "SLOTS": slots}
            | dict(zip(("plane4_rows", "plane2_rows", "plane1_rows"), of.rows, strict=True))
            for i, (number, of) in enumerate(made.slots.items())
        }

    def _centre_arguments(self, made: Prepared, centre: Centre) -> dict[str, Any]:
        from .gpu_code import centre_logits

        rows, turning = self.rows * self.heads, centre.turning
        logits = self._new(rows, centre.positions)
        together, tile = min(64, power_of_two(rows)), self.tile
        centre_logits[(-(-centre.positions // tile), -(-rows // together))](
            logits, self.queries, turning.first, turning.second, centre.of_first, centre.of_second, turning.table,
            turning.table_rest, self.factor, rows, centre.positions, self.size,
            G=self.group, K=len(turning.first), ROWS=together, TILE=tile, num_warps=8,
        )  # fmt: skip
        turns = self.store.bases is not None and self.store.bases[0].rope is not None
        return {
            "of_centre": logits,
            "of_centre_length": centre.positions,
            "position_step": int(turns),
            "positions": made.positions,
            "positions_length": made.positions.shape[2],
            "CENTRED": True,
        }

    def _key_arguments(self, part: PackedTensor | ChannelTensor, queries: Tensor) -> dict[str, Any]:
        tensors = part.tensors
        if isinstance(part, ChannelTensor):
            planes = {f"k{i}": tensors[f"plane{width}"] for i, width in enumerate((4, 2, 1))}
            return {**planes, "k_zero": tensors["scale"], "K_BITS": 0}
        if part.bits == RAW:
            raw = tensors["raw"]
            return {"queries": queries, "k0": raw, "k_row": raw.stride(0), "k_head": raw.stride(1), "K_BITS": RAW}
        planes = {f"k{i}": tensors[f"plane{i}"] for i in range(2) if f"plane{i}" in tensors}
        groups = groups_of(part)
        ranges = {"k_zero": tensors["zero"], "k_span": tensors["span"], "K_GROUPS": groups}
        filled = power_of_two(self.size // groups)
        return {**planes, **ranges, "queries": queries, "K_BITS": part.bits, "K_GROUP_FILLED": filled}

    def _dense_arguments(self) -> dict[str, Any]:
        keys, values = self.keys, self.values
        return {
            "k0": keys, "k_row": keys.stride(0), "k_head": keys.stride(1), "K_BITS": RAW,
            "v0": values, "v_row": values.stride(0), "v_head": values.stride(1), "V_BITS": RAW,
        }  # fmt: skip

    def _launch(self, walk: Walk, first_slot: int, first_split: int, arguments: dict[str, Any]) -> None:
        """Attention over one block, or over what is not packed."""
        from .gpu_code import attend_block

        shown, size_of_keys, size_of_values = self.shown, *self.sizes
        shown_strides = (0, 0)
        if shown is not None:
            shown_strides = (shown.stride(0), shown.stride(1) if shown.shape[1] > 1 else 0)
        unused = self.queries
        names = ("weights", "offsets", "runs", "of_centre", "positions", "k1", "k2", "k_zero", "k_span")
        numbers = ("plane4_rows", "plane2_rows", "plane1_rows", "k_row", "k_head", "v_row", "v_head")
        of_positions = ("of_centre_length", "position_step", "positions_length")
        groups = arguments.get("V_GROUPS", 1)
        filled_rows = power_of_two(self.group * groups)
        aligned = walk.aligned if arguments["K_BITS"] == 0 else 1
        every = (
            dict.fromkeys((*names, "v1", "v_zero", "v_span"), unused)
            | dict.fromkeys((*numbers, *of_positions), 0)
            | {"queries": self.queries, "CENTRED": False, "SLOTS": 16, "K_GROUPS": 1, "K_GROUP_FILLED": 16}
            | {"V_GROUPS": 1}
            | arguments
        )
        attend_block[(walk.splits, self.store.kv_heads, self.rows)](
            *self.found,
            **every,
            shown=unused if shown is None else shown.view(torch.uint8),
            factor=self.factor,
            P=walk.tokens,
            stretch=walk.stretch // aligned,
            first_slot=first_slot,
            first_split=first_split,
            splits=walk.splits,
            all_splits=self.splits,
            shown_row=shown_strides[0],
            shown_head=shown_strides[1],
            D=size_of_keys,
            E=size_of_values,
            D_FILLED=power_of_two(size_of_keys),
            E_FILLED=power_of_two(size_of_values),
            G=self.group,
            M=filled_rows,
            ROOM=room_of(size_of_keys),
            MASKED=shown is not None,
            STRETCHES=walk.stretches,
            ALIGNED=aligned,
            TILE=self.tile,
            PRODUCT=_product_dtype(self.queries.dtype),
            FOUR=not _interpreted(),
            **(LAUNCH if filled_rows == 16 else _LARGE_LAUNCH),
        )

    def _merged(self, rotation: Tensor | None, packed_splits: int) -> Tensor:
        from .gpu_code import merge

        size = self.sizes[1]
        out = self._new(self.rows, self.heads, 1, size, dtype=self.queries.dtype)
        channels = 32
        merge[(self.rows * self.heads, -(-size // channels))](
            out, *self.found, out if rotation is None else rotation, packed_splits, self.splits,
            E=size, E_FILLED=power_of_two(size), CHANNELS=channels, ROTATED=rotation is not None, SPLITS=16,
            num_warps=4,
        )  # fmt: skip
        return out


def _product_dtype(dtype: torch.dtype) -> Any:
    """In which numbers of a dtype are multiplied. The interpreter takes bfloat16 for integers there."""
    import triton.language as tl

    if dtype == torch.bfloat16 and _interpreted():
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def _value_arguments(part: PackedTensor) -> dict[str, Any]:
    tensors = part.tensors
    if part.bits == RAW:
        raw = tensors["raw"]
        return {"v0": raw, "v_row": raw.stride(0), "v_head": raw.stride(1), "V_BITS": RAW}
    planes = {f"v{i}": tensors[f"plane{i}"] for i in range(2) if f"plane{i}" in tensors}
    ranges = {"v_zero": tensors["zero"], "v_span": tensors["span"], "V_GROUPS": groups_of(part)}
    return {**planes, **ranges, "V_BITS": part.bits}
