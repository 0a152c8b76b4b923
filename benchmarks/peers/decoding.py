"""Greedy decoding with a Transformers model and any of its caches: the same loop for every engine that has one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from worker import Outcome, Request, Run


def load(folder: str, threads: int) -> Any:
    """The model in the dtype of its file, with sdpa."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa")
    return model.eval()


@torch.inference_mode()
def decode(model: Any, request: Request, cache: Any, held: Callable[[Any], int], *, positions: bool = False) -> Outcome:
    """Answers a request.

    Args:
        held: bytes of keys and values that the cache holds.
        positions: say where each token is, for a cache that counts only what it holds.
    """
    token = torch.tensor(request.prompts)
    place = torch.arange(request.tokens)
    times = []
    start = time.perf_counter()
    for _ in range(request.new_tokens):
        where = {"cache_position": place} if positions else {}
        token = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1, **where).logits.argmax(
            -1
        )
        times.append(time.perf_counter() - start)
        place = place[-1:] + 1
    return Outcome(times, held(cache), full_kv_bytes(model, request))


def full_cache(model: Any, request: Request) -> Run:
    """What answers a request with Transformers' own cache."""
    return lambda: decode(model, request, DynamicCache(config=model.config), dense_bytes)


def full_kv_bytes(model: Any, request: Request) -> int:
    """Keys and values of every token but the last new one, which no model has read."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return int(request.batch * (request.tokens + request.new_tokens - 1) * numbers * model.dtype.itemsize)


def tensor_bytes(*tensors: Any) -> int:
    """Bytes that tensors hold, with what of their storage they do not show."""
    return sum(int(tensor.untyped_storage().nbytes()) for tensor in tensors if tensor is not None)


def dense_bytes(cache: Any) -> int:
    return sum(tensor_bytes(layer.keys, layer.values) for layer in cache.layers)
