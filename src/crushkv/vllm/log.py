"""A logger below vLLM's own, so that vLLM's format and level hold for it."""

from __future__ import annotations

from vllm.logger import init_logger

logger = init_logger("vllm.crushkv")
