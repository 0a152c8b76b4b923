"""Keys whose channels have widths of their own, with one scale a token.

The centre is subtracted from a key. What is left is divided by each channel's spread and by the token's scale, and
rounded to the levels of a uniform quantizer for normal numbers, each channel at its own width. A few scales
are tried, and the one that makes the error of the logits least is taken: a fixed scale would clip outliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiled import Levels, quantizer
from ..constants import constant
from .basis import LEAST_SPREAD, MOST_SPREAD, as_spread
from .buffers import Pick, take
from .widths import STEPS

# Scales that are tried, as parts of the token's root mean square.
_FACTORS = (0.8, 1.0, 1.25, 1.6, 2.2)
_LOGS = tuple(map(math.log2, _FACTORS))
# A scale is a power of 2 ** (1 / 16) in eight bits: finer than what the search is about.
_OCTAVE, _UNIT = 16, 128
_LEAST = 1e-6
# Spreads of a channel that are tried, as parts of its root mean square.
_SPREADS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
# Of the tokens in the order of their attention, the first are all looked at for that, and the others in such steps.
_ALL_OF, _STEP = 256, 4
# Beside the attention that a token receives, so many times the mean counts: others will be attended to later. With less
# of it, the error of all other keys grows (measured on two models).
_EVERY_TOKEN = 9.0
_LEAST_ERROR = 1e-30
# Tokens that are quantized at a time on a CPU: few enough for the numbers to stay in its cache. Elsewhere so many
# numbers: each step of the search is a pass over them, of which few and long ones are wanted, in bounded memory.
_TOGETHER = 512
_NUMBERS_TOGETHER = 2**25


@dataclass(frozen=True, eq=False)
class ChannelFormat:
    """Widths of one layer's keys, shared by the rows of a batch and by all caches with the same profile.

    Attributes:
        widths: int64 `[Hkv, D]`, bits of each channel, 0 to 6; in main memory, since sizes depend on them.
        weight: float32 `[Hkv, D]`, what an error in a channel costs: the energy of the queries there. It lies where the
            keys do, as everything else here.
    """

    widths: Tensor
    weight: Tensor

    def parted(self, pick: Pick) -> ChannelFormat:
        """The same for some heads."""
        return ChannelFormat(pick(self.widths, 0), pick(self.weight, 0))

    @cached_property
    def planes_here(self) -> tuple[tuple[int, Tensor, Tensor], ...]:
        """`planes` in main memory."""
        flat = self.widths.flatten()
        found = []
        for width in (4, 2, 1):
            channels = (flat & width).nonzero()[:, 0]
            found.append((width, channels, (flat[channels] % width).to(torch.uint8)[:, None]))
        return tuple(found)

    @cached_property
    def planes(self) -> tuple[tuple[int, Tensor, Tensor], ...]:
        """Where the bits of the codes lie: for planes of 4, 2 and 1 bits, the channels `[n]` of all heads that have
        bits in it, and how far up in the code they stand, uint8 `[n, 1]`."""
        return tuple((width, self._moved(channels), self._moved(up)) for width, channels, up in self.planes_here)

    @cached_property
    def steps(self) -> Tensor:
        """Distance of the levels, float32 `[Hkv, 1, D]`."""
        return self._moved(self._steps)

    @cached_property
    def used(self) -> Tensor:
        """Which channels have bits, bool `[Hkv, 1, D]`."""
        return self._moved(self.widths[:, None] > 0)

    @property
    def _steps(self) -> Tensor:
        return torch.tensor(STEPS)[self.widths][:, None]

    @cached_property
    def size_weights(self) -> Tensor:
        """What the squares of a token's numbers, in steps, count in its mean square: float32 `[Hkv, 1, D]`."""
        used = self.widths > 0
        return self._moved((used[:, None] * self._steps.square()) / used.sum(-1).clamp(min=1)[:, None, None])

    @cached_property
    def last(self) -> Tensor:
        """The greatest code, float32 `[Hkv, 1, D]`."""
        return self._moved(((1 << self.widths) - 1).float()[:, None])

    @cached_property
    def levels(self) -> Levels:
        """What is compiled is given of these."""
        return Levels(self.steps, self.weight, self.size_weights, self.last)

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.weight.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        return self.widths.nbytes + self.weight.nbytes


@dataclass(frozen=True)
class ChannelCodes:
    """codes: uint8 `[B, Hkv, P, D]`. scale: uint8 `[B, Hkv, P, 1]`, a power of two in sixteenths."""

    codes: Tensor
    scale: Tensor

    def gather(self, indices: Tensor) -> ChannelCodes:
        """The tokens at `indices [B, Hkv, K]`."""
        return ChannelCodes(take(self.codes, indices), take(self.scale, indices))

    def numbers(self, spread: Tensor, form: ChannelFormat) -> Tensor:
        """What the codes stand for, float32 `[B, Hkv, P, D]`; `spread` as in `quantize`."""
        return _write(self.codes, self.scale, spread, form, torch.empty_like(self.codes, dtype=torch.float32))

    def replaced(self, by: ChannelCodes, where: Tensor) -> ChannelCodes:
        """These codes, but for the tokens of `where [B, Hkv, P]`, which have those of `by`."""
        at = where[..., None]
        return ChannelCodes(torch.where(at, by.codes, self.codes), torch.where(at, by.scale, self.scale))


