"""`KVCrush`: makes `generate` of a model use a compressed cache, inside a `with` block."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from ..config import CrushConfig
from ..errors import ConfigError, UnsupportedModelError
from .cache import CrushCache
from .support import check_generation, check_prompt


class KVCrush:
    """Compresses the KV cache of every prompt and generation in a `with` block.

        with KVCrush(budget=0.25)(model) as session:
            model.generate(**inputs, max_new_tokens=100)
        print(session.cache.report())

    or, without a block and in any thread, `model.generate(**inputs, past_key_values=KVCrush(...).cache(model))`.

    A block holds for the thread that entered it; one model may be in the blocks of several threads, each with
    its own configuration. Nothing is left on the model afterwards.

    Args:
        config: a `CrushConfig`, or the name of a preset (`"balanced"`); fields given as keywords replace its own.

    Raises:
        ConfigError: a field is unknown, or has a value that is not accepted.
    """

    def __init__(self, config: CrushConfig | str | None = None, **fields: Any) -> None:
        if isinstance(config, str):
            config = CrushConfig.preset(config)
        if config is not None and not isinstance(config, CrushConfig):
            raise ConfigError(f"config={config!r}: expected a CrushConfig, a preset's name, or fields as keywords")
        self.config = CrushConfig.from_dict(fields) if config is None else config.replace(**fields)

    def cache(self, model: Any) -> CrushCache:
        """A cache to pass as `past_key_values`, for one batch.

        Chunked prefill needs to know where a prompt ends: use the `with` block, or set `prefill_end`.
        """
        return CrushCache(_generating(model), self.config)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[Session]:
        """Raises `UnsupportedModelError` at once where the model's cache cannot be compressed."""
        target = _generating(model)
        session = Session(self.config, target)
        sessions = _sessions.get()
        token = _sessions.set({**sessions, id(target): session})
        _attach(target)
        try:
            yield session
        finally:
            _detach(target)
            _sessions.reset(token)


class Session:
    """One `with` block. `cache` is the last one that was made in it, None before."""

    def __init__(self, config: CrushConfig, model: Any) -> None:
        self.config = config
        self.cache: CrushCache | None = None
        self._model = model
        self.new_cache()  # refuses what is not supported before anything runs
        self.cache = None

    def new_cache(self) -> CrushCache:
        self.cache = CrushCache(self._model, self.config)
        return self.cache

    def use(self, cache: Any) -> None:
        """Accepts a cache that the user passed.

        Raises:
            UnsupportedModelError: it is not a `CrushCache`.
        """
        if not isinstance(cache, CrushCache):
            raise UnsupportedModelError(
                f"past_key_values is a {type(cache).__name__}, which KVCrush cannot compress: pass none, or a "
                "CrushCache"
            )
        self.cache = cache


# Sessions of the present thread (or task), by the id of their model, which the block keeps alive.
_sessions: ContextVar[dict[int, Session]] = ContextVar("crushkv_sessions", default={})  # noqa: B039
_attached: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
_attaching = threading.Lock()


def _generating(model: Any) -> Any:
    """The model whose `generate` runs; PEFT and similar wrappers are taken off."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, GenerationMixin) or not isinstance(inner, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is no Transformers model that can generate")
    return inner


def _attach(model: Any) -> None:
    with _attaching:
        if model not in _attached:
            _attached[model] = _Attachment(model)
        _attached[model].users += 1


def _detach(model: Any) -> None:
    with _attaching:
        attachment = _attached[model]
        attachment.users -= 1
        if not attachment.users:
            attachment.remove()
            del _attached[model]


class _Attachment:
    """What is changed on a model while at least one block is open: two methods of generation, and one hook."""

    def __init__(self, model: Any) -> None:
        self.users = 0
        self._model = weakref.ref(model)
        self._prepare = model._prepare_cache_for_generation
        self._prefill = model._prefill
        model._prepare_cache_for_generation = self.prepare_cache
        model._prefill = self.prefill
        self._hook = model.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def remove(self) -> None:
        model: Any = self._model()
        del model._prepare_cache_for_generation
        del model._prefill
        self._hook.remove()

    def _session(self) -> Session | None:
        return _sessions.get().get(id(self._model()))

    def prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session = self._session()
        if session is None:
            warnings.warn(
                "crushkv: generate() runs in a thread that has not entered KVCrush; it uses the full cache. Enter the "
                "block in that thread, or pass past_key_values=KVCrush(...).cache(model)",
                stacklevel=3,
            )
        elif generation_config.use_cache is not False:
            check_generation(generation_config, generation_mode)
            if model_kwargs.get("past_key_values") is None:
                model_kwargs["past_key_values"] = session.new_cache()
                return None
            session.use(model_kwargs["past_key_values"])
        return self._prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def prefill(self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, CrushCache):
            return self._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        # The attention mask covers the whole sequence, whether its earlier part is passed again or not. Transformers
        # drops a mask without padding and notes its length.
        mask = model_kwargs.get("attention_mask")
        end = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[-1]
        check_prompt(end, cache.model_config)
        cache.prefill_end = end
        try:
            return self._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            cache.prefill_end = None

    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives calls of the model itself a cache, where Transformers would make one."""
        session = self._session()
        if session is None or model.training:
            return None
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            session.use(cache)
        elif cache is None and len(args) < 4 and _uses_cache(model, kwargs.get("use_cache")):
            kwargs["past_key_values"] = session.new_cache()
            return args, kwargs
        return None


def _uses_cache(model: Any, asked: bool | None) -> bool:
    if asked is None:
        asked = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
    return bool(asked)
