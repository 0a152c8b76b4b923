"""crushkv: a KV cache several times smaller, with the model's answers kept (KVCrush, arXiv 2503.00022)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import CrushConfig
from .errors import ConfigError, CrushError, EmbeddedModelError, ScoreError, UnsupportedModelError

if TYPE_CHECKING:
    from .embedded import load_embedded
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
    "load_embedded",
    "plan_cache",
    "profile_model",
    "save_cache",
]

# Importing Transformers takes seconds, which `crushkv --help` or a configuration need not wait for. The names that
# are not imported above come from these modules when they are first asked for.
_LAZY = {name: ".hf" for name in __all__ if name not in globals()} | {"load_embedded": ".embedded"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
