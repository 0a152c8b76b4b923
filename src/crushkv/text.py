"""Values that users and clients give, bounded before they are parsed and quoted in short; sizes and times to read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from .errors import ConfigError

MOST_JSON = 100_000  # characters
_MOST_TEXT = 1_000  # characters of one value
_MOST_ITEMS = 1_000
_DEEPEST = 5
_QUOTED = 80


def quoted(value: object) -> str:
    """`repr(value)`, or its beginning where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"<an integer of {value.bit_length()} bits>"
    if isinstance(value, str) and len(value) > _QUOTED:
        return f"{value[:_QUOTED]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or holding an integer of thousands of digits
        return f"<a {type(value).__name__}>"
    return f"{text[:_QUOTED]}..." if len(text) > 2 * _QUOTED else text


def check_bounded(name: str, value: object, depth: int = 0) -> None:
    """Refuses what is too large to be worked on: long texts, integers of more than 63 bits, big or deep containers.

    Raises:
        ConfigError: with `name` and the beginning of the value.
    """
    if isinstance(value, str):
        if len(value) > _MOST_TEXT:
            raise ConfigError(f"{name}={quoted(value)}: accepted are texts of at most {_MOST_TEXT} characters")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ConfigError(f"{name}={quoted(value)}: accepted are integers below 2**63")
    elif isinstance(value, Collection):
        if len(value) > _MOST_ITEMS or depth == _DEEPEST:
            raise ConfigError(
                f"{name}={quoted(value)}: accepted are at most {_MOST_ITEMS} elements, nested at most {_DEEPEST} deep"
            )
        for item in value:
            check_bounded(name, item, depth + 1)
            if isinstance(value, Mapping):
                check_bounded(name, value[item], depth + 1)


def read_json(text: str, what: str) -> Any:
    """The value of a JSON text.

    Raises:
        ConfigError: it is no JSON, or longer than `MOST_JSON` characters.
    """
    if len(text) > MOST_JSON:
        raise ConfigError(f"{what}: JSON of {len(text)} characters; accepted are at most {MOST_JSON}")
    try:
        return json.loads(text)
    except RecursionError:
        raise ConfigError(f"{what} is no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # besides what is malformed, integers of thousands of digits
        raise ConfigError(f"{what} is no JSON: {error}") from None


def size(count: float | None) -> str:
    """Bytes for reading: `12.3 MiB`."""
    if count is None:
        return "not measured here"
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        amount /= 1024
    return f"{amount:.2f} GiB"


def seconds(time: float | None) -> str:
    """Seconds for reading: `1.25 s`, `40 ms`."""
    if time is None:
        return "-"
    return f"{time:.2f} s" if time >= 1 else f"{time * 1000:.0f} ms"


def release(version: str | None) -> tuple[int, ...]:
    """Major and minor number of a version; of none, one that is below all others."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "0")[:2])
