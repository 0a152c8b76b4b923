"""What a crushed cache has to equal: the full cache, with the evicted entries masked per head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from crushkv import CrushConfig, KVCrush
from crushkv.hf import CrushLayer


@dataclass
class Recording:
    """The forward passes of one generation: what went in, what came out, and what each head could see."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    visible: list[dict[int, Tensor]] = field(default_factory=list)  # layer -> bool [B, Hkv, tokens before the pass]
    logits: list[Tensor] = field(default_factory=list)  # of the last query
    sequences: Tensor | None = None
    cache: Any = None


def visible_past(cache: Any) -> dict[int, Tensor]:
    """For each compressed layer, which of the tokens seen a head still holds."""
    result = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CrushLayer) or not layer.seen:
            continue
        rows, kv_heads, slots = layer.positions.shape
        filled = torch.ones(rows, slots, dtype=torch.bool) if layer.real is None else layer.real
        held = torch.zeros(rows, kv_heads, layer.seen + 1, dtype=torch.bool)
        # Slots without a token are written to a place behind the end.
        held.scatter_(2, layer.positions.masked_fill(~filled[:, None], layer.seen), True)
        result[index] = held[..., :-1]
    return result


def record(model: Any, config: CrushConfig, inputs: dict[str, Tensor], **generation: Any) -> Recording:
    recording = Recording()

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        keep = ("input_ids", "attention_mask", "position_ids")
        recording.inputs.append({k: kwargs[k] for k in keep if kwargs.get(k) is not None})
        recording.visible.append(visible_past(kwargs["past_key_values"]))

    def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        recording.logits.append(output.logits[:, -1])

    with KVCrush(config)(model) as session:
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            recording.sequences = model.generate(**inputs, do_sample=False, pad_token_id=0, **generation)
        finally:
            for hook in hooks:
                hook.remove()
        recording.cache = session.cache
    return recording


@torch.no_grad()
def replay(model: Any, recording: Recording) -> list[Tensor]:
    """The same passes with Transformers' full cache and plain attention under per-head masks: last logits."""
    implementation = model.config._attn_implementation
    visible: dict[int, Tensor] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        logits = query.float() @ key.float().repeat_interleave(group, 1).transpose(-1, -2) * scaling + mask
        if module.layer_idx in visible:
            past = visible[module.layer_idx].repeat_interleave(group, 1)
            logits[..., : past.shape[-1]].masked_fill_(~past[:, :, None], torch.finfo(logits.dtype).min)
        output = logits.softmax(-1) @ value.float().repeat_interleave(group, 1)
        return output.to(value.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", attend)
    AttentionMaskInterface.register("oracle", eager_mask)
    model.set_attn_implementation("oracle")
    try:
        cache = DynamicCache(config=model.config)
        result = []
        for inputs, seen in zip(recording.inputs, recording.visible, strict=True):
            visible.clear()
            visible.update(seen)
            result.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1])
        return result
    finally:
        model.set_attn_implementation(implementation)
