"""`CrushCache`: a Transformers cache that holds a part of the tokens it has seen."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from .. import kernels
from ..config import CrushConfig
from ..core import Tier
from ..errors import UnsupportedModelError
from ..text import size
from .attention import install, mark
from .autograd import full_precision, refuse_gradient, wants_gradient
from .layer import CrushLayer
from .plan import Plan, head_needs
from .profiling import profile_of
from .rope import find_ropes
from .support import (
    cache_layers,
    check_bits,
    check_model,
    check_prompt,
    check_sizes,
    is_latent,
    keeps_heads_together,
    rereads_beyond,
    shares_keys,
)


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, measured from its tensors. `print` shows it in three lines.

    A number that is not quantized counts 16 bits in `kv_bytes`, `full_kv_bytes` and `room_bytes`, whatever the model's
    dtype, so that 4 bits are a quarter of the full cache and not an eighth beside a model in float32.

    Attributes:
        tokens_seen: logical length, padding included.
        tokens_held: slots per layer and KV head, a mean over the compressed layers.
        tiers: tokens per tier, a mean over compressed layers, KV heads and rows.
        untouched_rows: rows that hold everything, because they have seen fewer real tokens than `min_tokens`.
        kv_bytes: keys and values of the tokens held, in all layers.
        full_kv_bytes: what the full cache would hold of all tokens seen.
        room_bytes: room for the next tokens, allocated besides.
        state_bytes: what KVCrush holds besides (positions, tiers, scores, last queries).
        memory_bytes: all of this as it is allocated, in the model's dtype.
        rope_layers: compressed layers whose keys are held less their mean before RoPE. In others, how RoPE turns the
            keys was not found, or there is none, and the mean is taken as they are.
        widened_layers: compressed layers whose keys got more bits than asked for, and how many, because the error of
            the attention logits would have been large.
        kernels: what attends to the tokens of the compressed layers while decoding: `cpu (avx2)`, or `plain`, which
            unpacks them first, and why.
        heads: how the budget is divided among the heads: `equal`, `by profile`, or `equal` and why it is.
        profile: where the widths of key channels come from: a file, or "the prompt"; None: channels have equal widths.
    """

    tokens_seen: int
    tokens_held: float
    tiers: dict[str, float]
    untouched_rows: int
    kv_bytes: int
    full_kv_bytes: int
    room_bytes: int
    state_bytes: int
    memory_bytes: int
    rope_layers: int = 0
    widened_layers: Mapping[int, int] = field(default_factory=dict)
    profile: str | None = None
    heads: str = "equal"
    kernels: str | None = None

    @property
    def bytes_fraction(self) -> float:
        """`kv_bytes` as a part of `full_kv_bytes`."""
        return self.kv_bytes / self.full_kv_bytes if self.full_kv_bytes else 1.0

    def __str__(self) -> str:
        tiers = ", ".join(f"{count:,.0f} {name}" for name, count in self.tiers.items())
        heads = "" if self.heads == "equal" else f", heads {self.heads}"
        return (
            f"{self.tokens_held:,.0f} of {self.tokens_seen:,} tokens per layer and KV head ({tiers}){heads}\n"
            f"{size(self.kv_bytes)} of keys and values: {self.bytes_fraction:.1%} of the full cache's "
            f"{size(self.full_kv_bytes)}, at 16 bits a number\n"
            f"besides: {size(self.room_bytes)} of room to grow, {size(self.state_bytes)} of scores and positions; "
            f"{size(self.memory_bytes)} allocated in all"
        )


