"""A budget as the user gives it: a fraction, a number of tokens, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from .errors import ConfigError
from .text import quoted

if TYPE_CHECKING:
    from torch import Tensor

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BYTES = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([KMG]i?B|B)", re.IGNORECASE)
_TOKENS = re.compile(r"-?[0-9]{1,30}")
# Powers of ten are worked out in full: without a bound, a text of a few characters takes hours.
_FRACTION = re.compile(
    r"(?:[0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})(?:e[+-]?[0-9]{1,3})?|[0-9]{1,30}/[0-9]{1,30}", re.IGNORECASE
)
_LONGEST = 100  # characters
_FINEST = 10**9  # denominator: with it, the tokens of a budget are exact in 64 bits
_MOST = 2**62  # tokens or bytes
_ACCEPTED = (
    "accepted are a fraction of the tokens seen (a float above 0 and up to 1, or a string such as '25%'), "
    "a number of tokens (an int of at least 1), or bytes for one sequence (a string such as '64MiB')"
)


@dataclass(frozen=True)
class Budget:
    """What one sequence may keep.

    `fraction`: of the tokens seen so far, in each layer. `tokens`: in each layer. `bytes`: keys and values of
    all compressed layers together. The amount is exact, so that no float decides how a budget is rounded.
    """

    kind: Literal["fraction", "tokens", "bytes"]
    amount: Fraction

    @classmethod
    def parse(cls, value: float | int | str) -> Budget:
        """Reads `0.25`, `"0.25"`, `"25%"` (fraction), `1024`, `"1024"` (tokens) or `"64MiB"` (bytes).

        Raises:
            ConfigError: the value is none of these, or outside its limits.
        """
        budget = cls._read(value)
        if budget is None:
            raise ConfigError(f"budget={quoted(value)}: {_ACCEPTED}")
        return budget

    @classmethod
    def _read(cls, value: object) -> Budget | None:
        if isinstance(value, float):
            # repr, so that 0.29 of 100 tokens is 29 and not 28
            return cls._fraction(Fraction(repr(value))) if 0 < value <= 1 else None
        if isinstance(value, int) and not isinstance(value, bool):
            return cls._count("tokens", Fraction(value))
        if isinstance(value, str) and len(value) <= _LONGEST:
            return cls._from_text(value.strip())
        return None

    @classmethod
    def _from_text(cls, text: str) -> Budget | None:
        if match := _BYTES.fullmatch(text):
            return cls._count("bytes", Fraction(match[1]) * _UNITS[match[2].upper()])
        if _TOKENS.fullmatch(text):
            return cls._count("tokens", Fraction(text))
        number, percent = (text[:-1].rstrip(), 100) if text.endswith("%") else (text, 1)
        if not _FRACTION.fullmatch(number):
            return None
        try:
            return cls._fraction(Fraction(number) / percent)
        except ZeroDivisionError:
            return None

    @classmethod
    def _fraction(cls, value: Fraction) -> Budget | None:
        if not 0 < value <= 1:
            return None
        return cls("fraction", max(value.limit_denominator(_FINEST), Fraction(1, _FINEST)))

    @classmethod
    def _count(cls, kind: Literal["tokens", "bytes"], value: Fraction) -> Budget | None:
        return cls(kind, value) if 1 <= value < _MOST else None

    def tokens(self, seen: Tensor, bytes_per_token: int) -> Tensor:
        """Tokens per layer for rows that have seen `seen` tokens (`[B]`, integers); never more than seen.

        `bytes_per_token`: keys and values of one token in all compressed layers together.
        """
        if self.kind == "fraction":
            return seen * self.amount.numerator // self.amount.denominator
        limit = int(self.amount) if self.kind == "tokens" else int(self.amount // bytes_per_token)
        return seen.clamp(max=limit)
