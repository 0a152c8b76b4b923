"""What a crushed cache has to equal: the full cache, with the evicted entries masked per head, and quantized ones
rounded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from crushkv import CrushConfig, KVCrush
from crushkv.core import Tier
from crushkv.hf import CrushLayer
from crushkv.hf.interface import cache_in, passed
from crushkv.storage import RAW, Formats
from reference import rotation_matrix, rounded_token

# The tier of tokens that came since the last eviction, whose format is never another than the model's own.
SINCE = 5


@dataclass
class Recording:
    """The forward passes of one generation: what went in, what came out, and what each head could see."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    tiers: list[dict[int, Tensor]] = field(default_factory=list)  # layer -> uint8 [B, Hkv, tokens before the pass]
    logits: list[Tensor] = field(default_factory=list)  # of the last query
    weights: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, Hq, q, S], of the first pass, by `replay`
    sequences: Tensor | None = None
    cache: Any = None

    @property
    def visible(self) -> list[dict[int, Tensor]]:
        """Which of the tokens before each pass a head still holds, bool."""
        return [{index: tiers != Tier.PADDING for index, tiers in step.items()} for step in self.tiers]


def tiers_of_past(cache: Any) -> dict[int, Tensor]:
    """For each compressed layer, the tier of each token seen (or SINCE), by position; PADDING where a head holds it no
    more."""
    result = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CrushLayer) or not layer.seen:
            continue
        rows, kv_heads, slots = layer.positions.shape
        filled = torch.ones(rows, slots, dtype=torch.bool) if layer.real is None else layer.real
        held = torch.zeros(rows, kv_heads, layer.seen + 1, dtype=torch.uint8)
        # Slots without a token are written to a place behind the end.
        tiers = layer.tiers.clone()
        tiers[..., layer.compressed :][tiers[..., layer.compressed :] != Tier.PADDING] = SINCE
        held.scatter_(2, layer.positions.masked_fill(~filled[:, None], layer.seen), tiers)
        result[index] = held[..., :-1]
    return result


def record(model: Any, config: CrushConfig, inputs: dict[str, Tensor], turns: int = 1, **generation: Any) -> Recording:
    """Generates with a crushed cache, in several turns: before each but the first, some new tokens are added."""
    recording = Recording()

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        recording.tiers.append(tiers_of_past(cache_in(kwargs)))
        recording.inputs.append({k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values", "use_cache")})

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        recording.logits.append(output.logits[:, -1])

    with KVCrush(config)(model) as session:
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            recording.sequences = model.generate(**inputs, do_sample=False, pad_token_id=0, **generation)
            for _ in range(turns - 1):
                inputs = next_turn(inputs, recording.sequences)
                cached = passed(session.cache) | generation
                recording.sequences = model.generate(**inputs, do_sample=False, pad_token_id=0, **cached)
        finally:
            for hook in hooks:
                hook.remove()
        recording.cache = session.cache
    return recording


def next_turn(inputs: dict[str, Tensor], sequences: Tensor, new: int = 12) -> dict[str, Tensor]:
    """What was said so far, and some more tokens of the user's."""
    rows = sequences.shape[0]
    tokens = torch.arange(2, 2 + new).expand(rows, -1)
    added = sequences.shape[1] + new - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(rows, added)], dim=1)
    result = {"input_ids": torch.cat([sequences, tokens], dim=1), "attention_mask": mask}
    if (crossing := inputs.get("cross_attention_mask")) is not None:  # of the picture that was read in the first turn
        result["cross_attention_mask"] = crossing[:, :1].expand(-1, mask.shape[1], -1, -1)
    return result


