"""KVCrush in vLLM: a plugin that frees the blocks of evicted tokens. Importing this needs no vLLM."""

from .plugin import register

__all__ = ["register"]
