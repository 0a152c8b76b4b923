"""KVCrush in vLLM's GPU worker, for FlashAttention's cache. The layout is tested; it has not been run on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from .layout import CacheLayout, InterleavedLayout
from .worker import CompactingWorker


class CrushGPUWorker(CompactingWorker):
    def layout(self, module: Any) -> tuple[CacheLayout, torch.dtype | None]:
        numbers = current_platform.fp8_dtype() if module.kv_cache_dtype.startswith("fp8") else None
        return InterleavedLayout(module.head_size), numbers
