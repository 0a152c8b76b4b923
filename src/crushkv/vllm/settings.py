"""Where the configuration comes from: vLLM's `additional_config`, the environment, a request's `extra_args`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..config import CrushConfig
from ..core import Budget
from ..errors import ConfigError
from .schedule import EvictionSchedule

KEY = "crushkv"
VARIABLE = "CRUSHKV_VLLM"


def engine_config(additional_config: Any) -> CrushConfig | None:
    """The configuration of one engine, None where KVCrush is not asked for.

    `additional_config["crushkv"]` (fields of `CrushConfig`; `true` or `{}` for the defaults, `false` for off) comes
    before the environment variable `CRUSHKV_VLLM` (the same as JSON).

    Raises:
        ConfigError: a field is unknown or has a value that is not accepted.
    """
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is not None:
        return _parse(given, f"additional_config[{KEY!r}]")
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if text in ("0", "1"):
        return CrushConfig() if text == "1" else None
    try:
        return CrushConfig.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"environment variable {VARIABLE}: {error}") from None


def _parse(given: Any, source: str) -> CrushConfig | None:
    if isinstance(given, bool):
        return CrushConfig() if given else None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}={given!r}: accepted are an object of CrushConfig's fields, true or false")
    try:
        return CrushConfig.from_dict(given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def request_budget(config: CrushConfig, extra_args: Mapping[str, Any] | None) -> Budget | None:
    """What `SamplingParams.extra_args["crushkv"]` asks for: a budget, or None for "off".

    `"off"` (or false, 0) leaves the request's cache alone, `"on"` (or true, 1) is the default. Everything else is a
    budget of its own, which can only lower the engine's: the smaller one holds at each eviction.

    Raises:
        ConfigError: the value is none of these.
    """
    given = (extra_args or {}).get(KEY, "on")
    if given in ("on", 1):
        return config.parsed_budget
    if given in ("off", 0):
        return None
    try:
        return config.replace(budget=given).parsed_budget
    except ConfigError as error:
        raise ConfigError(f"extra_args[{KEY!r}]: accepted are 'on', 'off' or a budget; {error}") from None


def request_schedule(
    config: CrushConfig, prompt: int, extra_args: Mapping[str, Any] | None, bytes_per_token: int
) -> EvictionSchedule | None:
    """When and how far a request is compacted; None for one that is left alone.

    Raises:
        ConfigError: see `request_budget`.
    """
    budget = request_budget(config, extra_args)
    if budget is None:
        return None
    return EvictionSchedule(config, prompt, (config.parsed_budget, budget), bytes_per_token)
