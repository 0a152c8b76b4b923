"""What the workers of all platforms have in common."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker

from .layout import CacheLayout
from .runner import CompactingRunner, check_signatures, paged_layers
from .settings import engine_config


class CompactingWorker(Worker):
    """vLLM's worker, which the workers of all platforms derive from."""

    def init_device(self) -> None:
        check_signatures()
        super().init_device()
        # vLLM's worker names the runner's class itself, so the runner is given another one when it is there.
        runner: Any = self.model_runner
        runner.__class__ = type(f"Crush{type(runner).__name__}", (CompactingRunner, type(runner)), {})

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        config = engine_config(self.vllm_config.additional_config)
        assert config is not None, "the plugin has put it there"
        context = self.vllm_config.compilation_config.static_forward_context
        modules = {name: context[name] for group in kv_cache_config.kv_cache_groups for name in group.layer_names}
        self.model_runner.start(config, paged_layers(modules, self.layout))

    def layout(self, module: Any) -> tuple[CacheLayout, torch.dtype | None]:
        """How an attention module stores keys and values; the numbers' dtype where it stores bytes."""
        raise NotImplementedError
