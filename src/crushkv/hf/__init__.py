"""KVCrush in Transformers: the `with` block, the cache, and the attention function."""

from .cache import CacheReport, CrushCache
from .kvcrush import KVCrush, Session
from .layer import CrushLayer
from .planning import CachePlan, plan_cache
from .recording import Recording
from .saving import SavedCache, SavedCacheError, load_cache, save_cache
from .stacking import stack

__all__ = [
    "CachePlan",
    "CacheReport",
    "CrushCache",
    "CrushLayer",
    "KVCrush",
    "Recording",
    "SavedCache",
    "SavedCacheError",
    "Session",
    "load_cache",
    "plan_cache",
    "save_cache",
    "stack",
]
