"""What can be compressed inside vLLM. Everything else is refused at start-up, with the reason."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

import vllm
from vllm.platforms import current_platform

from ..config import CrushConfig
from ..errors import ConfigError, UnsupportedModelError
from .settings import check_budget

VERSIONS = "0.32"
UNTESTED = "CRUSHKV_VLLM_UNTESTED"
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
GPU_WORKER = "vllm.v1.worker.gpu_worker.Worker"
CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")


def refuse(reasons: Iterator[str]) -> None:
    """Raises `UnsupportedModelError` with all the reasons, if there are any."""
    if found := list(reasons):
        raise UnsupportedModelError("crushkv cannot compress this vLLM engine:\n" + "\n".join(f"- {r}" for r in found))


def check_engine(vllm_config: Any, config: CrushConfig) -> None:
    """Refuses an engine from its configuration, before anything is loaded.

    Raises:
        UnsupportedModelError: names each thing that is not supported.
        ConfigError: the budget does not fit the engine.
    """
    if not vllm.__version__.startswith(f"{VERSIONS}."):
        refuse(iter([f"vLLM {vllm.__version__}: this release of crushkv works with vLLM {VERSIONS}.x"]))
    refuse(_reasons(vllm_config, config))
    _check_sizes(config, vllm_config.model_config.max_model_len)
    check_budget(config, bytes_per_token(vllm_config))


def _check_sizes(config: CrushConfig, longest: int) -> None:
    """Refuses a window or a page that is longer than any request can be."""
    budget = config.parsed_budget
    if config.page_size > longest:
        raise ConfigError(f"page_size={config.page_size} tokens is above max_model_len={longest}")
    if config.sink + config.window >= longest:
        raise ConfigError(
            f"sink={config.sink}, window={config.window}: accepted are fewer than max_model_len={longest} tokens in "
            "all, as they are always kept"
        )
    if budget.kind == "tokens" and budget.amount > longest:
        raise ConfigError(f"budget={int(budget.amount)} tokens is above max_model_len={longest}")


def _reasons(vllm_config: Any, config: CrushConfig) -> Iterator[str]:
    yield from _platform(vllm_config)
    yield from _model(vllm_config.model_config)
    yield from _features(vllm_config)
    yield from _parallelism(vllm_config.parallel_config)
    if not config.formats.raw:
        yield (
            f"bits={config.to_dict()['bits']!r}, rank={config.rank!r}: vLLM's blocks hold all tokens in one dtype; "
            "kv_cache_dtype='fp8' has half the bytes"
        )
    if config.heads != "equal":
        yield (
            f"heads={config.heads!r}: heads keep different numbers of tokens, but all heads of a request share one "
            "block table"
        )
    if config.make_policy().layer_budget != "uniform":
        yield (
            f"policy={config.policy!r}: its layers keep different numbers of tokens, but all layers of a request share "
            "one block table"
        )


def _platform(vllm_config: Any) -> Iterator[str]:
    if current_platform.is_cuda():
        if os.environ.get(UNTESTED) != "1":
            yield f"GPUs: not tested inside vLLM; set {UNTESTED}=1 to try it with FlashAttention"
        if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            yield "CUDA graphs that contain attention hide its queries: set cudagraph_mode to PIECEWISE or NONE"
    elif not current_platform.is_cpu():
        yield f"platform {current_platform.device_name!r}: supported is CPU"
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name not in BACKENDS:
        yield f"attention backend {backend.name}: supported are {', '.join(BACKENDS)}"
    if vllm_config.use_v2_model_runner:
        yield "the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0 to use V1"
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in CACHE_DTYPES:
        yield f"kv_cache_dtype={dtype!r}: supported are {', '.join(CACHE_DTYPES)}"


def _model(model: Any) -> Iterator[str]:
    if model.use_mla:
        yield "multi-head latent attention (MLA): it caches a latent that all heads share"
    if model.get_sliding_window() is not None or model.attention_chunk_size is not None or model.rswa_window:
        yield "sliding-window or chunked attention: some layers bound their cache already (disable_sliding_window=True)"
    if model.is_hybrid or model.is_attention_free or model.has_inner_state:
        yield "hybrid models and models without attention: recurrent state cannot be evicted token by token"
    if model.is_encoder_decoder:
        yield "encoder-decoder models"
    if model.runner_type != "generate" or model.is_diffusion:
        yield f"runner {model.runner_type!r}: only text generation is supported"
    if model.is_multimodal_model or model.uses_mrope or model.is_mm_prefix_lm:
        yield "multimodal models: not tested"
    if model.uses_alibi:
        yield "ALiBi: its bias counts positions in the cache, which are not those of the text after an eviction"
    if model.enable_prompt_embeds:
        yield "enable_prompt_embeds: not tested"


def _features(vllm_config: Any) -> Iterator[str]:
    if vllm_config.speculative_config is not None:
        yield "speculative decoding: rejected tokens would have to be taken back from a compacted cache"
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None:
        yield "KV connectors and KV offloading: they read blocks by position, which compaction changes"
    if vllm_config.ec_transfer_config is not None:
        yield "encoder cache connectors"
    events = vllm_config.kv_events_config
    if events is not None and events.enable_kv_cache_events:
        yield "KV cache events: not tested"
    if vllm_config.lora_config is not None:
        yield "LoRA: not tested"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill: layers that share another layer's cache"
    if vllm_config.scheduler_config.scheduler_cls is not None:
        yield f"scheduler_cls={vllm_config.scheduler_config.scheduler_cls!r}: crushkv brings its own scheduler"
    worker = vllm_config.parallel_config.worker_cls
    if worker not in (CPU_WORKER, GPU_WORKER):
        yield f"worker_cls={worker!r}: crushkv brings its own worker"


def _parallelism(parallel: Any) -> Iterator[str]:
    if parallel.pipeline_parallel_size > 1:
        yield f"pipeline_parallel_size={parallel.pipeline_parallel_size}: not tested"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism: it spreads one request's cache over workers"
    if parallel.use_ubatching:
        yield "dual batch overlap (enable_dbo): not tested"


def check_groups(groups: Any) -> None:
    """Refuses a cache that is not one group of full-attention layers, when vLLM has laid it out."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    def reasons() -> Iterator[str]:
        if len(groups) != 1:
            yield f"{len(groups)} groups of layers with caches of different kinds: supported is one"
        for group in groups:
            spec = group.kv_cache_spec
            if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
                yield f"layers with a {type(spec).__name__}: supported is plain full attention"

    refuse(reasons())


