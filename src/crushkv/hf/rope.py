"""How a model turns its keys with the position (RoPE): measured from the keys that its attention receives.

Nothing is taken from names or configurations. The model reads many sequences of one token, the same token at many
positions. A sequence of one token attends to itself alone, so the hidden states of all of them are equal, and their
keys differ by RoPE and by nothing else.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .support import cache_layers, input_device, position_limit

# A pass reaches at least so many positions: in fewer, no pair of channels turns visibly.
_LEAST = 32
# Up to here keys are predicted: beyond, the product of position and frequency is inexact in float32 itself.
_MOST = 8192
# Two tokens, as parts of the vocabulary: one's key may be next to nothing in some pair of channels.
_TOKENS = (0.31, 0.53)
# By which part of itself a key may differ from what is predicted, a root mean square over pairs of channels.
_TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Buffers above this size are no frequencies, and are not copied before a pass that may change them.
_SMALL = 65536


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

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`R_p x` in float32. `x [..., D]`; `positions`: broadcast against `x`'s axes without the last."""
        return self._turn(x, positions, 1)

    def unturned(self, x: Tensor, positions: Tensor) -> Tensor:
        """`R_-p x` in float32: what `turned` was given."""
        return self._turn(x, positions, -1)

    def _turn(self, x: Tensor, positions: Tensor, sign: int) -> Tensor:
        # The product in float32, as models have it: at far positions its rounding is a part of the angle.
        angles = positions[..., None].to(x.device, torch.float32) * self.frequencies.to(x.device)
        x = x.float()
        return x * angles.cos() + x[..., self.partner.to(x.device)] * (sign * angles.sin())

    def to(self, device: torch.device) -> Rope:
        """The same on another device, which the keys' own saves a copy at each call."""
        return Rope(self.partner.to(device), self.frequencies.to(device))

    def averaged(self, energy: Tensor) -> Tensor:
        """`energy [..., D]` with the mean of the two channels that are turned together in place of each."""
        return (energy + energy[..., self.partner.to(energy.device)]) / 2


@dataclass(frozen=True)
class Finding:
    """What was found in one layer: `rope`, or None; and in words, how its keys turn or why that is not known."""

    rope: Rope | None
    text: str


def find_ropes(model: Any, positions: int = 1) -> list[Rope | None]:
    """How each compressed layer turns its keys: one entry a layer that `cache_layers` gives as `DynamicLayer`.

    None where keys are not turned, or not in a way that is understood. The model is asked once: two forward passes
    over a few dozen tokens.

    Args:
        model: a Transformers model; nothing on it is changed.
        positions: tokens that the longest pass over the cache will reach. Some models (LongRoPE, dynamic NTK) turn
            all keys otherwise once a pass goes beyond the length that they were trained with; such a model is asked
            again for each number.
    """
    return [finding.rope for finding in examine_ropes(model, positions)]


def examine_ropes(model: Any, positions: int = 1) -> list[Finding]:
    """`find_ropes` with words for each layer."""
    key = (model.dtype, str(model.device))
    # What is found serves later calls, with gradients or without.
    with _asking, torch.inference_mode(False), torch.no_grad():
        known = _known.get(model)
        if known is None or known.key != key:
            known = _known[model] = _survey(model, key)
        if known.always is not None and positions <= known.reach:
            return known.always
        if positions not in known.at:
            known.at.clear()  # lengths are rarely met again
            known.at[positions] = _ask(model, max(positions, _LEAST))
        return known.at[positions]


@dataclass
class _Known:
    """What is known of a model: of every length, or of one."""

    key: tuple[torch.dtype, str]
    reach: int  # tokens of the longest pass that was tried
    always: list[Finding] | None  # for passes of up to `reach` tokens; None where the length matters
    at: dict[int, list[Finding]] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_asking = threading.RLock()  # two passes at a time would restore each other's state


def _survey(model: Any, key: tuple[torch.dtype, str]) -> _Known:
    """Fits the longest pass, and sees whether a short one turns keys as it does."""
    reach = position_limit(model.config) or _MOST
    try:
        keys, near = _keys(model, _probes(reach)), _keys(model, [0, min(reach, _LEAST) - 1], _TOKENS[:1])
    except Exception as error:  # models fail in as many ways as there are models
        return _Known(key, reach, _failure(model, error))
    findings, tolerance = _fit(model, keys), _TOLERANCE[model.dtype]
    for finding, of_far, of_near in zip(findings, keys.layers, near.layers, strict=True):
        rope = finding.rope
        if rope is None:
            continue
        noise = 2 * _misfit(rope, keys, of_far, tolerance) + tolerance / 20
        if _misfit(rope, near, of_near, tolerance) > noise:
            return _Known(key, reach, None)
    return _Known(key, reach, findings)


