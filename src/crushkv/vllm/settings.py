"""Where the configuration comes from: vLLM's `additional_config`, the environment, a request's `extra_args`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import CrushConfig
from ..core import Clock, Shares
from ..errors import ConfigError
from ..text import quoted
from .schedule import EvictionSchedule

KEY = "crushkv"
VARIABLE = "CRUSHKV_VLLM"
REQUEST_SOURCE = f"extra_args[{KEY!r}]"  # what a server's clients send as `vllm_xargs`
_ON = ("on", "true", "1")
_OFF = ("off", "false", "0")
_FIELDS = frozenset(f.name for f in dataclasses.fields(CrushConfig))


def engine_config(additional_config: Any) -> CrushConfig | None:
    """The configuration of one engine, None where KVCrush is not asked for.

    `additional_config["crushkv"]` (fields of `CrushConfig`; `true` or `{}` for the defaults, `false` for off) comes
    before the environment variable `CRUSHKV_VLLM` (the same as JSON, or 1 and 0).

    Raises:
        ConfigError: a field is unknown or has a value that is not accepted, or the key is misspelt.
    """
    given = None
    if isinstance(additional_config, Mapping):
        given = additional_config.get(KEY)
        _check_keys(additional_config, "additional_config")
        if additional_config and _FIELDS.issuperset(additional_config):
            raise ConfigError(
                f"additional_config={quoted(dict(additional_config))}: these are fields of crushkv's configuration; "
                f"put them under the key {KEY!r}: {{{KEY!r}: {{...}}}}"
            )
    if given is not None:
        return _parse(given, f"additional_config[{KEY!r}]")
    text = os.environ.get(VARIABLE, "").strip()
    if not text or text.lower() in _OFF:
        return None
    if text.lower() in _ON:
        return CrushConfig()
    try:
        return CrushConfig.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"environment variable {VARIABLE}: {error}") from None


def _check_keys(keys: Iterable[Any], where: str) -> None:
    """Refuses a misspelt `crushkv`, which nobody would read."""
    for key in keys:
        if isinstance(key, str) and key != KEY and len(key) <= 20:
            plain = "".join(filter(str.isalnum, key.lower()))
            if plain == "kvcrush" or difflib.SequenceMatcher(None, plain, KEY).ratio() > 0.85:
                raise ConfigError(f"{where}: unknown key {key!r}. Did you mean {KEY!r}?")


def _parse(given: Any, source: str) -> CrushConfig | None:
    if isinstance(given, bool):
        return CrushConfig() if given else None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}={quoted(given)}: accepted are an object of CrushConfig's fields, true or false")
    try:
        return CrushConfig.from_dict(given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def check_budget(config: CrushConfig, bytes_per_token: int) -> None:
    """Refuses a budget in bytes that has no room for sink and window, as `CrushConfig` does one in tokens.

    Raises:
        ConfigError: names the budget, and what it would have to be.
    """
    budget = config.parsed_budget
    least = (config.sink + config.window) * bytes_per_token
    if budget.kind == "bytes" and budget.amount < least:
        raise ConfigError(
            f"budget={config.budget!r} is smaller than the {least} bytes of sink + window = {config.sink} + "
            f"{config.window} tokens, which are always kept: raise the budget, or lower sink or window"
        )


def request_config(
    config: CrushConfig,
    extra_args: Mapping[str, Any] | None,
    bytes_per_token: int = 0,
    source: str = REQUEST_SOURCE,
) -> CrushConfig | None:
    """What `SamplingParams.extra_args["crushkv"]` asks for: the engine's configuration, perhaps with another budget.

    `"off"` (or false, 0) leaves the request's cache alone, which is None here; `"on"` (or true, 1) is the default.
    Everything else is a budget of its own, which can only lower the engine's: the smaller one holds at each eviction.

    Args:
        bytes_per_token: keys and values of one token in all layers; 0 leaves a budget in bytes unchecked.
        source: what an error calls it.

    Raises:
        ConfigError: the value is none of these.
    """
    _check_keys(extra_args or {}, source.replace(f"[{KEY!r}]", ""))
    given = (extra_args or {}).get(KEY, "on")
    word = given.strip().lower() if isinstance(given, str) and len(given) < 10 else given
    if word in _ON or word is True or (isinstance(word, int) and word == 1):
        return config
    if word in _OFF or word is False or (isinstance(word, int) and word == 0):
        return None
    try:
        asked = config.replace(budget=given)
        check_budget(asked, bytes_per_token)
    except ConfigError as error:
        raise ConfigError(f"{source}: accepted are 'on', 'off' or a budget; {error}") from None
    return asked


def _accepted(config: CrushConfig, extra_args: Mapping[str, Any] | None) -> CrushConfig | None:
    """What a request asks for, which was checked when it came in. Of one that came another way, what is not accepted
    counts as "off"."""
    try:
        return request_config(config, extra_args)
    except ConfigError:
        return None


def request_clock(config: CrushConfig, prompt: int, extra_args: Mapping[str, Any] | None) -> Clock | None:
    """When a request with a prompt of so many tokens is compacted; None for one that is left alone."""
    return None if _accepted(config, extra_args) is None else Clock(config.interval, prompt)


def request_schedule(
    config: CrushConfig,
    prompt: int,
    extra_args: Mapping[str, Any] | None,
    bytes_per_token: int,
    block_size: int = 1,
) -> EvictionSchedule | None:
    """When and how far a request is compacted; None for one that is left alone."""
    asked = _accepted(config, extra_args)
    if asked is None:
        return None
    shares = tuple(Shares(each, layers=1) for each in (config, asked))  # all layers keep as many
    return EvictionSchedule(config, prompt, shares, bytes_per_token, block_size)
