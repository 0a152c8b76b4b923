"""crushkv: a KV cache several times smaller, with the model's answers kept (KVCrush, arXiv 2503.00022)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import CrushConfig
from .errors import ConfigError, CrushError, EmbeddedModelError, ScoreError, UnsupportedModelError

if TYPE_CHECKING:
    from .hf import (
        CachePlan,
        CacheReport,
        CrushCache,
        KVCrush,
        Profile,
        ProfileError,
        SavedCache,
        SavedCacheError,
        load_cache,
        plan_cache,
        profile_model,
        save_cache,
    )

__all__ = [
    "CachePlan",
    "CacheReport",
    "ConfigError",
    "CrushCache",
    "CrushConfig",
    "CrushError",
    "EmbeddedModelError",
    "KVCrush",
    "Profile",
    "ProfileError",
    "SavedCache",
    "SavedCacheError",
    "ScoreError",
    "UnsupportedModelError",
    "__version__",
    "load_cache",
    "plan_cache",
    "profile_model",
    "save_cache",
]

# Importing Transformers takes seconds, which `crushkv --help` or a configuration need not wait for.
_LAZY = frozenset(
    {
        "CachePlan",
        "CacheReport",
        "CrushCache",
        "KVCrush",
        "Profile",
        "ProfileError",
        "SavedCache",
        "SavedCacheError",
        "load_cache",
        "plan_cache",
        "profile_model",
        "save_cache",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".hf", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
