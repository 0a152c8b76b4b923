"""Which models and ways of generating can be compressed. What cannot is refused, with the reason."""

from __future__ import annotations

import copy
import inspect
import warnings
from types import NoneType
from typing import Any, get_args, get_origin

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..budget import Budget
from ..errors import ConfigError, UnsupportedModelError
from ..storage import Formats
from .interface import CACHE
from .left_alone import LEFT_ALONE, CrossAttentionLayer, DummyLayer

# Models whose attention does something else with the keys and values than attend to them once.
_REFUSED_KINDS = {
    "big_bird": "it attends to blocks that it chooses, by attention of its own",
    "diffllama": "each layer attends twice, with two halves of the values, so that attention never receives the values "
    "that the cache holds",
    "jetmoe": "each layer repeats its keys once for each chosen expert, so that attention never receives the keys that "
    "the cache holds, and a query head belongs to no fixed KV head",
    "minimax": "the model accepts no cache but its own",
}
# What the layers of Transformers' cache hold that can never be compressed, by a part of their names.
_REFUSED_LAYERS = {
    "LinearAttentionAnd": "holds a recurrent state and keys and values in one, which cannot be told apart",
    "Indexed": "chooses the tokens that it attends to by an index of its own, which counts the tokens in the cache",
}


def cache_layers(model_config: PreTrainedConfig) -> list[Any]:
    """The layers that Transformers itself would make: `DynamicLayer` where a layer can be compressed.

    Left to themselves are layers that do not grow with the text (sliding windows, recurrent states, keys and values
    of pictures), and layers that hold nothing (they attend to another layer's keys, or do not attend).

    Raises:
        UnsupportedModelError: the model has no keys and values that could be compressed.
    """
    config = model_config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(model_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported")
    if kind in _REFUSED_KINDS:
        raise UnsupportedModelError(f"{kind}: {_REFUSED_KINDS[kind]}")
    try:
        layers = list(DynamicCache(config=config).layers)
    except Exception as error:
        raise UnsupportedModelError(f"{kind}: Transformers has no dynamic cache for this model ({error})") from error
    layers += _later_passes(config, layers)
    window = unbounding_window(config)
    crossing = set(getattr(config, "cross_attention_layers", None) or ())
    for index, layer in enumerate(layers):
        if index in crossing:
            layers[index] = CrossAttentionLayer()
        elif window is not None and type(layer) is DynamicSlidingWindowLayer:
            layers[index] = DynamicLayer()
        elif type(layer) is not DynamicLayer and type(layer) not in LEFT_ALONE:
            name = type(layer).__name__
            known = (reason for part, reason in _REFUSED_LAYERS.items() if part in name)
            reason = next(known, "is of a kind that crushkv does not know")
            raise UnsupportedModelError(f"{kind}: layer {index} ({name}) {reason}")
    if not any(type(layer) is DynamicLayer for layer in layers):
        if any(type(layer) is DynamicSlidingWindowLayer for layer in layers):
            reason = "every layer that attends has a sliding window, which bounds its cache already"
        elif all(type(layer) is DummyLayer for layer in layers):
            reason = "every layer attends to the keys and values of another model"
        else:
            reason = "the model has no attention layers, and its recurrent state is as small as it gets"
        raise UnsupportedModelError(f"{kind}: {reason}; nothing to compress")
    return layers


def _later_passes(config: Any, layers: list[Any]) -> list[Any]:
    """Dory runs its middle layers several times in one pass over the text. Each time but the first has cache layers of
    its own, which come behind all others. The model adds them itself to a cache that has only the first ones."""
    if config.model_type != "dory" or config.n_recurrent_loops == 1:
        return []
    if config.recurrent_kv_cache_mode != "per_loop":
        raise UnsupportedModelError(
            f"dory: with recurrent_kv_cache_mode={config.recurrent_kv_cache_mode!r} the model takes keys and values "
            "out of the layers of the cache by itself, and expects them of every token: only 'per_loop' works"
        )
    start = config.n_input_layers
    looped = layers[start : start + config.n_recurrent_layers]
    return [copy.deepcopy(layer) for layer in looped * (config.n_recurrent_loops - 1)]


def check_model(model: Any) -> None:
    """Refuses models that keep no keys and values in a cache of Transformers, or attend past `AttentionInterface`.

    Raises:
        UnsupportedModelError: names the model and the reason.
    """
    config = model.config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", type(config).__name__)
    decoder = model.get_decoder()
    if not any(_takes_cache(type(part)) for part in (model, decoder)):
        raise UnsupportedModelError(
            f"{kind}: {type(model).__name__} takes no cache of Transformers, so that there are no keys and values to "
            "compress"
        )
    for module in decoder.modules():
        if _attends_by_itself(type(module)):
            raise UnsupportedModelError(
                f"{kind}: {type(module).__name__} computes its attention by itself and not through Transformers' "
                "AttentionInterface, so that KVCrush never sees its queries"
            )


def _takes_cache(cls: Any) -> bool:
    """Whether a model's forward pass takes a cache of Transformers, and none of its own (xLSTM)."""
    parameter = inspect.signature(cls.forward).parameters.get(CACHE)
    if parameter is None:
        return False
    kinds = [get_origin(kind) or kind for kind in get_args(parameter.annotation)]
    named = [kind for kind in kinds if isinstance(kind, type) and kind is not NoneType]
    # Some models still name the tuples and lists of older releases, and take a cache all the same.
    return not named or any(issubclass(kind, (Cache, tuple, list)) for kind in named)


def _attends_by_itself(module: type) -> bool:
    """Whether a class is an attention that updates a cache, and knows no `AttentionInterface` to attend through."""
    if "Attention" not in module.__name__:
        return False
    methods = [inspect.unwrap(vars(cls)["forward"]) for cls in module.__mro__ if "forward" in vars(cls)]
    methods = [method for method in methods if inspect.isfunction(method)]
    updates = any("update" in method.__code__.co_names for method in methods)
    registry = "ALL_ATTENTION_FUNCTIONS"
    known = (method.__globals__.get(registry) for method in methods if registry in method.__code__.co_names)
    return updates and not any(found is ALL_ATTENTION_FUNCTIONS for found in known)


def is_latent(model_config: PreTrainedConfig) -> bool:
    """Multi-head latent attention (MLA): a cache holds one latent for all heads, from which each layer makes the keys
    and values that it attends to."""
    return bool(getattr(model_config.get_text_config(decoder=True), "kv_lora_rank", None))


def shares_keys(model_config: PreTrainedConfig) -> bool:
    """Whether some layers attend to the keys and values of other ones (Gemma 3n, Gemma 4)."""
    return bool(getattr(model_config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def keeps_heads_together(model: Any) -> str | None:
    """Why all heads of a layer have to hold the same number of tokens; None: they need not."""
    config = model.config.get_text_config(decoder=True)
    if is_latent(model.config):
        return "the cache holds one latent for all heads"
    if shares_keys(model.config):
        return "other layers attend to the keys of a layer, too"
    if config._attn_implementation == "eager" and any(hasattr(part, "sinks") for part in model.modules()):
        return "eager attention of this model adds the sinks of all heads by itself"
    return None


def cached_shape(model_config: PreTrainedConfig, layer: int) -> tuple[int, int, int]:
    """What a layer that can be compressed caches of a token: KV heads, and the numbers of a key and of a value."""
    text: Any = model_config.get_text_config(decoder=True)
    # The layers of later passes (Dory) are behind those that the configuration lists, and are shaped alike.
    listed = hasattr(text, "per_layer_config") and layer < text.num_hidden_layers
    config = text.per_layer_config[layer] if listed else text
    if is_latent(model_config):
        return 1, config.kv_lora_rank, config.qk_rope_head_dim
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kv_heads, size, getattr(config, "v_head_dim", None) or size


def check_bits(formats: Formats, model_config: PreTrainedConfig) -> None:
    """Refuses few bits for latents: the model makes keys and values from what the cache gives, which few bits give
    rotated.

    Raises:
        UnsupportedModelError: MLA and any format but the model's own.
    """
    if is_latent(model_config) and not formats.raw:
        raise UnsupportedModelError(
            "multi-head latent attention (MLA) caches a latent for all heads, which is held in the model's dtype only: "
            "leave bits, representative_bits and recent_bits at 16, and rank unset"
        )


def check_sizes(budget: Budget, page_size: int, model_config: PreTrainedConfig) -> None:
    """Refuses a budget or a page of more tokens than the model can read: neither could ever do anything.

    Raises:
        ConfigError: names the argument and the limit.
    """
    limit = position_limit(model_config)
    if limit is not None and page_size > limit:
        raise ConfigError(f"page_size={page_size} tokens is above the model's {limit} positions")
    if budget.kind == "tokens" and limit is not None and budget.amount > limit:
        raise ConfigError(f"budget={int(budget.amount)} tokens is above the model's {limit} positions")


def position_limit(model_config: PreTrainedConfig) -> int | None:
    """Positions beyond which the model cannot read; None if there is no such limit.

    Learned positions end with their table. Rotary ones (RoPE) do not end: `trained_positions` tells how far they were
    made for. Recurrent layers need none.
    """
    config: Any = model_config.get_text_config(decoder=True)
    if getattr(config, "rope_parameters", None):
        return unbounding_window(config)
    recurrent = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
    if any(kind in recurrent for kind in getattr(config, "layer_types", None) or ()):
        return None
    return _positive(getattr(config, "max_position_embeddings", None))


def unbounding_window(config: Any) -> int | None:
    """A sliding window at least as large as the positions that the model was made for (Phi-3.5-mini, Phi-4-mini), or
    None. No token is ever outside of it, so that a layer with it is one that attends to everything."""
    window, positions = getattr(config, "sliding_window", None), trained_positions(config)
    return window if window is not None and positions is not None and window >= positions else None


def trained_positions(model_config: PreTrainedConfig) -> int | None:
    """Positions that the model was made for, those included that its scaled RoPE adds; None if it does not say."""
    config: Any = model_config.get_text_config(decoder=True)
    positions = _positive(getattr(config, "max_position_embeddings", None))
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(kind, dict) for kind in rope.values()) else [rope]
    for kind in kinds:
        factor = kind.get("factor")
        if positions is not None and factor:
            original = kind.get("original_max_position_embeddings") or positions
            positions = max(positions, int(factor * original))
    return positions


def _positive(number: Any) -> int | None:
    return number if isinstance(number, int) and number > 0 else None


def rereads_beyond(model: Any) -> int | None:
    """Tokens beyond which `generate` of a model throws its cache away and reads the text anew (Phi-3's long RoPE, whose
    factors are others in long texts); None: it never does. Read from its code, as no configuration says so."""
    name = "original_max_position_embeddings"
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    code = getattr(inspect.unwrap(prepare), "__code__", None) if prepare is not None else None
    return _positive(getattr(model.config, name, None)) if code is not None and name in code.co_names else None


def input_device(model: Any) -> torch.device:
    """Where a model takes its inputs; accelerate moves them on where the weights are offloaded."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def check_prompt(tokens: int, model_config: PreTrainedConfig) -> None:
    """Refuses prompts that are empty or longer than the model can read, and warns of those that it was not made for.

    Raises:
        ConfigError: names the prompt's length and the limit (a smaller cache adds no positions).
    """
    if tokens < 1:
        raise ConfigError("prompt: it is empty; at least one token is needed")
    limit = position_limit(model_config)
    if limit is not None and tokens > limit:
        raise ConfigError(f"prompt: {tokens} tokens are more than the model's {limit} positions")
    warn_beyond_training(tokens, model_config)


def warn_beyond_training(tokens: int, model_config: PreTrainedConfig) -> None:
    """Warns where a text is longer than those that the model was made for."""
    trained = trained_positions(model_config)
    if trained is not None and tokens > trained:
        warnings.warn(
            f"crushkv: the text is longer than the {trained} positions that the model was made for; answers may be "
            "poor, as they are with the full cache",
            stacklevel=3,
        )


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
