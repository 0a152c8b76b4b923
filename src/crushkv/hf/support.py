"""Which models and ways of generating can be compressed. What cannot is refused, with the reason."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode

from ..core import Budget
from ..errors import ConfigError, UnsupportedModelError


def cache_layers(model_config: PreTrainedConfig) -> list[Any]:
    """The layers that Transformers itself would make: `DynamicLayer` where a layer can be compressed.

    Sliding-window layers hold their window and nothing more, and are left to themselves.

    Raises:
        UnsupportedModelError: the model has no keys and values that could be compressed.
    """
    config = model_config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(model_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{kind}: multi-head latent attention (MLA) caches a latent shared by all heads; not supported"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{kind}: layers that share another layer's keys and values are not supported")
    if not getattr(config, "num_attention_heads", 0):
        raise UnsupportedModelError(f"{kind}: the model has no attention layers whose cache could be compressed")
    try:
        layers = list(DynamicCache(config=config).layers)
    except Exception as error:
        raise UnsupportedModelError(f"{kind}: Transformers has no dynamic cache for this model ({error})") from error
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"{kind}: layer {index} keeps a {type(layer).__name__} (recurrent state, shared or indexed cache), "
                "which cannot be compressed"
            )
    if not any(type(layer) is DynamicLayer for layer in layers):
        raise UnsupportedModelError(
            f"{kind}: every layer has a sliding window, which bounds its cache already; nothing to compress"
        )
    return layers


def check_sizes(budget: Budget, page_size: int, model_config: PreTrainedConfig) -> None:
    """Refuses a budget or a page of more tokens than the model has positions: neither could ever do anything.

    Raises:
        ConfigError: names the argument and the limit.
    """
    limit = position_limit(model_config)
    if limit is not None and page_size > limit:
        raise ConfigError(f"page_size={page_size} tokens is above the model's {limit} positions")
    if budget.kind == "tokens" and limit is not None and budget.amount > limit:
        raise ConfigError(f"budget={int(budget.amount)} tokens is above the model's {limit} positions")


def position_limit(model_config: PreTrainedConfig) -> int | None:
    """Positions the model was made for, or None if its configuration does not say."""
    return getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs; accelerate moves them on where the weights are offloaded."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def check_prompt(tokens: int, model_config: PreTrainedConfig) -> None:
    """Refuses prompts that are empty or longer than the model's positions (a smaller cache adds none).

    Raises:
        ConfigError: names the prompt's length and the limit.
    """
    if tokens < 1:
        raise ConfigError("prompt: it is empty; at least one token is needed")
    limit = position_limit(model_config)
    if limit is not None and tokens > limit:
        raise ConfigError(f"prompt: {tokens} tokens are more than the model's {limit} positions")


def check_generation(generation: GenerationConfig, mode: GenerationMode) -> None:
    """Refuses ways of generating that need a cache KVCrush is not.

    Raises:
        UnsupportedModelError: static, offloaded or quantized cache, or assisted decoding, is asked for.
    """
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise UnsupportedModelError(
            "assisted decoding and prompt lookup take tokens back out of the cache, which a compressed cache cannot do"
        )
    # Published configurations of models with sliding layers name "hybrid", which no longer means anything.
    if generation.cache_implementation not in (None, "dynamic", "hybrid", "hybrid_chunked"):
        raise UnsupportedModelError(
            f"cache_implementation={generation.cache_implementation!r} cannot be combined with KVCrush: leave it unset "
            "(static caches have fixed slots for torch.compile, and KVCrush moves tokens)"
        )