class CrushCache(Cache):
    """Pass it as `past_key_values`; it serves one batch, over as many turns as you like.

    Prompts are compressed layer by layer while they are read, at the end of each layer's attention; long
    generations every `config.interval` tokens. Layers that do not grow with the text (sliding windows, recurrent
    states) are left to themselves.

    Args:
        model: the model that will use the cache. Nothing on it is changed.
        config: what to keep.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed.
        ConfigError: the budget does not fit the model.
    """

    layer_class: ClassVar[type[CrushLayer]] = CrushLayer
    bypassed: ClassVar[str] = (
        "the attention of this model does not receive the keys that the cache returned, so that KVCrush never sees its "
        "queries: it does not go through Transformers' AttentionInterface, it changes the keys after the cache (as "
        "JetMoE does), or another package has replaced the attention function since the cache was made"
    )

    def __init__(self, model: PreTrainedModel, config: CrushConfig | None = None) -> None:
        self.config = config or CrushConfig()
        self.model_config = model.config
        self.waiting: CrushLayer | None = None  # was updated, and has not attended yet
        layers = cache_layers(model.config)
        check_model(model)
        check_bits(self.config.formats, model.config)
        text_config = model.config.get_text_config(decoder=True)
        install(text_config._attn_implementation)
        compressible = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        # A plan keeps no model alive; a model whose RoPE depends on the length of a prompt is asked again (`begin`).
        self._model = weakref.ref(model)
        self._thrown_away_beyond = rereads_beyond(model)
        latent = is_latent(model.config)
        reads_packed = not (latent or shares_keys(model.config))
        self.plan = Plan(self.config, len(compressible), latent=latent, reads_packed=reads_packed)
        if not self.plan.formats.raw:
            self.plan.ropes = find_ropes(model)
        by_need = self.config.heads == "profile"
        if self.plan.formats.by_channel or by_need:
            self.plan.profile = profile_of(model, self.config.profile)
        self._heads = "equal"
        if by_need:
            reason = "there is no profile" if self.plan.profile is None else keeps_heads_together(model)
            if reason is None and self.plan.profile is not None:
                self.plan.share_out(head_needs(self.plan.profile))
            self._heads = "by profile" if reason is None else f"equal ({reason})"
        check_sizes(self.plan.shares.budget, self.config.page_size, model.config)
        for index, i in enumerate(compressible):
            layers[i] = self.layer_class(self.plan, index)
        super().__init__(layers=layers)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if not isinstance(layer, CrushLayer):
            _follow(layer, key_states.device)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer.index == 0:
            self.begin(key_states.shape[2], layer)
        elif self.waiting is not None:
            self.waiting = None
            raise UnsupportedModelError(self.bypassed)
        empty = not layer.is_initialized
        with full_precision(key_states.device):
            keys, values = layer.update(key_states, value_states)
        if empty and wants_gradient(key_states):
            # What is held now is nothing else than this, and this has its history.
            keys, values = key_states, value_states
        else:
            keys, values = refuse_gradient(keys, key_states), refuse_gradient(values, value_states)
        mark(keys, values, layer, self)
        self.waiting = layer
        return keys, values

    def begin(self, tokens: int, first: CrushLayer) -> None:
        """Checks a pass over so many new tokens when it reaches the first compressed layer; `update` calls it."""
        waiting, self.waiting = self.waiting, None
        if any(layer.seen != first.seen for layer in self.crushed_layers):
            raise UnsupportedModelError(
                "an earlier pass over this cache was interrupted, and its layers differ: reset() it, or use a new one"
            )
        if waiting is not None:
            raise UnsupportedModelError(f"an earlier pass over this cache was interrupted, or {self.bypassed}")
        end = first.seen + tokens
        if tokens > 1:
            check_prompt(end, self.model_config)
        model = self._model()
        if not first.seen and not self.plan.formats.raw and model is not None:
            self.plan.ropes = find_ropes(model, max(end, self.prefill_end or 0))
        if end == self._thrown_away_beyond:
            self._tell_where_thrown_away(model)

    def _tell_where_thrown_away(self, model: PreTrainedModel | None) -> None:
        """Warns, outside of a block, that the next token makes `generate` go on with another cache than this one."""
        from .attachment import is_attached

        if model is not None and not is_attached(model):
            warnings.warn(
                f"crushkv: generate of {type(model).__name__} throws its cache away when a text grows beyond "
                f"{self._thrown_away_beyond} tokens, and goes on with Transformers' full cache. In a block "
                "(`with KVCrush(...)(model):`) the new cache is compressed, too",
                stacklevel=2,
            )

    def reset(self) -> None:
        """Makes the cache as new."""
        self.waiting = None
        self.plan.forget()
        super().reset()

    @property
    def prefill_end(self) -> int | None:
        """Logical length at which the prompt being read ends.

        `generate` inside `with KVCrush(...)(model)` sets it. Set it before a prompt that you pass in several
        pieces yourself, and to None afterwards: while it is None, every pass over more than one token counts as
        a whole prompt.
        """
        return self.plan.clock.prompt_end

    @prefill_end.setter
    def prefill_end(self, tokens: int | None) -> None:
        self.plan.clock = replace(self.plan.clock, prompt_end=tokens)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read: models ask it to tell a prompt from what follows (pictures seen both ways)."""
        return self.crushed_layers[0].is_initialized

    @property
    def crushed_layers(self) -> list[CrushLayer]:
        """The layers that KVCrush compresses."""
        return [layer for layer in self.layers if isinstance(layer, CrushLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held, over all layers."""
        return kv_bytes(self)

    @property
    def nbytes_at_16_bits(self) -> int:
        """Bytes of the tokens held, with two bytes for each number in the model's dtype, and without room to grow.

        This is what is compared, whatever the model's dtype is.
        """
        return kv_bytes_at_16_bits(self)

    def _profile_name(self) -> str | None:
        if not self.plan.formats.by_channel:
            return None
        profile = self.plan.profile
        return "the prompt" if profile is None else str(profile.path or "a profile without a file")

    def report(self) -> CacheReport:
        """Measures what is held now."""
        crushed = [layer for layer in self.crushed_layers if layer.seen]
        others = [layer for layer in self.layers if not isinstance(layer, CrushLayer)]
        full = sum(_bytes_at_16_bits(layer) for layer in others)
        room = state = 0
        tiers: dict[str, float] = defaultdict(float)
        held = 0.0
        for layer in crushed:
            state += layer.state_nbytes
            for group in layer.groups:
                storage, sizes = group.storage, group.storage.sizes()
                full += storage.rows * replace(sizes, raw_bytes=2).raw(layer.seen)
                room += storage.dense.room_nbytes * 2 // sizes.raw_bytes
                part = storage.kv_heads / (len(crushed) * layer.kv_heads)
                held += storage.length * part
                for tier in (Tier.SINK, Tier.IMPORTANT, Tier.REPRESENTATIVE, Tier.RECENT):
                    of_tier = int((group.tiers == tier).sum()) / (storage.rows * storage.kv_heads)
                    tiers[tier.name.lower()] += of_tier * part
        untouched = self.plan.shares.untouched(crushed[0].groups[0].real_tokens()[1]) if crushed else None
        return CacheReport(
            tokens_seen=self.get_seq_length(),
            tokens_held=held,
            tiers=dict(tiers),
            untouched_rows=0 if untouched is None else int(untouched.sum()),
            kv_bytes=self.nbytes_at_16_bits,
            full_kv_bytes=full,
            room_bytes=room,
            state_bytes=state,
            memory_bytes=self.nbytes + state,
            rope_layers=sum(layer.any_storage.centred_before_rope for layer in crushed),
            widened_layers={layer.index: layer.widened_by for layer in crushed if layer.widened_by},
            profile=self._profile_name(),
            heads=self._heads,
            kernels=kernels.reader(crushed[0].any_storage) if crushed else None,
        )


def _follow(layer: Any, device: torch.device) -> None:
    """Moves what Transformers' own layer holds to where its model computes: a cache that was read from a file."""
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.numel() and keys.device != device:
        layer.keys, layer.values = keys.to(device), layer.values.to(device)
        layer.device = device


def kv_bytes(cache: Cache) -> int:
    """Bytes of keys and values that any cache of Transformers holds, room to grow included."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def kv_bytes_at_16_bits(cache: Cache) -> int:
    """As `CacheReport.kv_bytes`, of any cache of Transformers."""
    return sum(_bytes_at_16_bits(layer) for layer in cache.layers)


def _layer_bytes(layer: object) -> int:
    if isinstance(layer, CrushLayer):
        return layer.nbytes
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def _bytes_at_16_bits(layer: object) -> int:
    if isinstance(layer, CrushLayer):
        return sum(group.storage.nbytes_at_16_bits for group in layer.groups)
    keys = getattr(layer, "keys", None)
    return 0 if keys is None else _layer_bytes(layer) * 2 // keys.element_size()
