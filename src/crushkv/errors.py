"""Every error that crushkv raises on purpose derives from `CrushError`: one clear sentence, no surprises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CrushError(Exception):
    """Base class: catch this to catch whatever crushkv refuses."""


class ConfigError(CrushError, ValueError):
    """An argument or a field of the configuration has a value that is not accepted."""


class UnsupportedModelError(CrushError):
    """The model, or the way it is run, is one whose cache crushkv cannot compress."""


class ScoreError(CrushError, ValueError):
    """An importance policy returned scores that cannot be ranked (NaN, or a wrong shape)."""


class EmbeddedModelError(CrushError):
    """The embedded model cannot be prepared."""


def one_line(text: str, limit: int = 1000) -> str:
    """Text without line breaks, and no longer than `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


_LISTED = 100  # names at most
_COMPARED = 100  # characters at most: what is longer is nobody's misspelling, and takes long to compare


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` when a known name is close to `name`, and the list of what is known, unless it is long."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if len(name) <= _COMPARED else []
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return guess if len(known) > _LISTED else f"{guess} Known: {', '.join(known)}."
