"""What a cache will hold, told from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..config import CrushConfig
from ..errors import ConfigError
from ..split import Split, split_tokens
from ..storage import LayerSizes
from .plan import Plan
from .support import cache_layers, check_prompt, check_sizes


@dataclass(frozen=True)
class CachePlan:
    """What one sequence holds at the end of its prompt.

    Attributes:
        tokens: of the prompt.
        untouched: the prompt has fewer tokens than `min_tokens`, and is left as it is.
        layers: what each compressed layer keeps for each KV head.
        full_bytes: what the full cache holds of these layers.
        other_layers: layers that are not compressed (sliding windows).
    """

    tokens: int
    untouched: bool
    layers: tuple[Split, ...]
    full_bytes: int
    other_layers: int

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def fraction(self) -> float:
        """Of the full cache's bytes."""
        return self.nbytes / self.full_bytes


def plan_cache(model_config: PreTrainedConfig, config: CrushConfig, tokens: int, raw_bytes: int = 2) -> CachePlan:
    """How a budget is split between tiers and layers, before anything runs: exact, to the byte.

    Args:
        model_config: of the model that will run.
        config: what to keep.
        tokens: length of the prompt.
        raw_bytes: bytes of a number in the model's dtype.

    Raises:
        ConfigError: the prompt or the budget does not fit the model, or the rank is not known beforehand.
        UnsupportedModelError: the model's cache cannot be compressed.
    """
    if isinstance(config.rank, float):
        raise ConfigError(f"rank={config.rank}: how many directions cover that energy is known once a prompt was read")
    check_prompt(tokens, model_config)
    layers = cache_layers(model_config)
    compressed = sum(type(layer) is DynamicLayer for layer in layers)
    plan = Plan(config, layers=compressed)
    check_sizes(plan.budget, config.page_size, model_config)
    sizes = _sizes(model_config, config, raw_bytes)
    splits = tuple(_layer(plan, index, tokens, sizes) for index in range(compressed))
    untouched = bool(plan.untouched(torch.tensor([tokens])))
    return CachePlan(tokens, untouched, splits, compressed * sizes.raw(tokens), len(layers) - compressed)


def _sizes(model_config: PreTrainedConfig, config: CrushConfig, raw_bytes: int) -> LayerSizes:
    text: Any = model_config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    rank = size if config.rank is None else min(int(config.rank), size)
    return LayerSizes(config.formats, kv_heads, (size, size), (rank, rank), raw_bytes)


def _layer(plan: Plan, index: int, tokens: int, sizes: LayerSizes) -> Split:
    """As `CrushLayer.evict` does it."""
    prompt = torch.tensor([tokens])
    budget = int(plan.layer_budget(index, prompt, prompt, sizes))
    if bool(plan.untouched(prompt)) or (budget >= tokens and plan.formats.raw):
        # Nothing is evicted or quantized, so nothing is scored either.
        sink = min(tokens, plan.config.sink)
        return Split(sink, 0, 0, tokens - sink, sizes.raw(tokens))
    return split_tokens(budget, tokens, plan.options, sizes)
