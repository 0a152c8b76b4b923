"""crushkv: a KV cache several times smaller, with the model's answers kept (KVCrush, arXiv 2503.00022)."""

from ._version import __version__
from .config import CrushConfig
from .errors import ConfigError, CrushError, EmbeddedModelError, ScoreError, UnsupportedModelError
from .hf import CacheReport, CrushCache, KVCrush

__all__ = [
    "CacheReport",
    "ConfigError",
    "CrushCache",
    "CrushConfig",
    "CrushError",
    "EmbeddedModelError",
    "KVCrush",
    "ScoreError",
    "UnsupportedModelError",
    "__version__",
]