def _ask(model: Any, positions: int) -> list[Finding]:
    try:
        return _fit(model, _keys(model, _probes(positions)))
    except Exception as error:
        return _failure(model, error)


def _failure(model: Any, error: Exception) -> list[Finding]:
    reason = " ".join(f"the model cannot be asked for its keys ({type(error).__name__}: {error})".split())
    return [Finding(None, reason) for layer in cache_layers(model.config) if type(layer) is DynamicLayer]


# Asking the model


@dataclass(frozen=True)
class _Keys:
    """Keys of the same few tokens at some positions, ascending from 0: a layer `[T, P, Hkv, D]`, float32."""

    positions: Tensor  # [P]
    layers: list[Tensor]
    frequencies: list[Tensor]  # buffers of the model that may be the frequencies of this pass


def _probes(reach: int) -> list[int]:
    """Positions that tell frequencies, up to `reach - 1`: few, as each is a row."""
    last = min(reach, _MOST) - 1
    # Each is at most sixteen times the one before, so that one phase tells how many whole turns the next one has made,
    # whatever the dtype.
    positions = {0, last, *(16**n for n in range(8)), 5, last // 3}
    # The last one only makes the pass as long as that.
    return sorted(p for p in positions if p <= last) + [reach - 1] * (reach - 1 > last)


def _keys(model: Any, positions: list[int], tokens: tuple[float, ...] = _TOKENS) -> _Keys:
    """Reads some tokens (parts of the vocabulary) at the given positions."""
    asked = [p for p in positions if p < _MOST]
    device = input_device(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([int(part * vocabulary) for part in tokens], device=device)
    at = torch.tensor(positions, device=device)
    cache = DynamicCache(config=model.config)
    with _unchanged(model):
        # Logits are of no use here. `forward`: the hook of a block of KVCrush would put its own cache there.
        model.base_model.forward(
            input_ids=ids.repeat_interleave(len(at))[:, None],
            position_ids=at.repeat(len(ids))[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        buffers = [b for b in model.buffers() if b.is_floating_point() and 0 < b.numel() <= _SMALL and not b.is_meta]
        frequencies = [b.detach().flatten().float().cpu() for b in buffers]
    layers = []
    for layer, kind in zip(cache.layers, cache_layers(model.config), strict=True):
        if type(kind) is not DynamicLayer:
            continue
        keys = getattr(layer, "keys", None)
        if keys is None or keys.ndim != 4 or keys.shape[0] != len(ids) * len(at) or keys.shape[2] != 1:
            raise ValueError("its cache does not hold one key a sequence")
        keys = keys.detach()[:, :, 0].float().cpu()
        layers.append(keys.unflatten(0, (len(ids), len(at)))[:, : len(asked)])
    return _Keys(torch.tensor(asked), layers, frequencies)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back what the pass changes in the modules: some keep the frequencies of the longest pass so far."""
    plain = (bool, int, float, str, Tensor, type(None))
    before = [
        (
            module,
            dict(module._buffers),
            {name: b.clone() for name, b in module._buffers.items() if b is not None and b.numel() <= _SMALL},
            {name: value for name, value in vars(module).items() if isinstance(value, plain)},
            set(vars(module)),
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, buffers, contents, attributes, names in before:
            for name in set(vars(module)) - names:
                delattr(module, name)
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, content in contents.items():
                buffer = buffers[name]
                assert buffer is not None
                # In place, as a captured graph may read it there; untouched ones are not written to.
                if not buffer.is_meta and not torch.equal(buffer, content):
                    buffer.copy_(content)


# Reading the keys


def _fit(model: Any, keys: _Keys) -> list[Finding]:
    tolerance = _TOLERANCE[model.dtype]
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


def _layouts(channels: int, turned: int) -> Iterator[_Layout]:
    """The ways to pair the first or the last `turned` of so many channels."""
    for start in sorted({0, channels - turned}):
        half = torch.arange(start, start + turned // 2)
        yield _Layout("half-split pairs", half, half + turned // 2)
        even = torch.arange(start, start + turned, 2)
        yield _Layout("interleaved pairs", even, even + 1)


def _fit_layer(layer: Tensor, keys: _Keys, tolerance: float, before: _Layout | None) -> tuple[Finding, _Layout | None]:
    """Of `layer [T, P, Hkv, D]`. `before`: the layout found before, which is tried first. Returns its own, too."""
    channels = layer.shape[-1]
    if not bool(layer.isfinite().all()):
        return Finding(None, "the keys are not finite"), before
    still = Rope(torch.arange(channels), torch.zeros(channels))
    if _misfit(still, keys, layer, tolerance) <= tolerance:
        return Finding(None, "no RoPE: the keys are the same at every position"), before
    size = layer.pow(2).sum(-1)
    if bool(((size - size[:, :1]).abs() > 4 * tolerance * (size[:, :1] + tolerance**2 * size.mean())).any()):
        # The attention factor of YaRN is the same at every position, 0 included.
        return Finding(None, "no RoPE: the keys' size depends on the position"), before
    best: tuple[float, Rope, _Layout] | None = None
    for turned in range(channels - channels % 2, 0, -2):
        for layout in _layouts(channels, turned):
            rope = _measure(layer, keys, layout)
            misfit = _misfit(rope, keys, layer, tolerance)
            if best is None or misfit < best[0]:
                best = misfit, rope, layout
        if best is not None and best[0] <= tolerance:
            break
        if turned == channels - channels % 2 and before is not None:
            rope = _measure(layer, keys, before)
            if (misfit := _misfit(rope, keys, layer, tolerance)) <= tolerance:
                best = misfit, rope, before
                break
    if best is None or best[0] > tolerance:
        return Finding(None, "the keys depend on the position otherwise than by RoPE"), before
    misfit, rope, layout = best
    rope, exact = _exact(layer, keys, layout, rope, misfit, tolerance)
    turned = int((rope.frequencies != 0).sum())
    text = f"RoPE turns {turned} of {channels} channels, in {layout.name}"
    return Finding(rope, text if exact else f"{text}; its frequencies are measured from the keys"), layout


def _rope(layout: _Layout, frequencies: Tensor, channels: int) -> Rope:
    """`frequencies [J]` of the pairs; a pair of frequency 0 is not turned."""
    partner, signed = torch.arange(channels), torch.zeros(channels)
    frequencies = frequencies.float()
    turns = frequencies != 0
    first, second = layout.first[turns], layout.second[turns]
    partner[first], partner[second] = second, first
    signed[first], signed[second] = -frequencies[turns], frequencies[turns]
    return Rope(partner, signed)


def _measure(layer: Tensor, keys: _Keys, layout: _Layout) -> Rope:
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


def _exact(
    layer: Tensor, keys: _Keys, layout: _Layout, rope: Rope, misfit: float, tolerance: float
) -> tuple[Rope, bool]:
    """The model's own frequencies in place of the measured ones, where a buffer of it predicts the keys as well."""
    best, count = None, len(layout.first)
    for buffer in keys.frequencies:
        if len(buffer) > count:
            continue
        # Fewer: the others are not turned.
        candidate = _rope(layout, torch.cat([buffer, buffer.new_zeros(count - len(buffer))]), layer.shape[-1])
        own = _misfit(candidate, keys, layer, tolerance)
        if own <= misfit + tolerance / 20 and (best is None or own < best[0]):
            best = own, candidate
    return (rope, False) if best is None else (best[1], True)


def _misfit(rope: Rope, keys: _Keys, layer: Tensor, tolerance: float) -> float:
    """By which part of itself a key differs from what is predicted: root mean square over pairs of channels.

    Pairs count alike, whatever their energy: where nearly all of it is in a pair that hardly turns, any layout would
    do else. Of a pair with next to nothing in it, rounding may be the larger part, which counts little.
    """
    predicted = rope.turned(layer[:, :1], keys.positions[:, None])
    error = rope.averaged((predicted - layer).pow(2).mean((0, 1, 2)))
    energy = rope.averaged(layer.pow(2).mean((0, 1, 2)))
    return float((error / (energy + tolerance**2 * energy.mean()).clamp(min=1e-30)).mean().sqrt())
