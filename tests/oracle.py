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
from crushkv.hf.head_group import HeadGroup
from crushkv.hf.interface import cache_in, passed
from crushkv.storage import RAW, ChannelFormat
from reference import rotation_matrix, rounded_channels, rounded_token, turned

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
    full: Any = None  # the full cache, by `replay`

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
        result[index] = layer.joined([_of_group(group, layer.seen) for group in layer.groups])
    return result


def _of_group(group: HeadGroup, seen: int) -> Tensor:
    """uint8 `[B, Hkv, seen]`, of the heads of a group."""
    positions, tiers = group.storage.positions, group.tiers.clone()
    rows, kv_heads, slots = positions.shape
    filled = torch.ones(rows, slots, dtype=torch.bool) if group.real is None else group.real
    held = torch.zeros(rows, kv_heads, seen + 1, dtype=torch.uint8)
    # Slots without a token are written to a place behind the end.
    tiers[..., group.compressed :][tiers[..., group.compressed :] != Tier.PADDING] = SINCE
    held.scatter_(2, positions.masked_fill(~filled[:, None], seen), tiers)
    return held[..., :-1]


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
    cache = recording.full = WatchedCache(config=model.config)
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
                if layer not in rounding:
                    rounding[layer] = Rounding(recording.cache.layers[layer], real)
                key, value = rounding[layer](key, value, past)
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

    With a rotation, a token's codes are those of the narrowest format it has been in. Where channels of the keys have
    widths of their own, a token that moves to another format is coded once more from what its codes stood for.

    Args:
        layer: at the end: how its keys turn, and the widths and spreads of its channels, which have tests of their own.
        real: `[B, S]`, False for padding.
    """

    def __init__(self, layer: CrushLayer, real: Tensor | None) -> None:
        storages = [group.storage for group in layer.groups]
        self.formats, self.real = storages[0].formats, real
        assert all(storage.formats == self.formats for storage in storages)
        bases = [storage.bases[0] for storage in storages if storage.bases]
        self.rope = bases[0].rope if bases else None
        spreads = [basis.spread for basis in bases if basis.spread is not None]
        self.spreads = layer.joined(spreads)[:, :, 0].float() if len(spreads) == len(storages) else None  # [B, Hkv, D]
        self.forms: list[ChannelFormat | None] = []
        for forms in zip(*(storage.forms for storage in storages), strict=True):
            widths = [form.widths for form in forms if form is not None]
            weights = [form.weight for form in forms if form is not None]
            self.forms.append(ChannelFormat(layer.joined(widths, 0), layer.joined(weights, 0)) if widths else None)
        self.centres: list[Tensor] = []  # a row: [Hkv, S, D]
        self.narrowest: dict[tuple[int, int, int, int], int] = {}
        self.known: dict[tuple[int, ...], Tensor] = {}
        self.coded: dict[tuple[int, int, int], tuple[int, Tensor]] = {}  # block and numbers of a key

    def __call__(self, key: Tensor, value: Tensor, tiers: Tensor) -> tuple[Tensor, Tensor]:
        contested = self.formats.contested
        block_of = {Tier.IMPORTANT: 0, Tier.REPRESENTATIVE: len(contested) - 1}
        if self.formats.recent_block:
            block_of |= {Tier.SINK: len(contested), Tier.RECENT: len(contested)}
        quantized = torch.isin(tiers, torch.tensor(list(block_of), dtype=tiers.dtype))
        if not quantized.any():
            return key, value
        self._centre(key, tiers.shape[-1])
        keys, values = key.clone(), value.clone()
        for row, head, token in quantized.nonzero().tolist():
            block = block_of[Tier(int(tiers[row, head, token]))]
            bits = self.formats.blocks[block]
            if self.formats.by_channel:
                keys[row, head, token] = self._channels(key, row, head, token, block)
            else:
                centre = self.centres[row][head, token]
                keys[row, head, token] = self._rotated(key, centre, (0, row, head, token), int(bits[0]))
            values[row, head, token] = self._rotated(value, torch.tensor(0.0), (1, row, head, token), bits[1])
        return keys, values

    def _rotated(self, x: Tensor, centre: Tensor, place: tuple[int, int, int, int], bits: int) -> Tensor:
        number = x[place[1:]]
        if bits == RAW:
            return number
        self.narrowest[place] = min(bits, self.narrowest.get(place, bits))
        key_of = (*place, self.narrowest[place], bits)
        if key_of not in self.known:
            matrix = rotation_matrix(len(number)) if self.formats.rotation else torch.eye(len(number))
            numbers = (number.float() - centre) @ matrix
            found = rounded_token(numbers, self.narrowest[place], bits, self.formats.group_size)
            self.known[key_of] = (found @ matrix.T + centre).to(x.dtype)
        return self.known[key_of]

    def _channels(self, key: Tensor, row: int, head: int, token: int, block: int) -> Tensor:
        place, centre = (row, head, token), self.centres[row][head, token]
        before = self.coded.get(place)
        if before is None or before[0] != block:
            numbers = key[place].float() - centre if before is None else before[1]
            form, bits = self.forms[block], self.formats.blocks[block][0]
            if form is not None:
                assert self.spreads is not None
                numbers = rounded_channels(
                    numbers, self.spreads[row, head], form.widths[head].tolist(), form.weight[head]
                )
            elif bits != RAW:
                numbers = rounded_token(numbers, int(bits), int(bits), self.formats.group_size)
            self.coded[place] = block, numbers
        return (self.coded[place][1] + centre).to(key.dtype)

    def _centre(self, key: Tensor, seen: int) -> None:
        """The mean of the first prompt's keys before RoPE, turned to every position."""
        if not self.centres:
            self.means = []
            for row in range(key.shape[0]):
                real = torch.ones(seen, dtype=torch.bool) if self.real is None else self.real[row, :seen]
                positions = real.nonzero()[:, 0].tolist()
                keys = key[row, :, :seen].float()[:, real]
                self.means.append(torch.stack([turned(k, positions, self.rope, -1).mean(0) for k in keys]))
            self.centres = [mean.new_zeros(len(mean), 0, mean.shape[-1]) for mean in self.means]
        for row, (means, known) in enumerate(zip(self.means, self.centres, strict=True)):
            new = range(known.shape[1], key.shape[2])
            more = [turned(mean.expand(len(new), -1), new, self.rope) for mean in means]
            self.centres[row] = torch.cat([known, torch.stack(more)], dim=1)
