"""KVCrush in vLLM's CPU worker."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from .cpu_layout import cpu_layout, fp8_dtype
from .layout import CacheLayout
from .worker import CompactingWorker


class CrushCPUWorker(CompactingWorker, CPUWorker):
    def layout(self, module: Any) -> tuple[CacheLayout, torch.dtype | None]:
        stored = module.kv_cache_dtype
        block_size = module.kv_cache.shape[2]
        layout = cpu_layout(module.isa, block_size, module.head_size, module.dtype, stored)
        return layout, None if stored == "auto" else fp8_dtype(stored)
