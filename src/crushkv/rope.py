"""RoPE: what turns keys with their position, and how it is measured from keys at known positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """How the keys of one layer turn: `R_p x = x cos(p frequencies) + x[partner] sin(p frequencies)`.

    Attributes:
        partner: int64 `[D]`, the channel that each channel is turned with; its own index where it is not turned.
        frequencies: float32 `[D]`, radians a position, signed: opposite for the two channels of a pair; 0 where a
            channel is not turned.
    """

    partner: Tensor
    frequencies: Tensor
    _elsewhere: dict[torch.device, Rope] = field(default_factory=dict, repr=False)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`R_p x` in float32. `x [..., D]`; `positions`: broadcast against `x`'s axes without the last."""
        return self._turn(x, positions, 1)

    def unturned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`R_-p x` in float32: what `turned` was given."""
        return self._turn(x, positions, -1)

    def _turn(self, x: Tensor, positions: Tensor, sign: int) -> Tensor:
        x = x.float()
        cosines, sines = self._angles(positions.to(x.device))
        return torch.addcmul(x * cosines, x[..., self.partner.to(x.device)], sines, value=sign)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at `positions [...]`: `[..., D]` each."""
        # A GPU computes faster than it looks up, and would be waited for to learn how far the positions reach.
        on_cpu = positions.device.type == "cpu"
        if on_cpu and positions.numel() >= 256 and int(positions.max()) < _TABLED:
            reach = 1 << max(int(positions.max()), 1).bit_length()
            tables = _table(tuple(self.frequencies.tolist()), reach, positions.device)
            cosines, sines = (t.index_select(0, positions.flatten()).view(*positions.shape, -1) for t in tables)
            return cosines, sines
        found = angles(positions, self.frequencies)
        return found.cos().float(), found.sin().float()

    def to(self, device: torch.device) -> Rope:
        """The same on the device of the keys, where it stays."""
        if device == self.partner.device:
            return self
        if device not in self._elsewhere:
            with torch.inference_mode(False):
                partner, frequencies = (x.to(device, non_blocking=True) for x in (self.partner, self.frequencies))
                self._elsewhere[device] = Rope(partner, frequencies)
        return self._elsewhere[device]

    def averaged(self, energy: Tensor) -> Tensor:
        """`energy [..., D]` with the mean of the two channels that are turned together in place of each."""
        return (energy + energy[..., self.partner.to(energy.device)]) / 2


# Below this position, cosines and sines are looked up on a CPU, since computing them takes several times as long. A
# table of so many for heads of 128 channels takes 32 MiB.
_TABLED = 32768


def angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles `[..., D]`, float64 and exact, so that two ways to compute a turn agree at far positions, too.

    Models round them to float32, which moves a centre by next to nothing, and is a part of what remains when it is
    subtracted.
    """
    return positions[..., None].double() * frequencies.to(positions.device).double()


def pairs_of(partner: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """The pairs of channels that are turned together, and the channels that are not turned."""
    pairs = [(a, b) for a, b in enumerate(partner) if a < b]
    return pairs, [a for a, b in enumerate(partner) if a == b]


@lru_cache(maxsize=2)
def _table(frequencies: tuple[float, ...], reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine at every position below `reach`: `[reach, D]` each. Layers that turn alike share it."""
    with torch.inference_mode(False):
        found = angles(torch.arange(reach, device=device), torch.tensor(frequencies))
        return found.cos().float(), found.sin().float()


@dataclass(frozen=True)
class Finding:
    """What was found in one layer: `rope`, or None; and in words, how its keys turn or why that is not known."""

    rope: Rope | None
    text: str
    unclear: bool = False  # the keys change with the position, but not as RoPE would have it


@dataclass(frozen=True)
class PlacedKeys:
    """Keys of the same few tokens at some positions.

    Attributes:
        positions: int64 `[P]`, ascending from 0 and 1.
        layers: float32 `[T, P, Hkv, D]` each.
        frequencies: tensors of the model, flat, among which the frequencies may be.
    """

    positions: Tensor
    layers: list[Tensor]
    frequencies: list[Tensor]


def fit_ropes(keys: PlacedKeys, tolerance: float) -> list[Finding]:
    """How each layer turns its keys. `tolerance`: by which part of itself a key may differ from what is predicted."""
    found: list[Finding] = []
    layout: _Layout | None = None
    for layer in keys.layers:
        finding, layout = _fit_layer(layer, keys, tolerance, layout)
        found.append(finding)
    return found


@dataclass(frozen=True)
class _Layout:
    """Which channels are turned together: `first [J]` with `second [J]`."""

    name: str  # of the way to pair them
    first: Tensor
    second: Tensor


