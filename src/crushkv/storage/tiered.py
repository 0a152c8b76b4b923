"""Keys and values of one layer, each tier in its own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .basis import Basis, fit
from .block import Coordinates, PackedTensor
from .buffers import take
from .dense import DenseStorage
from .formats import RAW, Formats, LayerSizes
from .rotation import rotation, turn
from .workspace import Workspace


class TieredStorage:
    """Slots in this order: a block for each format, then what is held as the model made it: what came since, and sink
    and recent tokens, unless these have a block of their own.

    Attention does not depend on the order of what it attends to, so nothing is ever sorted for it. Tokens are
    quantized when `keep` first puts them into a block. From then on their codes are moved and never made anew.

    Args:
        formats: of the tiers.
        growth: see `DenseStorage`.
        workspace: shared by the layers of a cache: only one of them is unpacked at a time.
    """

    def __init__(self, formats: Formats, growth: int = 64, workspace: Workspace | None = None) -> None:
        self.formats = formats
        self.dense = DenseStorage(growth)
        self._workspace = workspace or Workspace()
        self.clear()

    def clear(self) -> None:
        self.dense.clear()
        self.bases: tuple[Basis, Basis] | None = None
        self._blocks: list[tuple[PackedTensor, PackedTensor]] = []

    # Size

    @property
    def empty(self) -> bool:
        return self.dense.keys is None

    @property
    def rows(self) -> int:
        return self._dense_keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self._dense_keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self._dense_keys.device

    @property
    def _dense_keys(self) -> Tensor:
        assert self.dense.keys is not None, "nothing is held"
        return self.dense.keys

    @property
    def blocked(self) -> int:
        """Slots in blocks."""
        return sum(keys.tokens for keys, _ in self._blocks)

    @property
    def length(self) -> int:
        """Slots: P."""
        return self.blocked + self.dense.length

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        blocks = sum(keys.nbytes + values.nbytes for keys, values in self._blocks)
        return self.dense.nbytes + blocks + sum(basis.nbytes for basis in self.bases or ())

    @property
    def nbytes_at_16_bits(self) -> int:
        """`nbytes`, were the model's dtype one of 16 bits: codes count as they are, all other numbers two bytes."""
        if self.empty:
            return 0
        codes = sum(part.nbytes for pair in self._blocks for part in pair if part.bits != RAW)
        return codes + (self.nbytes - codes) * 2 // self._dense_keys.element_size()

    def sizes(self) -> LayerSizes:
        """The arithmetic of bytes for one row of what is held."""
        keys, values = self._dense_keys, self.dense.values
        assert values is not None
        sizes = (keys.shape[-1], values.shape[-1])
        ranks = sizes
        if self.bases is not None and self.formats.rank is not None:
            ranks = (self.bases[0].rank(sizes[0]), self.bases[1].rank(sizes[1]))
        return LayerSizes(self.formats, self.kv_heads, sizes, ranks, keys.element_size())

    # What goes in

    def append(self, keys: Tensor, values: Tensor, reserve: int = 0) -> tuple[Tensor, Tensor]:
        """Adds tokens at the end, with room for `reserve` more; returns what `attended` does."""
        self.dense.append(keys, values, reserve)
        return self.attended()

    @torch.no_grad()
    def fit(self, real: Tensor | None) -> None:
        """Finds the coordinates for the blocks, once, from all tokens of which `real [B, P]` is not False."""
        if self.bases is None and not self.formats.raw:
            keys, values, f = self._dense_keys, self.dense.values, self.formats
            assert values is not None
            self.bases = (
                fit(keys, real, centred=True, rotate=f.rotation, rank=f.rank),
                fit(values, real, centred=False, rotate=f.rotation, rank=f.rank),
            )

    @torch.no_grad()
    def keep(self, indices: Tensor, lengths: Sequence[int]) -> None:
        """Keeps the tokens in some slots, in a new order, and frees the rest.

        Args:
            indices: int64 `[B, Hkv, P]`, the slots that they lie in now: first those of each block, then those that
                stay as they are.
            lengths: how many slots each of these parts has.
        """
        *blocks, stays = indices.split(list(lengths), dim=2)
        # What only fills rows up may point into a block.
        dense = (stays - self.blocked).clamp(min=0)
        self._blocks = list(zip(self._moved(0, blocks), self._moved(1, blocks), strict=True))
        self.dense.keep(dense)
        if not self.blocked:
            self._blocks, self.bases = [], None

    def _moved(self, which: int, parts: Sequence[Tensor]) -> list[PackedTensor]:
        """Keys (0) or values (1) of the tokens in the slots of each part, in the format of its block."""
        if not parts:
            return []
        assert self.bases is not None, "fit() comes first"
        x = (self.dense.keys, self.dense.values)[which]
        assert x is not None
        basis, widest, group_size = self.bases[which], self.formats.important[which], self.formats.group_size
        if self._blocks:
            held = [block[which].coordinates() for block in self._blocks]
            source = Coordinates.joined([*held, Coordinates.of(x, basis, widest, group_size)])
            moved = [source.gather(part) for part in parts]
        else:  # a whole prompt, most of which goes: only what stays is quantized
            moved = [Coordinates.of(take(x, part), basis, widest, group_size) for part in parts]
        widths = (bits[which] for bits in self.formats.blocks)
        return [PackedTensor.of(tokens, bits) for tokens, bits in zip(moved, widths, strict=True)]

    # What comes out

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, P, D]` for attention; see `rotations`.

        Where there are blocks, they stand in the workspace, until another layer asks.
        """
        keys, values = self.dense.keys, self.dense.values
        assert keys is not None and values is not None
        if self.bases is None or not self._blocks:
            return keys, values
        return self._unpacked(0, keys), self._unpacked(1, values)

    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """What `attended` keys and values are multiplied with from the right, `[D, D]`; None: they are as they were."""
        if self.bases is None or not self._blocks:
            return None, None
        keys, values = self.bases
        return keys.rotation, values.rotation

    def read(self) -> tuple[Tensor, Tensor]:
        """Copies of keys and values as the model made them, but for what quantization and projection lost."""
        found = self.attended()
        if not self._blocks:
            return found
        keys, values = (
            x.clone() if matrix is None else turn(x, matrix.T)
            for x, matrix in zip(found, self.rotations(), strict=True)
        )
        return keys, values

    def _unpacked(self, which: int, dense: Tensor) -> Tensor:
        assert self.bases is not None
        basis = self.bases[which]
        rows, heads, _, size = dense.shape
        shape = (rows, heads, self.length, size)
        out = self._workspace.take(("keys", "values")[which], shape, dense.dtype, dense.device)
        start = 0
        for block in self._blocks:
            end = start + block[which].tokens
            self._unpack(block[which], basis, out[:, :, start:end])
            start = end
        out[:, :, start:] = dense if basis.rotation is None else turn(dense, basis.rotation)
        return out

    def _unpack(self, part: PackedTensor, basis: Basis, out: Tensor) -> None:
        numbers = out
        if basis.projection is not None or out.dtype != torch.float32:
            shape = (*out.shape[:3], basis.rank(out.shape[-1]))
            numbers = self._workspace.take("numbers", shape, torch.float32, out.device)
        part.write(numbers)
        if basis.projection is not None:
            numbers = numbers @ basis.projection.float().transpose(-1, -2)
        if basis.centre is not None:
            centre = basis.centre.float()
            numbers += centre if basis.rotation is None else turn(centre, basis.rotation)
        if numbers is not out:
            out.copy_(numbers)

    # The rest

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it, which may repeat."""
        self.dense.select_rows(rows)
        for part in (part for pair in self._blocks for part in pair):
            part.select_rows(rows)
        for basis in self.bases or ():
            basis.select_rows(rows)

    def state(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""
        named = {"keys": self.dense.keys, "values": self.dense.values}
        for which, name in enumerate(("keys", "values")):
            for number, block in enumerate(self._blocks):
                named |= {f"block{number}.{name}.{key}": t for key, t in block[which].tensors.items()}
            if self.bases is not None:
                basis = self.bases[which]
                named |= {f"centre.{name}": basis.centre, f"projection.{name}": basis.projection}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces everything by what `state` of a storage of the same formats gave."""
        self.clear()
        self.dense.append(tensors["keys"], tensors["values"])
        if self.formats.raw or "centre.keys" not in tensors:
            return
        sides = ("keys", "values")
        keys, values = (self._loaded_basis(tensors, name) for name in sides)
        self.bases = keys, values
        for number, bits in enumerate(self.formats.blocks):
            of_keys, of_values = (_of_prefix(tensors, f"block{number}.{name}.") for name in sides)
            if of_keys:
                self._blocks.append((PackedTensor(bits[0], of_keys), PackedTensor(bits[1], of_values)))

    def _loaded_basis(self, tensors: Mapping[str, Tensor], name: str) -> Basis:
        projection, x = tensors.get(f"projection.{name}"), tensors[name]
        turned = self.formats.rotation and projection is None
        return Basis(rotation(x.shape[-1], x.device) if turned else None, projection, tensors.get(f"centre.{name}"))


def _of_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
