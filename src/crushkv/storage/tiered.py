"""Keys and values of one layer, each tier in its own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..later import Later
from ..rope import Rope
from . import channels
from .basis import Basis, fit, fit_channels
from .block import Coordinates, PackedTensor
from .buffers import Pick, take
from .channels import ChannelFormat, ChannelTensor
from .dense import DenseStorage
from .formats import RAW, Formats, LayerSizes
from .guard import LastQueries, LogitGuard, widened
from .rotation import rotation, turn
from .widths import WIDEST, allocate
from .workspace import Workspace

Part = PackedTensor | ChannelTensor


@dataclass(frozen=True)
class KeyEnergy:
    """What widths of channels are chosen by: mean squares, float32 `[Hkv, D]`.

    keys: of the keys less their mean before RoPE. queries: of the queries of a KV head's group.
    """

    keys: Tensor
    queries: Tensor

    def parted(self, pick: Pick) -> KeyEnergy:
        """The same for some heads."""
        return KeyEnergy(pick(self.keys, 0), pick(self.queries, 0))


@dataclass(frozen=True)
class _Unsettled:
    """What it takes to decide on the formats of the keys of some heads.

    error: that the present formats make in each head of the layer. pick: which of them these are; None: all.
    """

    guard: LogitGuard
    energy: KeyEnergy
    error: Later
    pick: Pick | None = None


class TieredStorage:
    """Slots in this order: a block for each format, then what is held as the model made it: what came since, and sink
    and recent tokens, unless these have a block of their own.

    Attention does not depend on the order of what it attends to, so nothing is ever sorted for it. Tokens are
    quantized when `keep` first puts them into a block. From then on their codes are moved and not made anew, but for
    keys whose channels have widths of their own: these are coded once more when they move to another block.

    Args:
        formats: of the tiers.
        growth: see `DenseStorage`.
        workspace: shared by the layers of a cache: only one of them is unpacked at a time.

    Attributes:
        version: another one whenever packed tokens lie elsewhere than before. Kernels remember where they lie.
        blocks: keys and values of each tier, packed.
        blocked: slots in blocks.
    """

    def __init__(self, formats: Formats, growth: int = 64, workspace: Workspace | None = None) -> None:
        self._formats = formats
        self.dense = DenseStorage(growth)
        self._workspace = workspace or Workspace()
        self.version = 0
        self.clear()

    def clear(self) -> None:
        self.version += 1
        self.dense.clear()
        self.formats = self._formats
        self.widened_by = 0  # bits a key's number more than was asked for
        self.seen = 0
        self.bases: tuple[Basis, Basis] | None = None
        self.forms: Sequence[ChannelFormat | None] = ()  # of the keys of each block, where channels have own widths
        self._own_forms = False  # not shared with other caches
        self._unsettled: _Unsettled | None = None
        self._set_blocks([])
        self._positions: Tensor | None = None  # int32 [B, Hkv, slots of the last `keep`]

    def _set_blocks(self, blocks: Sequence[tuple[Part, PackedTensor]]) -> None:
        self.blocks = blocks
        self.blocked = sum(keys.tokens for keys, _ in blocks)

    def parted(self, pick: Pick, forms: Sequence[ChannelFormat | None] = ()) -> TieredStorage:
        """A storage for some heads, before anything is kept or packed. Its tokens are those of this one until `keep`.

        forms: as in `fit`, of these heads, where they are known already.
        """
        assert self._positions is None, "tokens were kept already"
        part = TieredStorage(self._formats, self.dense.growth, self._workspace)
        part.dense, part.seen = self.dense.parted(pick), self.seen
        if self.bases is not None:
            keys, values = self.bases
            part.bases = keys.parted(pick), values.parted(pick)
            part.forms = forms or [None if form is None else form.parted(pick) for form in self.forms]
            part._own_forms = self._own_forms
        if self._unsettled is not None:
            part._unsettled = replace(self._unsettled, pick=pick)
        return part

    # Size

    @property
    def empty(self) -> bool:
        return self.dense.keys_buffer is None

    @property
    def rows(self) -> int:
        return self._keys_buffer.shape[0]

    @property
    def kv_heads(self) -> int:
        return self._keys_buffer.shape[1]

    @property
    def device(self) -> torch.device:
        return self._keys_buffer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is held as the model made it."""
        return self._keys_buffer.dtype

    @property
    def _keys_buffer(self) -> Tensor:
        assert self.dense.keys_buffer is not None, "nothing is held"
        return self.dense.keys_buffer

    @property
    def _dense_keys(self) -> Tensor:
        assert self.dense.keys is not None, "nothing is held"
        return self.dense.keys

    @property
    def length(self) -> int:
        """Slots: P."""
        return self.blocked + self.dense.length

    @property
    def kept(self) -> int:
        """Slots of the last `keep`; behind them is what came since."""
        return 0 if self._positions is None else self._positions.shape[2]

    @property
    def kept_positions(self) -> Tensor | None:
        """Their positions, int32 `[B, Hkv, kept]`."""
        return self._positions

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        blocks = sum(keys.nbytes + values.nbytes for keys, values in self.blocks)
        return self.dense.nbytes + blocks + sum(basis.nbytes for basis in self.bases or ())

    @property
    def nbytes_at_16_bits(self) -> int:
        """Bytes of what is held with two bytes for each number that is not quantized, and without room to grow."""
        if self.empty:
            return 0
        codes = sum(part.nbytes for pair in self.blocks for part in pair if part.bits != RAW)
        codes += sum(basis.spread.nbytes for basis in self.bases or () if basis.spread is not None)
        return codes + (self.nbytes - codes - self.dense.room_nbytes) * 2 // self._dense_keys.element_size()

    @property
    def state_nbytes(self) -> int:
        """Bytes held besides keys and values: positions, and widths that no profile gave."""
        positions = 0 if self._positions is None else self._positions.nbytes
        return positions + sum(form.nbytes for form in self.forms if form is not None and self._own_forms)

    def sizes(self) -> LayerSizes:
        """The arithmetic of bytes for one row of what is held."""
        keys, values = self._dense_keys, self.dense.values
        assert values is not None
        sizes = (keys.shape[-1], values.shape[-1])
        ranks = sizes
        if self.bases is not None and self.formats.rank is not None:
            ranks = (self.bases[0].rank(sizes[0]), self.bases[1].rank(sizes[1]))
        return LayerSizes(self.formats, self.kv_heads, sizes, ranks, keys.element_size())

    @property
    def positions(self) -> Tensor:
        """Position of every slot, int64 `[B, Hkv, P]`: the number of tokens before it, padding counted."""
        recent = torch.arange(self.seen - (self.length - self.kept), self.seen, device=self.device)
        recent = recent.expand(self.rows, self.kv_heads, -1)
        return recent if self._positions is None else torch.cat([self._positions.long(), recent], dim=2)

    def _positions_of(self, slots: Tensor) -> Tensor:
        """`positions` of some slots, int64 `[B, Hkv, K]`."""
        untouched = self._positions is None and self.seen == self.length
        return slots if untouched else self.positions.gather(2, slots)

    @property
    def centred_before_rope(self) -> bool:
        """Whether keys are held less their mean before RoPE."""
        return self.bases is not None and self.bases[0].rope is not None

    # What goes in

    def append(self, keys: Tensor, values: Tensor, reserve: int = 0) -> None:
        """Adds tokens at the end, with room for `reserve` more."""
        self.seen += keys.shape[2]
        self.dense.append(keys, values, reserve)

    def appended(self) -> None:
        """Counts a token that was written to the buffers of `dense`, which took it."""
        self.seen += 1
        self.dense.length += 1

    @torch.no_grad()
    def fit(
        self,
        real: Tensor | None,
        rope: Rope | None = None,
        forms: Sequence[ChannelFormat | None] = (),
        query_energy: Tensor | None = None,
        last: LastQueries | None = None,
    ) -> None:
        """Finds the coordinates for the blocks, once, from all tokens of which `real [B, P]` is not False.

        Args:
            rope: how the keys turn with their position; None: they do not, or it is not known.
            forms: formats of the keys where channels have widths of their own, one a block (None where they have not).
            query_energy: `[Hq, D]`, squares of the prompt's queries, summed. Where no forms are given, they are found
                from this and the prompt's keys.
            last: the prompt's last queries. Where the widths of `forms` make a large error in their logits, `settle`
                gives the layer's formats a bit more, until they do not.
        """
        if self.bases is not None or self.formats.raw:
            return
        keys, values, f = self._dense_keys, self.dense.values, self.formats
        assert values is not None
        positions = torch.arange(self.seen - keys.shape[2], self.seen, device=keys.device)[None, None]
        if f.by_channel:
            of_keys = fit_channels(keys, positions, real, rope)
            self._own_forms = not forms
            if query_energy is None and last is not None:
                query_energy = last.queries.float().square().sum((0, 2))
            energy = _energy(of_keys, query_energy)
            self.forms = forms or channel_formats(f, energy, keys.device)
            guard = None if last is None else LogitGuard.of(keys, positions, real, of_keys, last)
            if guard is not None and (form := self._first_form()) is not None:
                self._unsettled = _Unsettled(guard, energy, guard.squared_error(form))
        else:
            of_keys = fit(keys, positions, real, centred=True, rotate=f.rotation, rank=f.rank, rope=rope)
        of_values = fit(values, positions, real, centred=False, rotate=f.rotation, rank=f.rank)
        self.bases = of_keys, of_values

    def _first_form(self) -> ChannelFormat | None:
        return next((form for form in self.forms if form is not None), None)

    @torch.no_grad()
    def settle(self) -> None:
        """Decides on the formats that `fit` has found: what it has put to the device is waited for.

        The keys get a bit more as long as the first of their formats is not near enough; `widened_by` says how many.
        """
        if (of := self._unsettled) is None:
            return
        self._unsettled, guard, energy, error = None, of.guard, of.energy, of.error.read()
        if of.pick is not None:
            error = of.pick(error, 0)
        if guard.allows(error):
            return
        # The profile has not foreseen this layer: the prompt itself is asked.
        if of.pick is not None:
            guard, energy = guard.parted(of.pick), energy.parted(of.pick)
        while not guard.allows(error) and self.widened_by < WIDEST:
            self.widened_by += 1
            self.formats = widened(self._formats, self.widened_by)
            self.forms, self._own_forms = channel_formats(self.formats, energy, self.device), True
            form = self._first_form()
            assert form is not None
            error = guard.squared_error(form).read()

    @property
    def fits_spread(self) -> bool:
        """Whether the next `keep` asks which tokens are attended to."""
        return not self.blocks and self._first_form() is not None

    @torch.no_grad()
    def keep(self, indices: Tensor, lengths: Sequence[int], attended: Tensor | None = None) -> None:
        """Keeps the tokens in some slots, in a new order, and frees the rest.

        Args:
            indices: int64 `[B, Hkv, P]`, the slots that they lie in now: first those of each block, then those that
                stay as they are.
            lengths: how many slots each of these parts has.
            attended: float32 `[B, Hkv, P]`, the attention that they receive, or -1 where a slot stays empty: an error
                in a key counts as much. None: it is not known, and all count alike.
        """
        self.settle()
        self.version += 1
        *blocks, stays = indices.split(list(lengths), dim=2)
        # What only fills rows up may point into a block.
        dense = (stays - self.blocked).clamp(min=0)
        positions = self._positions_of(indices).to(torch.int32)
        self._set_blocks(list(zip(self._moved_keys(blocks, attended), self._moved(1, blocks), strict=True)))
        self._positions = positions
        self.dense.keep(dense)
        if not self.blocked:
            self._set_blocks([])
            self.bases, self.forms = None, ()
            self.formats, self.widened_by = self._formats, 0

    def _moved_keys(self, parts: Sequence[Tensor], attended: Tensor | None) -> Sequence[Part]:
        return self._recoded(parts, attended) if self.formats.by_channel else self._moved(0, parts)

    def _moved(self, which: int, parts: Sequence[Tensor]) -> list[PackedTensor]:
        """Keys (0) or values (1) of the tokens in the slots of each part, in the format of its block."""
        if not parts:
            return []
        x, basis = self._source(which)
        widest, group_size = int(self.formats.important[which]), self.formats.group_size
        if self.blocks:
            held = [part.coordinates() for block in self.blocks if isinstance(part := block[which], PackedTensor)]
            new = Coordinates.of(x, basis, self.positions[..., self.blocked :], widest, group_size)
            source = Coordinates.joined([*held, new])
            moved = [source.gather(part) for part in parts]
        else:  # a whole prompt, most of which goes: only what stays is quantized
            numbers = (basis.taken(x, part, self._positions_of(part)) for part in parts)
            moved = [Coordinates.of_numbers(of, x.dtype, widest, group_size) for of in numbers]
        widths = (int(bits[which]) for bits in self.formats.blocks)
        return [PackedTensor.of(tokens, bits) for tokens, bits in zip(moved, widths, strict=True)]

    def _source(self, which: int) -> tuple[Tensor, Basis]:
        assert self.bases is not None, "fit() comes first"
        x = (self.dense.keys, self.dense.values)[which]
        assert x is not None
        return x, self.bases[which]

    def _recoded(self, parts: Sequence[Tensor], attended: Tensor | None) -> list[Part]:
        """Keys of the tokens in the slots of each part, in the format of its block.

        A token that stays in its block keeps its codes. One that moves to another is coded from what its codes stand
        for. Codes of fewer levels that nest in those of more have been tried: their range fits no width well.
        """
        if not parts:
            return []
        _, basis = self._source(0)
        assert basis.spread is not None
        all_numbers = self._numbers(parts)
        if not self.blocks:
            basis.spread = channels.fitted_spread(basis.spread, all_numbers, self.forms, attended)
        start, result = 0, list[Part]()
        before: list[Part | None] = [keys for keys, _ in self.blocks]
        before += [None] * (len(parts) - len(before))
        of_parts = zip(parts, all_numbers, before, self.formats.blocks, self.forms, strict=True)
        for part, numbers, old, bits, form in of_parts:
            end = start + (0 if old is None else old.tokens)
            staying: tuple[Tensor, Tensor] | None = None  # where they stand, and which these are
            if end > start:
                staying = (part - start).clamp(0, end - start - 1), (part >= start) & (part < end)
            if form is None:
                made = Coordinates.of_numbers(numbers, self._dense_keys.dtype, int(bits[0]), self.formats.group_size)
                if staying is not None and isinstance(old, PackedTensor):
                    made = made.replaced(old.coordinates().gather(staying[0]), staying[1])
                result.append(PackedTensor.of(made, int(bits[0])))
            else:
                codes = channels.quantize(numbers, basis.spread, form)
                if staying is not None and isinstance(old, ChannelTensor):
                    codes = codes.replaced(old.codes().gather(staying[0]), staying[1])
                result.append(ChannelTensor.of(codes, form))
            start = end
        return result

    def _numbers(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Keys less their centre of the tokens in the slots of each part, float32 `[B, Hkv, P, D]`."""
        x, basis = self._source(0)
        if not self.blocks:  # a whole prompt, most of which goes: only what stays is looked at
            return [basis.taken(x, part, self._positions_of(part)) for part in parts]
        blocked = self.blocked
        numbers, start = torch.empty((self.rows, self.kv_heads, self.length, x.shape[-1]), device=x.device), 0
        for keys, _ in self.blocks:
            self._write_numbers(keys, numbers[:, :, start : start + keys.tokens])
            start += keys.tokens
        numbers[:, :, blocked:] = basis.coordinates(x, self.positions[..., blocked:])
        return [take(numbers, part) for part in parts]

    # What comes out

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, P, D]` for attention; see `rotations`.

        Where there are blocks, they stand in the workspace, until another layer asks.
        """
        keys, values = self.dense.keys, self.dense.values
        assert keys is not None and values is not None
        if self.bases is None or not self.blocks:
            return keys, values
        return self._unpacked(0, keys), self._unpacked(1, values)

    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        """What `attended` keys and values are multiplied with from the right, `[D, D]`; None: they are as they were."""
        if self.bases is None or not self.blocks:
            return None, None
        keys, values = self.bases
        return keys.rotation, values.rotation

    def read(self) -> tuple[Tensor, Tensor]:
        """Copies of keys and values as the model made them, but for what quantization and projection lost."""
        found = self.attended()
        if not self.blocks:
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
        for block in self.blocks:
            end = start + block[which].tokens
            self._unpack(block[which], basis, start, out[:, :, start:end])
            start = end
        out[:, :, start:] = dense if basis.rotation is None else turn(dense, basis.rotation)
        return out

    def _unpack(self, part: Part, basis: Basis, start: int, out: Tensor) -> None:
        numbers = out
        if basis.projection is not None or out.dtype != torch.float32:
            shape = (*out.shape[:3], basis.rank(out.shape[-1]))
            numbers = self._workspace.take("numbers", shape, torch.float32, out.device)
        self._write_numbers(part, numbers)
        if basis.projection is not None:
            numbers = numbers @ basis.projection.float().transpose(-1, -2)
        assert self._positions is not None
        centre = basis.centre_at(self._positions[..., start : start + part.tokens])
        if centre is not None:
            numbers += centre if basis.rotation is None else turn(centre, basis.rotation)
        if numbers is not out:
            out.copy_(numbers)

    def _write_numbers(self, part: Part, out: Tensor) -> None:
        if isinstance(part, ChannelTensor):
            assert self.bases is not None and self.bases[0].spread is not None
            part.write(self.bases[0].spread, out)
        else:
            part.write(out)

    # The rest

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it, which may repeat."""
        self.version += 1
        self.dense.select_rows(rows)
        for part in (part for pair in self.blocks for part in pair):
            part.select_rows(rows)
        for basis in self.bases or ():
            basis.select_rows(rows)
        if self._positions is not None:
            self._positions = self._positions.index_select(0, rows.to(self._positions.device))

    def state(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""
        named = {"keys": self.dense.keys, "values": self.dense.values, "positions": self._positions}
        for which, name in enumerate(("keys", "values")):
            for number, block in enumerate(self.blocks):
                named |= {f"block{number}.{name}.{key}": t for key, t in block[which].tensors.items()}
            if self.bases is not None:
                basis = self.bases[which]
                named |= {f"{part}.{name}": getattr(basis, part) for part in ("centre", "projection", "spread")}
        if self.widened_by:
            named["widened_by"] = torch.tensor(self.widened_by)
        if self.bases is not None and (rope := self.bases[0].rope) is not None:
            named |= {"rope.partner": rope.partner, "rope.frequencies": rope.frequencies}
        for number, form in enumerate(self.forms):
            if form is not None:
                named |= {f"block{number}.widths": form.widths, "weight.keys": form.weight}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def load_state(self, tensors: Mapping[str, Tensor], seen: int) -> None:
        """Replaces everything by what `state` of a storage of the same formats gave, which had seen so many tokens."""
        self.clear()
        self.dense.append(tensors["keys"], tensors["values"])
        self.seen = seen
        self._positions = tensors.get("positions")
        self.widened_by = int(tensors.get("widened_by", torch.zeros(())))
        self.formats = widened(self._formats, self.widened_by)
        if self.formats.raw or "centre.keys" not in tensors:
            return
        sides = ("keys", "values")
        keys, values = (self._loaded_basis(tensors, name) for name in sides)
        if "rope.partner" in tensors:
            keys.rope = Rope(tensors["rope.partner"], tensors["rope.frequencies"])
        self.bases = keys, values
        forms, blocks = list[ChannelFormat | None](), list[tuple[Part, PackedTensor]]()
        for number, bits in enumerate(self.formats.blocks):
            of_keys, of_values = (_of_prefix(tensors, f"block{number}.{name}.") for name in sides)
            form = None
            if (widths := tensors.get(f"block{number}.widths")) is not None:
                form = ChannelFormat(widths.cpu(), tensors["weight.keys"])
            forms.append(form)
            if of_keys:
                held = PackedTensor(int(bits[0]), of_keys) if form is None else ChannelTensor(form, of_keys)
                blocks.append((held, PackedTensor(bits[1], of_values)))
        self._set_blocks(blocks)
        if self.formats.by_channel:
            self.forms, self._own_forms = forms, True

    def _loaded_basis(self, tensors: Mapping[str, Tensor], name: str) -> Basis:
        projection, spread, x = tensors.get(f"projection.{name}"), tensors.get(f"spread.{name}"), tensors[name]
        turned = self.formats.rotation and projection is None and spread is None
        matrix = rotation(x.shape[-1], x.device) if turned else None
        return Basis(matrix, projection, tensors.get(f"centre.{name}"), spread=spread)


def channel_formats(formats: Formats, energy: KeyEnergy, device: torch.device) -> list[ChannelFormat | None]:
    """The format of the keys of each block, with widths for that energy; None where all channels have the same.

    device: of the keys. The energy may lie elsewhere.
    """
    product = (energy.keys * energy.queries).cpu()
    weight = energy.queries.to(device, non_blocking=True)
    return [
        ChannelFormat(allocate(product, keys), weight) if formats.key_channels(keys) else None
        for keys, _ in formats.blocks
    ]


def _energy(basis: Basis, queries: Tensor | None) -> KeyEnergy:
    """Of a prompt: of all its keys, and of its queries, whose squares sum up to `[Hq, D]`."""
    assert basis.spread is not None
    keys = basis.spread.float().square().mean((0, 2))
    if queries is None:
        return KeyEnergy(keys, torch.ones_like(keys))
    heads = queries.unflatten(0, (len(keys), -1)).mean(1)
    return KeyEnergy(keys, heads if basis.rope is None else basis.rope.averaged(heads))


def _of_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