def check_layers(layers: Any) -> None:
    """Refuses attention layers that were not tested: `layers` maps names to vLLM's `Attention` modules."""

    def reasons() -> Iterator[str]:
        for name, layer in layers.items():
            backend = layer.attn_backend.get_name()
            if backend not in BACKENDS:
                yield f"{name}: attention backend {backend}: supported are {', '.join(BACKENDS)}"
            if layer.attn_type != "decoder" or layer.sliding_window or layer.has_sink:
                yield f"{name}: {layer.attn_type} attention with a window or sinks: supported is plain full attention"
            if layer.kv_sharing_target_layer_name is not None:
                yield f"{name}: it shares the cache of {layer.kv_sharing_target_layer_name}"
            if getattr(layer.impl, "alibi_slopes", None) is not None:
                yield f"{name}: ALiBi"
            if layer.query_quant is not None:
                yield f"{name}: quantized queries"

    refuse(reasons())


def check_signature(method: Any, *parameters: str) -> None:
    """Refuses a vLLM in which a method that crushkv overrides takes other arguments than it was written for."""
    found = [name for name in inspect.signature(method).parameters if name != "self"]
    if found != list(parameters):
        refuse(iter([f"vLLM {vllm.__version__}: {method.__qualname__} takes {found}, not {list(parameters)}"]))


def bytes_per_token(vllm_config: Any) -> int:
    """Keys and values of one token in all layers and heads, whatever the parallelism."""
    model = vllm_config.model_config
    element = 1 if vllm_config.cache_config.cache_dtype.startswith("fp8") else model.dtype.itemsize
    return model.get_total_num_hidden_layers() * model.get_total_num_kv_heads() * model.get_head_size() * 2 * element