@torch.no_grad()
def replay(model: Any, recording: Recording) -> list[Tensor]:
    """The same passes with Transformers' full cache and the model's own eager attention under per-head masks: last
    logits."""
    config = model.config.get_text_config(decoder=True)
    implementation = config._attn_implementation
    cache = WatchedCache(config=model.config)
    tiers: dict[int, Tensor] = {}
    rounding: dict[int, Rounding] = {}
    formats = recording.cache.config.formats
    mask = recording.inputs[-1].get("attention_mask")
    real = None if mask is None else mask.bool()

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        layer = cache.layer_of(key)
        past = tiers.get(layer) if layer is not None else None
        if past is not None:
            if not formats.raw:
                key, value = rounding.setdefault(layer, Rounding(formats, real))(key, value, past)
            hidden = (past == Tier.PADDING).repeat_interleave(query.shape[1] // past.shape[1], 1)
            attention_mask = attention_mask.expand(-1, query.shape[1], -1, -1).clone()
            attention_mask[..., : past.shape[-1]].masked_fill_(
                hidden[:, :, None], torch.finfo(attention_mask.dtype).min
            )
        mask = None if attention_mask is None else attention_mask.float()

        def eager(values: Tensor) -> Any:
            return eager_of(module)(module, query.float(), key.float(), values, mask, *args, **kwargs)

        if layer is not None and layer not in recording.weights:
            # What comes out where each token's value is a dimension of its own: some models return weights without
            # what a sink takes of them.
            tokens = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
            recording.weights[layer] = eager(tokens)[0].transpose(1, 2)
        output, weights = eager(value.float())
        return output.to(query.dtype), weights

    AttentionInterface.register("oracle", attend)
    AttentionMaskInterface.register("oracle", eager_mask)
    config._attn_implementation = "oracle"
    try:
        result = []
        for inputs, seen in zip(recording.inputs, recording.tiers, strict=True):
            tiers.clear()
            tiers.update(seen)
            result.append(model(**inputs, **passed(cache), use_cache=True).logits[:, -1])
        return result
    finally:
        config._attn_implementation = implementation


def eager_of(module: Any) -> Callable[..., Any]:
    """The eager attention of the file that the module's class, or one that it is derived from, stands in."""
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))


class WatchedCache(DynamicCache):
    """The full cache, which tells whose keys attention received."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.last: int | None = None  # the layer that was updated and has not attended yet
        self.given: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.last, self.given[layer_idx] = layer_idx, keys
        return keys, values

    def layer_of(self, key: Tensor) -> int | None:
        """The layer whose keys these are (layers may share them), or were made of (MLA); None: of no cached layer."""
        layer, self.last = self.last, None
        shared = [index for index, keys in self.given.items() if keys is key]
        return shared[0] if shared else layer


class Rounding:
    """What quantization makes of a layer's keys and values, token by token, from the numbers that the model made.

    A token's codes are those of the narrowest format it has been in. `real [B, S]`: False for padding.
    """

    def __init__(self, formats: Formats, real: Tensor | None) -> None:
        self.formats, self.real = formats, real
        self.means: list[Tensor] = []
        self.narrowest: dict[tuple[int, int, int, int], int] = {}
        self.known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, key: Tensor, value: Tensor, tiers: Tensor) -> tuple[Tensor, Tensor]:
        bits_of = {Tier.IMPORTANT: self.formats.important, Tier.REPRESENTATIVE: self.formats.representative}
        if self.formats.recent_block:
            bits_of |= {Tier.SINK: self.formats.recent, Tier.RECENT: self.formats.recent}
        quantized = torch.isin(tiers, torch.tensor(list(bits_of), dtype=tiers.dtype))
        if not quantized.any():
            return key, value
        if not self.means:
            self._centre(key, tiers.shape[-1])
        result = []
        for which, x in enumerate((key, value)):
            out = x.clone()
            matrix = rotation_matrix(x.shape[-1]) if self.formats.rotation else torch.eye(x.shape[-1])
            for row, head, token in quantized.nonzero().tolist():
                bits = bits_of[Tier(int(tiers[row, head, token]))][which]
                if bits == RAW:
                    continue
                place = (which, row, head, token)
                self.narrowest[place] = min(bits, self.narrowest.get(place, bits))
                key_of = (*place, self.narrowest[place], bits)
                if key_of not in self.known:
                    mean = self.means[row][head] if which == 0 else torch.zeros(x.shape[-1])
                    numbers = (x[row, head, token].float() - mean) @ matrix
                    found = rounded_token(numbers, self.narrowest[place], bits, self.formats.group_size)
                    self.known[key_of] = (found @ matrix.T + mean).to(x.dtype)
                out[row, head, token] = self.known[key_of]
            result.append(out)
        return result[0], result[1]

    def _centre(self, key: Tensor, seen: int) -> None:
        """The mean of the first prompt's keys, `[Hkv, D]` a row."""
        for row in range(key.shape[0]):
            tokens = key[row, :, :seen] if self.real is None else key[row, :, :seen][:, self.real[row, :seen]]
            self.means.append(tokens.float().mean(1))
