"""Configurations as text: `snapkv:budget=0.25,representative_share=0.1`, `full`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .config import CrushConfig
from .errors import ConfigError, nearest
from .importance import check_loads, policies
from .presets import PRESETS
from .text import quoted, read_json

FULL = "full"
_LONGEST = 5_000  # characters
_MOST_ALTERNATIVES = 1_000
_FIELDS = frozenset(f.name for f in dataclasses.fields(CrushConfig))


def parse_config(text: str) -> CrushConfig | None:
    """A configuration from `POLICY[:FIELD=VALUE,...]`, `PRESET[:FIELD=VALUE,...]` or, with the default policy,
    `FIELD=VALUE,...`; None for `full`, the full cache.

    Fields are those of `CrushConfig`, and the policy's own options (`snapkv:kernel=5`).

    Raises:
        ConfigError: a name is unknown, or a value is not accepted; the message quotes the text.
    """
    _check_length(text)
    name, rest = split_name(text)
    if name == FULL and not rest:
        return None
    try:
        if name not in policies() and name not in PRESETS:
            check_loads(name)
            raise ConfigError(f"unknown policy or preset {name!r}.{nearest(name, [*policies(), *PRESETS, FULL])}")
        base = CrushConfig.preset(name).to_dict() if name in PRESETS else {"policy": name}
        options = [f.name for f in dataclasses.fields(policies()[base["policy"]])]
        values: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in rest.split(","))):
            field, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not value:
                raise ConfigError(f"{part!r}: accepted is FIELD=VALUE")
            if field == "policy":
                raise ConfigError(f"{part!r}: write the policy once, in front: {value}:FIELD=VALUE,...")
            if field in values or field in own:
                raise ConfigError(f"{field!r} is given twice")
            if field in _FIELDS:
                values[field] = read_field(field, value)
            elif field in options:
                own[field] = read_value(value)
            else:
                raise ConfigError(f"unknown field {field!r}.{nearest(field, [*_FIELDS, *options])}")
        if own:
            given = values.get("policy_options", base.get("policy_options", {}))
            if not isinstance(given, Mapping):
                raise ConfigError(f"policy_options={given}: name the options themselves, such as {next(iter(own))}=...")
            values["policy_options"] = {**given, **own}
        return CrushConfig.from_dict({**base, **values})
    except ConfigError as error:
        raise ConfigError(f"configuration {quoted(text)}: {error}") from None


def parse_configs(texts: Iterable[str]) -> dict[str, CrushConfig | None]:
    """The configurations that texts stand for, by their names: braces are expanded, and each name is there once.

    Raises:
        ConfigError: as `parse_config`.
    """
    return {name: parse_config(name) for text in texts for name in expand(text)}


def split_name(text: str) -> tuple[str, str]:
    """The policy or preset, and the fields behind its colon. Fields without a name are those of the default policy."""
    name, _, rest = text.strip().partition(":")
    return (CrushConfig().policy, text.strip()) if "=" in name else (name, rest)


def expand(text: str) -> list[str]:
    """Braces stand for each of their alternatives: `{h2o,snapkv}:budget={0.5,0.25}` is four configurations.

    Raises:
        ConfigError: the text stands for more than a thousand.
    """
    _check_length(text)
    pieces = re.split(r"\{([^{}]*)\}", text)
    choices = [[piece] if i % 2 == 0 else [c.strip() for c in piece.split(",")] for i, piece in enumerate(pieces)]
    if (count := math.prod(map(len, choices))) > _MOST_ALTERNATIVES:
        raise ConfigError(f"{quoted(text)}: {quoted(count)} configurations; accepted are {_MOST_ALTERNATIVES}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _check_length(text: str) -> None:
    if len(text) > _LONGEST:
        raise ConfigError(f"configuration {quoted(text)}: accepted are at most {_LONGEST} characters")


def read_field(name: str, text: str) -> Any:
    """The value of a `CrushConfig` field from text; `CrushConfig` checks it."""
    return _READ.get(name, read_value)(text)


def _number(text: str) -> int | float | str:
    """A number where it is one, so that the configuration's JSON form has numbers."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _optional_number(text: str) -> int | float | str | None:
    return None if text == "none" else _number(text)


def _flag(text: str) -> bool | str:
    return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text)


def read_value(text: str) -> Any:
    """A JSON value, or the text itself where it is none."""
    try:
        return read_json(text, "value")
    except ConfigError:
        return text


_READ: Mapping[str, Callable[[str], Any]] = {
    "budget": _number,
    "representative_share": _number,
    "bits": _number,
    "representative_bits": _optional_number,
    "rotation": _flag,
    "rank": _optional_number,
    "logit_limit": _optional_number,
}
