"""KVCrush in Transformers: the `with` block, the cache, and the attention function."""

from ..profile import Profile, ProfileError
from .cache import CacheReport, CrushCache
from .kvcrush import KVCrush, Session
from .layer import CrushLayer
from .planning import CachePlan, plan_cache
from .profiling import find_profile, obtain_profile, profile_model
from .saving import SavedCache, SavedCacheError, load_cache, save_cache

__all__ = [
    "CachePlan",
    "CacheReport",
    "CrushCache",
    "CrushLayer",
    "KVCrush",
    "Profile",
    "ProfileError",
    "SavedCache",
    "SavedCacheError",
    "Session",
    "find_profile",
    "load_cache",
    "obtain_profile",
    "plan_cache",
    "profile_model",
    "save_cache",
]
