"""What crushkv uses of Transformers' inner side, under the names of the installed release, checked once at import."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from ..errors import CrushError
from ..text import release

# Transformers 5.24 calls the argument and the output `cache`.
_NAMES = ("cache", "past_key_values")


def _parameters(method: str) -> Mapping[str, inspect.Parameter]:
    function = getattr(GenerationMixin, method, None)
    if function is None:
        raise CrushError(
            f"Transformers {transformers.__version__} has no GenerationMixin.{method}, which crushkv needs: use a "
            "release that crushkv names in its requirements"
        )
    return inspect.signature(function).parameters


def _check(method: str, *parameters: str) -> None:
    found = _parameters(method)
    for name in parameters:
        if name not in found:
            raise CrushError(
                f"GenerationMixin.{method} of Transformers {transformers.__version__} has no parameter {name!r}, which "
                "crushkv needs: use a release that crushkv names in its requirements"
            )


def _cache_argument() -> str:
    found = _parameters("prepare_inputs_for_generation")
    for name in _NAMES:
        if name in found:
            return name
    raise CrushError(
        f"models of Transformers {transformers.__version__} take a cache under a name that crushkv does not know: use "
        "a release that crushkv names in its requirements"
    )


def check_interface() -> None:
    """Checks that every private name is there, as crushkv calls it.

    Raises:
        CrushError: names what is missing, and the version of Transformers.
    """
    _check("_prepare_cache_for_generation", "generation_config", "model_kwargs", "generation_mode")
    _check("_prefill", "input_ids", "generation_config", "model_kwargs")
    _check("init_continuous_batching")
    _cache_argument()


check_interface()
CACHE = _cache_argument()
"""The name of the argument, and of the output, that is the cache."""


CHUNKS_LATER_TURNS = release(transformers.__version__) >= (5, 23)
"""Whether `prefill_chunk_size` may be used in a turn after the first: earlier releases read what the cache has seen
once more, and count positions from 0."""


def passed(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as keyword arguments of a model's call, under the name that this release of Transformers has."""
    return {CACHE: cache}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, under either name; None where there is none."""
    return next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)


def put_cache(kwargs: dict[str, Any], cache: Cache) -> None:
    """Adds a cache to keyword arguments that have none."""
    for name in _NAMES:
        kwargs.pop(name, None)
    kwargs[CACHE] = cache
