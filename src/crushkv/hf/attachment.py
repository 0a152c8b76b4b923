"""What is changed on a model while at least one session is on, and which session a call belongs to."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from ..errors import ConfigError, UnsupportedModelError
from .cache import CrushCache
from .interface import CACHE, CHUNKS_LATER_TURNS, cache_in, put_cache
from .support import check_generation, check_prompt

if TYPE_CHECKING:
    from .kvcrush import Session

USE_CACHE_OFF = (
    "use_cache is off, so that there is no cache to compress (set model.generation_config.use_cache = True, or pass "
    "use_cache=True)"
)
TRAINING = "the model is in training mode, which makes no cache: call model.eval()"

_attached: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
_attaching = threading.Lock()


def attach(session: Session, models: Sequence[nn.Module]) -> None:
    """Puts a session in force for calls of these models."""
    with _attaching:
        for model in models:
            if model not in _attached:
                _attached[model] = Attachment(model)
            attachment = _attached[model]
            attachment.sessions = (*attachment.sessions, session)


def detach(session: Session, models: Sequence[nn.Module]) -> None:
    """Takes it off again. With the last one the models are as they were."""
    with _attaching:
        for model in models:
            attachment = _attached[model]
            attachment.sessions = tuple(other for other in attachment.sessions if other is not session)
            if not attachment.sessions:
                attachment.remove()
                del _attached[model]


def is_attached(model: nn.Module) -> bool:
    """Whether some session is in force for calls of a model."""
    return model in _attached


class Attachment:
    """Two methods of generation, a third that is refused, and one hook.

    What was on the model before comes back when it is removed.
    """

    def __init__(self, model: Any) -> None:
        self.sessions: tuple[Session, ...] = ()  # in the order in which they were switched on
        self._model = weakref.ref(model)
        self._prepare = model._prepare_cache_for_generation
        self._prefill = model._prefill
        self._ours = {
            "_prepare_cache_for_generation": self.prepare_cache,
            "_prefill": self.prefill,
            "init_continuous_batching": self.refuse_batching,
        }
        self._before = {name: model.__dict__[name] for name in self._ours if name in model.__dict__}
        for name, method in self._ours.items():
            setattr(model, name, method)
        self._hook = model.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()
        model = self._model()
        if model is None:
            return
        for name, method in self._ours.items():
            # What somebody else has put in its place since stays: it may call ours, which then only passes on.
            if model.__dict__.get(name) == method:
                delattr(model, name)
                if name in self._before:
                    setattr(model, name, self._before[name])

    def session(self) -> Session | None:
        """The session that the present call belongs to.

        That is the last one whose block this call runs inside of, or that was enabled without one. A call from
        elsewhere, such as a thread that was started inside a block, belongs to the last block that is still running.
        A generator that stands at a `yield` is not running: the code that reads from it is outside of its block.
        """
        sessions = self.sessions
        if not sessions:
            return None
        stack = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            stack.add(id(frame))
            frame = frame.f_back
        for session in reversed(sessions):
            if session.scope is None or id(session.scope) in stack:
                return session
        return next((session for session in reversed(sessions) if not _suspended(session.scope)), None)

    def prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session = self.session()
        if session is not None:
            given = cache_in(model_kwargs)
            if generation_config.use_cache is False:
                if isinstance(given, CrushCache):
                    raise ConfigError(f"{CACHE}: a cache was passed, but {USE_CACHE_OFF}")
                session.notes.append(USE_CACHE_OFF)
            else:
                check_generation(generation_config, generation_mode)
                if given is None:
                    put_cache(model_kwargs, session.new_cache(self._model()))
                    return None
                session.use(given)
        return self._prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def prefill(self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        cache = cache_in(model_kwargs)
        if not isinstance(cache, CrushCache):
            return self._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        end = _sequence_length(input_ids, generation_config, model_kwargs)
        check_prompt(end, cache.model_config)
        _check_turn(input_ids, end, cache)
        cache.prefill_end = end
        if not CHUNKS_LATER_TURNS and cache.get_seq_length() and generation_config.prefill_chunk_size is not None:
            warnings.warn(
                f"crushkv: a later turn is read in one piece, because Transformers {transformers.__version__} reads "
                "the earlier ones once more where prefill_chunk_size is set",
                stacklevel=2,
            )
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        try:
            return self._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            cache.prefill_end = None

    def refuse_batching(self, *args: Any, **kwargs: Any) -> Any:
        if self.session() is None:
            model: Any = self._model()
            return type(model).init_continuous_batching(model, *args, **kwargs)
        raise UnsupportedModelError(
            "generate_batch (continuous batching) keeps a paged cache of its own, which KVCrush cannot compress: call "
            "generate, or leave the block"
        )

    def before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives calls of the model itself a cache, where Transformers would make one."""
        session = self.session()
        if session is None:
            return None
        if model.training:
            session.notes.append(TRAINING)
            return None
        cache = cache_in(kwargs)
        if cache is not None:
            session.use(cache)
        elif len(args) < 4 and _uses_cache(model, kwargs.get("use_cache")):
            put_cache(kwargs, session.new_cache(model))
            return args, kwargs
        else:
            session.notes.append(USE_CACHE_OFF)
        return None


def _sequence_length(input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> int:
    """Length of the whole sequence, whether its earlier part is passed again or not: the attention mask covers it."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[-1])
    # Transformers drops a mask without padding, and notes its length.
    noted = getattr(generation_config, "_mask_length", None)
    if noted is not None:
        return int(noted)
    embeds = model_kwargs.get("inputs_embeds")
    return int(input_ids.shape[-1] if embeds is None else embeds.shape[1])


def _check_turn(input_ids: Any, end: int, cache: CrushCache) -> None:
    """Refuses a further turn of nothing but new tokens whose mask covers only these."""
    seen = cache.get_seq_length()
    if seen and end <= seen:
        raise ConfigError(
            f"input_ids: they and their attention_mask have {end} tokens, and the cache has seen {seen} already. Pass "
            "the whole conversation (earlier tokens, answers and the new turn), or the new tokens with an "
            "attention_mask over the whole conversation"
        )


def _uses_cache(model: Any, asked: bool | None) -> bool:
    if asked is None:
        asked = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
    return bool(asked)


def scope_of(frame: FrameType | None) -> FrameType | None:
    """The frame whose code a `with` statement in `frame` encloses; None: whatever runs until the block is left.

    Generators that contextlib runs (`@contextmanager`) enclose the code of the one who entered them, and fixtures of
    pytest that of a test.
    """
    while frame is not None:
        caller = frame.f_back
        module = "" if caller is None else str(caller.f_globals.get("__name__"))
        if _is_generator(frame) and module.startswith("_pytest"):
            return None
        if frame.f_globals.get("__name__") == "contextlib" or (_is_generator(frame) and module == "contextlib"):
            frame = caller
            continue
        return frame
    return None


def _is_generator(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


def _suspended(scope: FrameType | None) -> bool:
    """Whether a frame is that of a generator that stands at a `yield`: nobody has called it."""
    return scope is not None and _is_generator(scope) and scope.f_back is None
