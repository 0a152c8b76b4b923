"""`KVCrush`: makes `generate` of a model use a compressed cache, in a `with` block or until it is switched off."""

from __future__ import annotations

import sys
import warnings
import weakref
from types import FrameType, TracebackType
from typing import Any

from torch import nn
from transformers import GenerationMixin

from ..config import CrushConfig
from ..errors import ConfigError, CrushError, UnsupportedModelError
from .attachment import attach, detach, scope_of
from .cache import CrushCache


class KVCrush:
    """Compresses the KV cache of every prompt and generation of a model.

        with KVCrush(budget=0.25)(model) as session:
            model.generate(**inputs, max_new_tokens=100)
        print(session.cache.report())

    In a notebook, `session = KVCrush(budget=0.25)(model)` can be switched on and off: `session.enable()`,
    `session.disable()`. Without either, a cache can be passed: `model.generate(**inputs,
    past_key_values=KVCrush(...).cache(model))`.

    A session belongs to the model: whatever thread calls `generate` while it is on gets a compressed cache, each call
    one of its own. Blocks may be nested, and the innermost counts. Nothing is left on the model afterwards.

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

    def __repr__(self) -> str:
        return f"KVCrush({_changed(self.config)})"

    def cache(self, model: Any) -> CrushCache:
        """A cache to pass as `past_key_values`, for one batch.

        Chunked prefill needs to know where a prompt ends: use the `with` block, or set `prefill_end`.
        """
        models = generating_models(model)
        failures: list[UnsupportedModelError] = []
        for inner in models:
            try:
                return CrushCache(inner, self.config)
            except UnsupportedModelError as error:
                failures.append(error)
        raise failures[0]

    def __call__(self, model: Any) -> Session:
        """A session for this model, which is off: enter it, or call `enable()`.

        Raises:
            UnsupportedModelError: the model's cache cannot be compressed.
        """
        return Session(self.config, model)


class _NoCache:
    """Stands for the cache of a session in which nothing has run."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __repr__(self) -> str:
        return f"<no cache yet: {self._session._nothing_yet()}>"

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CrushError(f"session.cache.{name}: there is no cache yet. {self._session._nothing_yet()}")


class Session:
    """KVCrush on one model: a `with` block, or on between `enable()` and `disable()`.

    Attributes:
        config: what its caches keep.
        scope: the frame that a `with` block is in; None where it is on without one.
        notes: why calls of the model were not compressed.
    """

    def __init__(self, config: CrushConfig, model: Any) -> None:
        self.config = config
        self.scope: FrameType | None = None
        self.notes: list[str] = []
        self._name = type(model).__name__
        self._cache: CrushCache | None = None
        self._ran = False
        self._enabled = False
        self._outer: list[tuple[bool, FrameType | None]] = []
        models = generating_models(model)
        # Of a model that calls another's generate, one may have no cache that can be compressed.
        refused = [error for inner in models if (error := _refusal(inner, config)) is not None]
        if len(refused) == len(models):
            raise refused[0]
        self._models = [weakref.ref(inner) for inner in models]

    def __repr__(self) -> str:
        return f"<KVCrush of {self._name}, {'on' if self._enabled else 'off'}: {_changed(self.config)}>"

    @property
    def enabled(self) -> bool:
        """Whether it is on."""
        return self._enabled

    @property
    def cache(self) -> Any:
        """The last `CrushCache` that was made or passed while the session was on.

        Before that it is false, and to use it is a `CrushError` that says why there is none.
        """
        return _NoCache(self) if self._cache is None else self._cache

    def _nothing_yet(self) -> str:
        if self.notes:
            return f"Nothing was compressed: {self.notes[0]}"
        if not self._enabled and not self._ran:
            return "Enter the session (`with session:`) or call session.enable(), and then generate"
        return f"No generate() and no forward pass of {self._name} has run in this session"

    def enable(self) -> Session:
        """Switches it on, until `disable()`; returns itself. It may be on already."""
        if not self._enabled:
            attach(self, self._alive())
            self._enabled = True
        return self

    def disable(self) -> None:
        """Switches it off. One warning says so, where it was on and compressed nothing."""
        if self._off():
            self._tell(stacklevel=3)

    def __enter__(self) -> Session:
        self._outer.append((self._enabled, self.scope))
        if not self._enabled:
            self.scope = scope_of(sys._getframe(1))
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        was_enabled, scope = self._outer.pop()
        if not was_enabled:
            self._off()
            self.scope = scope
            if kind is None:
                self._tell(stacklevel=3)

    def _off(self) -> bool:
        if self._enabled:
            self._enabled = False
            detach(self, self._alive())
            return True
        return False

    def _alive(self) -> list[nn.Module]:
        return [model for ref in self._models if (model := ref()) is not None]

    def _tell(self, stacklevel: int) -> None:
        """Says that nothing was compressed, where that is so."""
        reason = None
        if self._cache is None:
            reason = "; ".join(dict.fromkeys(self.notes)) or (
                f"no generate() and no forward pass of {self._name} ran while it was on"
            )
        elif self._cache.waiting is not None:
            reason = self._cache.bypassed
        if reason is not None:
            warnings.warn(f"crushkv: nothing was compressed: {reason}", stacklevel=stacklevel + 1)

    def new_cache(self, model: Any) -> CrushCache:
        """A cache for a call of `model`, which is the session's, or one inside it."""
        cache = CrushCache(model, self.config)
        self._ran, self._cache = True, cache
        return cache  # and not self._cache, which may be another thread's by now

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
        self._ran = True
        self._cache = cache


def generating_models(model: Any) -> list[Any]:
    """The model whose `generate` is called, and those inside it whose `generate` it may call in turn.

    Compiled models and PEFT's wrappers are taken off.

    Raises:
        UnsupportedModelError: it is no model that generates, or one that is wrapped in a way that cannot be seen
            through.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model)
    if type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
        raise UnsupportedModelError(
            f"{type(model).__name__} runs copies of the model, which KVCrush does not see: pass its .module, and call "
            "generate of that"
        )
    if hasattr(model, "get_base_model"):
        _check_peft(model)
        model = model.get_base_model()
        model = getattr(model, "_orig_mod", model)
    if not isinstance(model, GenerationMixin) or not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is no Transformers model that can generate")
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def _check_peft(model: Any) -> None:
    """Refuses methods that put trained keys and values into the cache, which come from no token."""
    active = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(active, "peft_type", ""), "value", getattr(active, "peft_type", "")))
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):
        raise UnsupportedModelError(
            f"PEFT {kind.lower().replace('_', ' ')} fills the cache with trained keys and values, which belong to no "
            "token: KVCrush has no scores for them. LoRA, prompt tuning and p-tuning work"
        )


def _refusal(model: Any, config: CrushConfig) -> UnsupportedModelError | None:
    try:
        CrushCache(model, config)
    except UnsupportedModelError as error:
        return error
    return None


def _changed(config: CrushConfig) -> str:
    """The fields that are not the default, and the budget."""
    default = CrushConfig().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if name == "budget" or value != default[name]}
    return ", ".join(f"{name}={value!r}" for name, value in changed.items())
