"""What a cache will hold, told from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..config import CrushConfig
from ..core import Shares, Split
from ..errors import ConfigError
from ..profile import Profile
from ..storage import LayerSizes
from ..text import size
from .cache import CrushCache
from .plan import head_needs
from .support import cache_layers, cached_shape, check_bits, check_prompt, check_sizes


@dataclass(frozen=True)
class CachePlan:
    """What one sequence holds at the end of its prompt.

    Attributes:
        tokens: of the prompt.
        untouched: the prompt has fewer tokens than `min_tokens`, and is left as it is.
        layers: what each compressed layer keeps for each KV head.
        full_bytes: what the full cache holds of these layers.
        other_layers: layers that are not compressed: sliding windows, recurrent states, layers that hold nothing.
        heads: tokens that each KV head of each compressed layer keeps; None: as many as the others of its layer.
    """

    tokens: int
    untouched: bool
    layers: tuple[Split, ...]
    full_bytes: int
    other_layers: int
    heads: tuple[tuple[int, ...], ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def fraction(self) -> float:
        """Of the full cache's bytes."""
        return self.nbytes / self.full_bytes

    def __str__(self) -> str:
        held = f"{size(self.nbytes)} of {size(self.full_bytes)}"
        return f"{self.tokens:,} tokens: {held} ({self.fraction:.1%} of the full cache)"


def plan_cache(
    model_config: PreTrainedConfig,
    config: CrushConfig,
    tokens: int,
    raw_bytes: int = 2,
    profile: Profile | None = None,
) -> CachePlan:
    """How a budget is split between tiers and layers, before anything runs: exact, to the byte.

    What a layer's keys need besides (`logit_limit`) is known once a prompt was read, and not counted.

    Args:
        model_config: of the model that will run.
        config: what to keep.
        tokens: length of the prompt.
        raw_bytes: bytes of a number in the model's dtype.
        profile: of the model, which `heads="profile"` needs; None: all heads keep the same number of tokens.

    Raises:
        ConfigError: the prompt or the budget does not fit the model, or the rank is not known beforehand.
        UnsupportedModelError: the model's cache cannot be compressed.
    """
    if isinstance(config.rank, float):
        raise ConfigError(f"rank={config.rank}: how many directions cover that energy is known once a prompt was read")
    check_prompt(tokens, model_config)
    layers = cache_layers(model_config)
    compressed = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    needs = head_needs(profile) if config.heads == "profile" and profile is not None else None
    shares = Shares(config, len(compressed), needs)
    check_sizes(shares.budget, config.page_size, model_config)
    check_bits(config.formats, model_config)
    sizes = [_sizes(cached_shape(model_config, index), config, raw_bytes) for index in compressed]
    splits = tuple(shares.split(index, tokens, size) for index, size in enumerate(sizes))
    prompt = torch.tensor([tokens])
    any(shares.warn_where_tight(prompt, prompt, size) for size in sizes)  # at most one warning
    untouched = bool(shares.untouched(prompt))
    heads = None
    if needs is not None:
        heads = tuple(shares.by_head(index, tokens, size) for index, size in enumerate(sizes))
    full_bytes = sum(size.raw(tokens) for size in sizes)
    return CachePlan(tokens, untouched, splits, full_bytes, len(layers) - len(compressed), heads)


@dataclass(frozen=True)
class LayerKind:
    """What happens to one layer's cache.

    Attributes:
        compressed: by KVCrush.
        reason: why it is, or is not.
        nbytes: keys and values that the full cache holds of it.
    """

    compressed: bool
    reason: str
    nbytes: int


def layer_kinds(model_config: PreTrainedConfig, tokens: int, raw_bytes: int = 2) -> tuple[LayerKind, ...]:
    """Which layers are compressed and which not, with what they hold of a prompt of so many tokens.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed.
    """
    kinds = []
    for index, layer in enumerate(cache_layers(model_config)):
        sizes = _sizes(cached_shape(model_config, index), CrushConfig(), raw_bytes)
        if type(layer) is DynamicLayer:
            kinds.append(LayerKind(True, "attends to the whole text", sizes.raw(tokens)))
        elif isinstance(layer, DynamicSlidingWindowLayer):
            window = layer.sliding_window
            reason = f"has a window of {window} tokens, which bounds its cache already"
            kinds.append(LayerKind(False, reason, sizes.raw(min(tokens, window))))
        else:
            reason = f"keeps a state that does not grow with the text ({type(layer).__name__})"
            kinds.append(LayerKind(False, reason, 0))
    return tuple(kinds)


def check_supported(model_config: PreTrainedConfig) -> None:
    """Checks what `KVCrush` checks when it is given a model, without the model's weights.

    Raises:
        UnsupportedModelError: the model's cache cannot be compressed; the message says why.
    """
    cache_layers(model_config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except Exception:  # a wrapper, or code of its own: what the configuration tells has to do
        return
    CrushCache(model)


def _sizes(shape: tuple[int, int, int], config: CrushConfig, raw_bytes: int) -> LayerSizes:
    kv_heads, *sizes = shape
    ranks = [size if config.rank is None else min(int(config.rank), size) for size in sizes]
    return LayerSizes(config.formats, kv_heads, (sizes[0], sizes[1]), (ranks[0], ranks[1]), raw_bytes)
