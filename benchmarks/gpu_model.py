"""Requests of a model of Llama-3.1-8B's shape with random weights: what `gpu.py` measures of whole requests.

Random weights need no files. What a request takes does not depend on what its tokens say.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from crushkv import CrushConfig, KVCrush
from crushkv.core.heads import curve
from crushkv.fingerprint import fingerprint
from crushkv.hf.cache import CrushCache, kv_bytes, kv_bytes_at_16_bits
from crushkv.hf.energies import measure
from crushkv.hf.interface import passed
from crushkv.hf.rope import find_ropes
from crushkv.presets import PRESETS
from crushkv.profile import Profile
from crushkv.timing import ENGINE, FULL, Record, share
from crushkv.timing.measure import PeakMemory, cudnn_attention

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
TINY: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "initializer_range": 0.1,  # so that keys are as large as a wider model makes them
}
METHODS: Mapping[str, CrushConfig | None] = {
    FULL: None,
    **{name: CrushConfig.preset(name) for name in ("balanced", "tiny", "small", "safe") if name in PRESETS},
    "quarter in 16 bits": CrushConfig(policy="readahead", budget=0.25),
}
"""What is measured of each length and batch, in this order: what is most wanted comes first."""

PROFILED = 1024  # random tokens that the profile is made from
WARM_UP = 4  # decoded tokens that are not counted: they make room, and compile
DECODING_SECONDS = 10.0  # after which no further token is decoded, once there are a few
FEWEST = 4


@dataclass(frozen=True)
class Request:
    """`batch` prompts of `tokens` random tokens each, `new_tokens` of each answer timed."""

    tokens: int
    batch: int
    new_tokens: int


def random_model(shape: Mapping[str, Any], device: torch.device) -> Any:
    """A Llama of that shape, made and filled on the device where it runs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def write_profile(model: Any, folder: Path) -> Path:
    """A profile from random tokens. Widths of key channels come from it, as those of a user's model do from its own.

    Without one, each prompt would be asked for them, with a warning: a random model has no tokenizer to read texts.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (PROFILED,), generator=generator)
    found = measure(model, ids, ids[:0], PROFILED, find_ropes(model, 2 * PROFILED))
    # The heads of a random model need all the same. In others, some attend to single tokens and some to none.
    sharpness = torch.randn(found.scores.shape[:2], generator=generator).mul(2).exp()[..., None]
    needs = curve(found.scores * sharpness)
    made = Profile(
        found.keys,
        found.queries,
        needs,
        fingerprint(model, any_dtype=True),
        model.config.model_type,
        ("random tokens",),
    )
    path = made.save(folder / "random.safetensors").path
    assert path is not None
    return path


def with_profile(config: CrushConfig | None, profile: Path) -> CrushConfig | None:
    return None if config is None else config.replace(profile=str(profile))


def measured(model: Any, request: Request, method: str, config: CrushConfig | None) -> dict[str, Any]:
    """A row for one request. Where memory runs out, the row says so, and what was taken is given back."""
    try:
        return _measured(model, request, method, config)
    except torch.OutOfMemoryError:
        row = failed(request, method, config, "out of memory")
    # Behind the exception, whose frames hold tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return row


def failed(request: Request, method: str, config: CrushConfig | None, reason: str) -> dict[str, Any]:
    """The row of a request without figures."""
    return vars(
        Record(ENGINE, method, request.tokens, request.batch, request.new_tokens, 0, budget=share(config), error=reason)
    )


@torch.inference_mode()
def _measured(model: Any, request: Request, method: str, config: CrushConfig | None) -> dict[str, Any]:
    device = model.device
    generator = torch.Generator(device).manual_seed(request.tokens)
    size = (request.batch, request.tokens)
    prompt = torch.randint(model.config.vocab_size, size, generator=generator, device=device)
    memory = PeakMemory(device)
    start = _now(device)
    cache = DynamicCache(config=model.config) if config is None else KVCrush(config).cache(model)
    token = next_token(model, prompt, cache)
    ttft = _now(device) - start
    with cudnn_attention(False):
        times = decode(model, token, cache, request.new_tokens)
    peak, total = memory.peak(), _now(device) - start
    tpot_with_cudnn = None
    if config is None and device.type == "cuda":
        tpot_with_cudnn = statistics.median(decode(model, token, cache, FEWEST))
    waits = synchronisations(lambda: next_token(model, token, cache)) if device.type == "cuda" else None
    seen = cache.get_seq_length()
    tpot = statistics.median(times)
    record = Record(
        engine=ENGINE,
        method=method,
        budget=share(config),
        tokens=request.tokens,
        batch=request.batch,
        new_tokens=len(times),
        repeat=0,
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        total_seconds=total,
        tokens_per_second=request.batch / tpot,
        peak_memory_bytes=peak,
        peak_above_start_bytes=None if peak is None or memory.before is None else peak - memory.before,
        kv_bytes=kv_bytes_at_16_bits(cache),
        full_kv_bytes=request.batch * seen * kv_bytes_per_token(model.config),
    )
    allocated = cache.report().memory_bytes if isinstance(cache, CrushCache) else kv_bytes(cache)
    spread = {"tpot_least": min(times), "tpot_most": max(times)}
    found = {"memory_bytes": allocated, "synchronisations": waits, "tpot_with_cudnn_seconds": tpot_with_cudnn}
    return {**vars(record), **spread, **found}


def decode(model: Any, token: Tensor, cache: Any, new_tokens: int) -> list[float]:
    """Seconds of each of so many tokens behind the first ones, `WARM_UP`."""
    times: list[float] = []
    decoding = last = _now(model.device)
    for step in range(WARM_UP + new_tokens):
        token = next_token(model, token, cache)
        before, last = last, _now(model.device)
        if step >= WARM_UP:
            times.append(last - before)
        if len(times) >= FEWEST and last - decoding > DECODING_SECONDS:
            break
    return times


def next_token(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """The token that is likeliest to follow, `[B, 1]`. Logits of the last position only: a prompt's take gigabytes."""
    logits: Tensor = model(input_ids=tokens, **passed(cache), use_cache=True, logits_to_keep=1).logits
    return logits.argmax(-1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def synchronisations(run: Callable[[], object]) -> dict[str, int]:
    """Where the host waits for the GPU while something runs, and how often: `{file:line: times}`."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found = Counter(
        f"{Path(warning.filename).parent.name}/{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    )
    return dict(found.most_common())


def kv_bytes_per_token(config: Any) -> int:
    """Of the full cache, in 16 bits."""
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def operations(config: Any, request: Request) -> float:
    """Floating-point operations of reading the prompts: weights, and attention under its causal mask."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    projections = hidden * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    weights = projections + 3 * hidden * config.intermediate_size
    attention = heads * request.tokens  # two products with half of the tokens each, on the average
    return 2.0 * request.batch * request.tokens * config.num_hidden_layers * (weights + attention)


def least_bytes(config: Any, request: Request, budget: float, weights: int) -> int:
    """What a request takes at the least: weights, the cache at its budget, and the widest activations of a layer.

    These are the three tensors of the MLP, and the hidden states before and behind the norm. All but one layer's keys
    and values are compressed by then.
    """
    tokens = request.batch * request.tokens
    activations = 2 * tokens * (3 * config.intermediate_size + 2 * config.hidden_size)
    return int(weights + activations + budget * tokens * kv_bytes_per_token(config))
