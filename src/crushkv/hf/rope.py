"""How a model turns its keys with the position: measured from the keys that its attention receives.

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

from ..rope import Finding, PlacedKeys, Rope, fit_ropes, misfit_of
from .support import cache_layers, input_device, trained_positions

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


def find_ropes(model: Any, positions: int = 1) -> list[Rope | None]:
    """How each compressed layer turns its keys: one entry a layer that `cache_layers` gives as `DynamicLayer`.

    None where keys are not turned, or not in a way that is understood. The model is asked once: two forward passes
    over a dozen tokens, and a third one where these leave a doubt.

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
            try:
                known.at[positions], _, _ = _ask(model, max(positions, _LEAST))
            except Exception as error:
                known.at[positions] = _failure(model, error)
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
    reach = trained_positions(model.config) or _MOST
    try:
        findings, keys, level = _ask(model, reach)
        near = _keys(model, [0, min(reach, _LEAST) - 1], _TOKENS[:1], level)
    except Exception as error:  # models fail in as many ways as there are models
        return _Known(key, reach, _failure(model, error))
    tolerance = _TOLERANCE[model.dtype]
    for finding, of_far, of_near in zip(findings, keys.layers, near.layers, strict=True):
        rope = finding.rope
        if rope is None:
            continue
        noise = 2 * misfit_of(rope, keys.positions, of_far, tolerance) + tolerance / 20
        if misfit_of(rope, near.positions, of_near, tolerance) > noise:
            return _Known(key, reach, None)
    return _Known(key, reach, findings)


def _ask(model: Any, reach: int) -> tuple[list[Finding], PlacedKeys, bool]:
    """What is found in a pass over so many positions, its keys, and whether its rows were levelled."""
    keys = _keys(model, _probes(reach), _TOKENS)
    findings = fit_ropes(keys, _TOLERANCE[model.dtype])
    if not any(finding.unclear for finding in findings):
        return findings, keys, False
    # Attention sinks weigh a token against a constant, and its weight is rounded otherwise at each position: in 16
    # bits, hidden states of deep models drift apart by that.
    keys = _keys(model, _probes(reach), _TOKENS, level=True)
    levelled = fit_ropes(keys, _TOLERANCE[model.dtype])
    return [b if a.unclear and b.rope is not None else a for a, b in zip(findings, levelled, strict=True)], keys, True


def _failure(model: Any, error: Exception) -> list[Finding]:
    reason = " ".join(f"the model cannot be asked for its keys ({type(error).__name__}: {error})".split())
    return [Finding(None, reason) for layer in cache_layers(model.config) if type(layer) is DynamicLayer]


def _probes(reach: int) -> list[int]:
    """Positions that tell frequencies, up to `reach - 1`: few, as each is a row."""
    last = min(reach, _MOST) - 1
    # Each is at most sixteen times the one before, so that one phase tells how many whole turns the next one has made,
    # whatever the dtype.
    positions = {0, last, *(16**n for n in range(8)), 5, last // 3}
    # The last one only makes the pass as long as that.
    return sorted(p for p in positions if p <= last) + [reach - 1] * (reach - 1 > last)


def _keys(model: Any, positions: list[int], tokens: tuple[float, ...], level: bool = False) -> PlacedKeys:
    """Reads some tokens (parts of the vocabulary) at the given positions, ascending from 0.

    Args:
        level: give every layer the same hidden states for all positions of a token, those at position 0.
    """
    asked = [p for p in positions if p < _MOST]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [int(part * vocabulary) for part in tokens]
    # The last row only makes the pass as long as it is to be.
    rows = [(token, p) for token in ids for p in asked] + [(ids[0], positions[-1])]
    inputs = torch.tensor(rows, device=input_device(model))
    same = [row - row % len(asked) for row in range(len(rows) - 1)] + [0]
    cache = DynamicCache(config=model.config)
    with _unchanged(model), _levelled(model, same) if level else contextlib.nullcontext():
        # Logits are of no use here. `forward`: the hook of a block of KVCrush would put its own cache there.
        model.base_model.forward(
            input_ids=inputs[:, :1], position_ids=inputs[:, 1:], past_key_values=cache, use_cache=True
        )
        buffers = [b for b in model.buffers() if b.is_floating_point() and 0 < b.numel() <= _SMALL and not b.is_meta]
        frequencies = [b.detach().flatten().float().cpu() for b in buffers]
    layers = []
    for layer, kind in zip(cache.layers, cache_layers(model.config), strict=True):
        if type(kind) is not DynamicLayer:
            continue
        keys = getattr(layer, "keys", None)
        if keys is None or keys.ndim != 4 or keys.shape[0] != len(rows) or keys.shape[2] != 1:
            raise ValueError("its cache does not hold one key a sequence")
        layers.append(keys.detach()[:-1, :, 0].float().cpu().unflatten(0, (len(ids), len(asked))))
    return PlacedKeys(torch.tensor(asked), layers, frequencies)


@contextlib.contextmanager
def _levelled(model: Any, same: list[int]) -> Iterator[None]:
    """Inside, hidden states `[rows, 1, hidden]` that modules are given are those of the row `same[row]` instead."""
    size, thread = model.config.get_text_config(decoder=True).hidden_size, threading.get_ident()

    def level(value: Any) -> Any:
        hidden = isinstance(value, Tensor) and value.is_floating_point() and value.shape == (len(same), 1, size)
        return value[same] if hidden else value

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        return tuple(map(level, args)), {name: level(value) for name, value in kwargs.items()}

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