def _layouts(channels: int, before: _Layout | None) -> Iterator[list[_Layout]]:
    """Ways to pair channels, the likeliest first: all channels, as in the layer before, then ever fewer."""
    for turned in range(channels - channels % 2, 0, -2):
        layouts = []
        for start in sorted({0, channels - turned}):  # the first ones, or the last
            half, even = torch.arange(start, start + turned // 2), torch.arange(start, start + turned, 2)
            layouts.append(_Layout("half-split pairs", half, half + turned // 2))
            layouts.append(_Layout("interleaved pairs", even, even + 1))
        yield layouts
        if before is not None:
            yield [before]
            before = None


def _fit_layer(
    layer: Tensor, keys: PlacedKeys, tolerance: float, before: _Layout | None
) -> tuple[Finding, _Layout | None]:
    """Of `layer [T, P, Hkv, D]`. `before`: the layout found before, which is tried first. Returns its own, too."""
    channels = layer.shape[-1]
    if not bool(layer.isfinite().all()):
        return Finding(None, "the keys are not finite"), before
    still = Rope(torch.arange(channels), torch.zeros(channels))
    if misfit_of(still, keys.positions, layer, tolerance) <= tolerance:
        return Finding(None, "no RoPE: the keys are the same at every position"), before
    # Turning changes no energy. (The attention factor of YaRN is the same at every position, 0 included.)
    energy = layer.pow(2)
    if not _kept(energy.sum(-1), tolerance):
        return Finding(None, "no RoPE: the keys' size depends on the position", unclear=True), before
    for layouts in _layouts(channels, before):
        layouts = [one for one in layouts if _kept(energy[..., one.first] + energy[..., one.second], tolerance)]
        if not layouts:
            continue
        ropes = [_measure(layer, keys, layout) for layout in layouts]
        misfits = [misfit_of(rope, keys.positions, layer, tolerance) for rope in ropes]
        best = min(range(len(layouts)), key=misfits.__getitem__)
        if misfits[best] <= tolerance:
            rope, exact = _exact(layer, keys, layouts[best], ropes[best], tolerance)
            turned = int((rope.frequencies != 0).sum())
            text = f"RoPE turns {turned} of {channels} channels, in {layouts[best].name}"
            measured = "" if exact else "; its frequencies are measured from the keys"
            return Finding(rope, text + measured), layouts[best]
    return Finding(None, "the keys depend on the position otherwise than by RoPE", unclear=True), before


def _kept(energy: Tensor, tolerance: float) -> bool:
    """Whether `energy [T, P, ...]` is the same at every position, where it counts."""
    return bool((energy - energy[:, :1]).abs().mean((0, *range(2, energy.ndim))).max() <= 4 * tolerance * energy.mean())


def _rope(layout: _Layout, frequencies: Tensor, channels: int) -> Rope:
    """`frequencies [J]` of the pairs; a pair of frequency 0 is not turned."""
    partner, signed = torch.arange(channels), torch.zeros(channels)
    frequencies = frequencies.float()
    turns = frequencies != 0
    first, second = layout.first[turns], layout.second[turns]
    partner[first], partner[second] = second, first
    signed[first], signed[second] = -frequencies[turns], frequencies[turns]
    return Rope(partner, signed)


def _measure(layer: Tensor, keys: PlacedKeys, layout: _Layout) -> Rope:
    """The frequencies from the phases of the pairs, refined from near to far positions."""
    pairs = torch.complex(layer[..., layout.first].double(), layer[..., layout.second].double())
    quotient = (pairs * pairs[:, :1].conj()).sum((0, 2))  # [P, J]
    phase = quotient.angle()
    positions = keys.positions.double()
    frequency = phase[1] / positions[1]
    for p in range(2, len(positions)):
        rest = phase[p] - positions[p] * frequency
        frequency = frequency + torch.remainder(rest + torch.pi, 2 * torch.pi).sub(torch.pi) / positions[p]
    moved = (pairs - pairs[:, :1]).abs().amax((0, 1, 2))
    return _rope(layout, torch.where(moved == 0, 0.0, frequency), layer.shape[-1])


def _exact(layer: Tensor, keys: PlacedKeys, layout: _Layout, rope: Rope, tolerance: float) -> tuple[Rope, bool]:
    """The model's own frequencies in place of the measured ones, where a tensor of it predicts the keys as well."""
    count, exact = len(layout.first), False
    limit = misfit_of(rope, keys.positions, layer, tolerance) + tolerance / 20
    for frequencies in keys.frequencies:
        if len(frequencies) > count:
            continue
        # Fewer: the others are not turned.
        filled = torch.cat([frequencies, frequencies.new_zeros(count - len(frequencies))])
        candidate = _rope(layout, filled, layer.shape[-1])
        misfit = misfit_of(candidate, keys.positions, layer, tolerance)
        if misfit < limit:
            rope, exact, limit = candidate, True, misfit
    return rope, exact


def misfit_of(rope: Rope, positions: Tensor, layer: Tensor, tolerance: float) -> float:
    """By which part of itself a key differs from what is predicted: root mean square over pairs of channels.

    Pairs count alike, whatever their energy: where nearly all of it is in a pair that hardly turns, any layout would
    do else. Of a pair with next to nothing in it, rounding may be the larger part, which counts little. `layer`: keys
    `[T, P, Hkv, D]` at `positions [P]`, of which the first is 0.
    """
    predicted = rope.turned(layer[:, :1], positions[:, None])
    error = rope.averaged((predicted - layer).pow(2).mean((0, 1, 2)))
    energy = rope.averaged(layer.pow(2).mean((0, 1, 2)))
    return float((error / (energy + tolerance**2 * energy.mean()).clamp(min=1e-30)).mean().sqrt())
