"""One generation, measured: time to the first token, time per token after it, bytes of the cache, peak memory."""

from __future__ import annotations

import contextlib
import gc
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..config import CrushConfig
from ..hf.cache import CacheReport, CrushCache, kv_bytes, kv_bytes_at_16_bits
from ..hf.interface import CACHE
from ..hf.kvcrush import KVCrush
from ..hf.support import check_prompt
from ..machine import resident_memory, return_freed_memory


@dataclass(frozen=True)
class Measurement:
    """The answer of one run of `generate`, its seconds and its bytes.

    Attributes:
        token_ids: the answer to the first prompt, without the prompt. The end-of-text token is included.
        prompt_tokens: length of the prompt.
        ttft: time to first token, from the call.
        tpot: mean time per output token after the first, evictions included. None: there is only one token.
        tokens_seen: logical length of the cache at the end.
        kv_bytes: keys and values held at the end, measured from their tensors, with 16 bits for a number that is not
            quantized; see `CacheReport`.
        full_kv_bytes: what the full cache holds of the same tokens, counted in the same way.
        memory_bytes: what the cache has allocated in the model's dtype, with all that KVCrush holds besides.
        peak_memory: most memory in use during the run: of the GPU's allocator, or the resident set of the process,
            model included; None where the platform does not tell.
        memory_before: the same at the start of the run.
        report: what `CrushCache` reports; None for the full cache.
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    ttft: float
    tpot: float | None
    tokens_seen: int
    kv_bytes: int
    full_kv_bytes: int
    memory_bytes: int
    peak_memory: int | None
    memory_before: int | None
    report: CacheReport | None

    @property
    def bytes_fraction(self) -> float:
        """`kv_bytes` as a part of `full_kv_bytes`."""
        return self.kv_bytes / self.full_kv_bytes

    @property
    def peak_above_start(self) -> int | None:
        """`peak_memory` less `memory_before`."""
        if self.peak_memory is None or self.memory_before is None:
            return None
        return self.peak_memory - self.memory_before


def measure(
    model: Any,
    input_ids: Tensor,
    config: CrushConfig | None = None,
    *,
    seed: int = 0,
    on_token: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Measurement:
    """Generates once from a prompt, and measures.

    Args:
        model: a Transformers model that can generate.
        input_ids: `[B, S]`, prompts of one length.
        config: what KVCrush keeps; None runs Transformers' own cache.
        seed: of sampling. torch's generators have the same state before and after.
        on_token: called with the new tokens `[B]` of each step; its time is not counted.
        options: further arguments of `generate`.

    Raises:
        ConfigError: the prompt is empty or longer than the model's positions.
        UnsupportedModelError: the model's cache cannot be compressed.
    """
    check_prompt(input_ids.shape[-1], model.config)
    device = model.device
    input_ids = input_ids.to(device)
    devices = [device] if device.type == "cuda" else []
    compressed = KVCrush(config)(model) if config is not None else contextlib.nullcontext()
    as_set = cudnn_attention(torch.backends.cuda.cudnn_sdp_enabled())  # again, when the answer is there
    with torch.random.fork_rng(devices=devices), compressed, as_set:
        torch.manual_seed(seed)
        memory = PeakMemory(device)
        clock = TokenClock(device, on_token)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=clock,
            return_dict_in_generate=True,
            **options,
        )
        peak = memory.peak()
    cache = output[CACHE]
    report = cache.report() if isinstance(cache, CrushCache) else None
    held = kv_bytes_at_16_bits(cache)
    return Measurement(
        token_ids=tuple(output.sequences[0, input_ids.shape[-1] :].tolist()),
        prompt_tokens=input_ids.shape[-1],
        ttft=clock.ttft,
        tpot=clock.tpot,
        tokens_seen=cache.get_seq_length(),
        kv_bytes=held,
        full_kv_bytes=held if report is None else report.full_kv_bytes,
        memory_bytes=kv_bytes(cache) if report is None else report.memory_bytes,
        peak_memory=peak,
        memory_before=memory.before,
        report=report,
    )


def warm_up(model: Any, input_ids: Tensor, config: CrushConfig | None = None, tokens: int = 256) -> None:
    """Generates two tokens from the beginning of a prompt, unmeasured.

    The first run of a process also reads the weights from disk and prepares libraries. That would count as time and
    memory of the first cache.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a budget that is small beside so short a prompt
        measure(model, input_ids[:, :tokens], config, max_new_tokens=2, do_sample=False)


@contextlib.contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """Whether PyTorch may attend with cuDNN, which makes a plan for each number of tokens that it has not met before.

    A prompt is read faster with it. For a decoded token, whose number of tokens is always new, the plan takes longer
    than all else: 50 ms on an H100. A compressed cache does not need it, and would look faster than it is.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class TokenClock(BaseStreamer):
    """Notes when each token arrives. Counts from when it is made.

    From the first token on, PyTorch does not attend with cuDNN; see `cudnn_attention`.
    """

    def __init__(self, device: torch.device, on_token: Callable[[Tensor], None] | None = None) -> None:
        self._device = device
        self._on_token = on_token
        self._prompt_seen = False
        self._elsewhere = 0.0  # seconds spent in on_token
        self._times: list[float] = []
        self._start = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        arrived = self._now()
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._times.append(arrived - self._start - self._elsewhere)
        if self._on_token is not None:
            self._on_token(value)
            self._elsewhere += time.perf_counter() - arrived

    def end(self) -> None:
        """Called at the end of the answer. There is nothing left to do."""

    @property
    def ttft(self) -> float:
        return self._times[0]

    @property
    def tpot(self) -> float | None:
        after = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / after if after else None


class PeakMemory:
    """The most memory in use since this object was made; see `Measurement.peak_memory`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
        else:
            self.before = _reset_peak_resident_set() if device.type == "cpu" else None

    def peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if self.before is None else _peak_resident_set()


def _reset_peak_resident_set() -> int | None:
    """Resets the highest resident set of the process, and returns the present one. None: it cannot be reset."""
    if sys.platform != "linux":
        return None
    # What the allocator only keeps in reserve would hide a smaller peak.
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident_memory()


def _peak_resident_set() -> int | None:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else None
