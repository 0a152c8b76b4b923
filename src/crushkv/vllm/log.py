"""The log of vLLM, whose format and level hold for loggers below its own."""

from __future__ import annotations

from vllm.logger import init_logger

logger = init_logger("vllm.crushkv")