def scales(codes: Tensor) -> Tensor:
    """Float32 scales of uint8 codes."""
    return ((codes.float() - _UNIT) / _OCTAVE).exp2_()


def quantize(x: Tensor, spread: Tensor, form: ChannelFormat) -> ChannelCodes:
    """Codes of keys `x [B, Hkv, P, D]` less their centre.

    Args:
        spread: float `[B, Hkv, 1, D]`, of each channel; see `fitted_spread`.
    """
    rows, heads, _, size = x.shape
    if (compiled := quantizer(x.device)) is not None:
        return ChannelCodes(*compiled.channel_codes(x, spread, form.levels, _LOGS, (_OCTAVE, _UNIT)))
    together = _TOGETHER if x.device.type == "cpu" else max(_TOGETHER, _NUMBERS_TOGETHER // (rows * heads * size))
    parts = [_quantize(part, spread.float(), form) for part in x.split(together, dim=2)]
    return ChannelCodes(*(torch.cat([getattr(p, name) for p in parts], dim=2) for name in ("codes", "scale")))


def fitted_spread(
    spread: Tensor, parts: Sequence[Tensor], forms: Sequence[ChannelFormat | None], attended: Tensor | None
) -> Tensor:
    """The spread of each channel that makes the product of its errors in all formats least: float16, as `spread`.

    An error in a key counts as much as the key is attended to. The root mean square of a channel says little about the
    keys that are: they have some of the largest numbers, which would be clipped.

    Args:
        spread: `[B, Hkv, 1, D]`, the root mean square of each channel.
        parts: keys less their centre in each format, float32 `[B, Hkv, P, D]` each; those without one do not count.
        attended: float32 `[B, Hkv, sum of P]` or more, as in `TieredStorage.keep`.
    """
    of_parts, start = list[tuple[Tensor, Tensor | None, ChannelFormat]](), 0
    for x, form in zip(parts, forms, strict=True):
        weight = None if attended is None else attended[..., start : start + x.shape[2]]
        start += x.shape[2]
        if form is not None and x.shape[2]:
            of_parts.append((x, weight, form))
    if not of_parts:
        return spread
    factors = constant(_SPREADS, spread.device)
    if (compiled := quantizer(spread.device)) is not None and compiled.FITS_SPREADS:
        given = [(x, weight, form.levels) for x, weight, form in of_parts]
        how = (_ALL_OF, _STEP), _EVERY_TOKEN, _LEAST_ERROR, (LEAST_SPREAD, MOST_SPREAD)
        fitted: Tensor = compiled.fitted_spread(spread, given, factors, *how)
        return fitted
    # In logarithms, the format with few bits does not decide alone.
    errors = [
        _spread_errors(x, weight, spread.float(), form).clamp_(min=_LEAST_ERROR).log_() for x, weight, form in of_parts
    ]
    total = torch.stack(errors).sum(0)
    used = torch.stack([form.used for _, _, form in of_parts]).any(0)
    # A channel without bits has the same error whatever its spread.
    return as_spread(spread.float() * factors[total.argmin(0)].masked_fill(~used, 1))


def _spread_errors(x: Tensor, weight: Tensor | None, spread: Tensor, form: ChannelFormat) -> Tensor:
    """The weighted squared error of each channel with each of `_SPREADS`, in squares of its steps with `spread`:
    float32 `[F, B, Hkv, 1, D]`.
    """
    weight = torch.ones_like(x[..., 0]) if weight is None else weight
    # Slots that are empty do not count, and the sample is by rank, so that a row does not depend on the others.
    empty = weight < 0
    weight = weight.clamp(min=0)
    mean = weight.sum(-1, keepdim=True) / (x.shape[2] - empty.sum(-1, keepdim=True)).clamp(min=1)
    weight = (weight + _EVERY_TOKEN * mean).masked_fill_(empty, 0)
    if (compiled := quantizer(x.device)) is not None:
        errors: Tensor = compiled.spread_errors(
            x, weight, spread, form.levels, constant(_SPREADS, x.device), (_ALL_OF, _STEP)
        )
        return errors
    weight, order = weight.sort(dim=-1, descending=True, stable=True)
    weight = torch.cat([weight[..., :_ALL_OF], _STEP * weight[..., _ALL_OF::_STEP]], dim=-1)
    x = take(x, torch.cat([order[..., :_ALL_OF], order[..., _ALL_OF::_STEP]], dim=-1))
    z = x / (spread * form.steps)
    size = (z.square() @ form.size_weights.transpose(-1, -2)).sqrt().clamp(min=_LEAST)
    scale = size * constant(_SPREADS, x.device).view(-1, 1, 1, 1, 1)
    y = z / scale
    off = _levels(y, form).sub_(form.last / 2).sub_(y).mul_(scale)
    return (off.square_() * weight[..., None]).sum(-2, keepdim=True)


def _write(codes: Tensor, scale: Tensor, spread: Tensor, form: ChannelFormat, out: Tensor) -> Tensor:
    return out.copy_(codes).sub_(form.last / 2).mul_(form.steps * spread.float()).mul_(scales(scale))


def _quantize(x: Tensor, spread: Tensor, form: ChannelFormat) -> ChannelCodes:
    unit = spread * form.steps
    z = x.float() / unit  # in steps of each channel's quantizer
    # Channels without a width bring the same error whatever the scale.
    cost = (form.weight[:, None] * unit.square()).transpose(-1, -2)  # [B, Hkv, D, 1]
    size = z.square() @ form.size_weights.transpose(-1, -2)
    base = size.sqrt().clamp(min=_LEAST).log2()
    best: tuple[Tensor, Tensor] | None = None
    for factor in _FACTORS:
        code = ((base + math.log2(factor)) * _OCTAVE).round().add_(_UNIT).clamp_(0, 255)
        scale = scales(code)
        y = z / scale
        error = (_levels(y, form).sub_(form.last / 2).sub_(y).square_() @ cost) * scale.square()
        if best is None:
            best = code, error
        else:
            better = error < best[1]
            best = torch.where(better, code, best[0]), torch.where(better, error, best[1])
    assert best is not None
    return ChannelCodes(_levels(z / scales(best[0]), form).to(torch.uint8), best[0].to(torch.uint8))


def _levels(y: Tensor, form: ChannelFormat) -> Tensor:
    """The codes of numbers in steps, as float32."""
    return (y + (form.last + 1) / 2).floor_().clamp_(min=0).minimum(form.last)


class ChannelTensor:
    """Keys of a tier in packed codes.

    tensors: uint8 `plane4`, `plane2` and `plane1`, `[B, n, bytes]` with the n channels of `ChannelFormat.planes`, and
    `scale [B, Hkv, P, 1]`. A plane packs along the tokens as `packing` does, which are filled up to a multiple of 8.
    """

    bits = 0  # not the model's dtype

    def __init__(self, form: ChannelFormat, tensors: Mapping[str, Tensor]) -> None:
        self.form = form
        self.tensors = dict(tensors)
        self.tokens = self.tensors["scale"].shape[2]

    @classmethod
    def of(cls, codes: ChannelCodes, form: ChannelFormat) -> ChannelTensor:
        rows, _, tokens, _ = codes.codes.shape
        if (compiled := quantizer(codes.codes.device)) is not None:
            length = -(-tokens // 8)
            planes = {
                f"plane{width}": compiled.pack_channels(codes.codes, channels, shift[:, 0], width, length * width)
                for width, channels, shift in form.planes
            }
            return cls(form, {"scale": codes.scale, **planes})
        by_channel = F.pad(codes.codes.transpose(-1, -2).flatten(1, 2), (0, -tokens % 8))  # [B, Hkv * D, P]
        tensors = {"scale": codes.scale}
        for width, channels, shift in form.planes:
            part = (by_channel[:, channels] >> shift) & ((1 << width) - 1)
            stretches = part.unflatten(-1, (8 // width, -1)).unbind(-2)
            plane = stretches[0].clone()
            for k, stretch in enumerate(stretches[1:], start=1):
                plane |= stretch << (k * width)
            tensors[f"plane{width}"] = plane
        return cls(form, tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def by_channel(self) -> Tensor:
        """Codes, uint8 `[B, Hkv, D, P]`, P filled up to a multiple of 8."""
        heads, size = self.form.widths.shape
        rows = self.tensors["scale"].shape[0]
        filled = -(-self.tokens // 8) * 8
        out = self.tensors["scale"].new_zeros((rows, heads * size, filled))
        for width, channels, shift in self.form.planes:
            plane = self.tensors[f"plane{width}"]
            part = torch.cat([(plane >> (k * width)) & ((1 << width) - 1) for k in range(8 // width)], dim=-1)
            # A channel is in a plane once at most, and its bits elsewhere are zero still.
            out.index_add_(1, channels, part << shift)
        return out.unflatten(1, (heads, size))

    def codes(self) -> ChannelCodes:
        by_channel = self.by_channel()[..., : self.tokens]
        return ChannelCodes(by_channel.transpose(-1, -2).contiguous(), self.tensors["scale"])

    def write(self, spread: Tensor, out: Tensor) -> None:
        """Writes the numbers that are held to float32 `out [B, Hkv, P, D]`; `spread` as in `quantize`."""
        codes = self.by_channel()[..., : self.tokens].transpose(-1, -2)
        _write(codes, self.tensors["scale"], spread, self.form, out)

    def select_rows(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows of it."""
        self.tensors = {name: t.index_select(0, rows.to(t.device)) for name, t in self.tensors.items()}
