"""What the widths of key channels do to the attention logits, measured before they are used."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..later import Later
from .basis import Basis
from .buffers import Pick
from .channels import ChannelFormat, quantize
from .formats import Formats
from .widths import WIDEST

_SAMPLE = 256  # tokens that are looked at


@dataclass(frozen=True)
class LastQueries:
    """The queries at the end of what was read, and how far from the truth their logits may be.

    Attributes:
        queries: `[B, Hq, T, D]`.
        scaling: of the logits.
        limit: of the root mean square of the logits' error, in nats.
        sink: tokens at the beginning that do not count, since they are held in a format of their own.
    """

    queries: Tensor
    scaling: float
    limit: float
    sink: int = 0


def sample_tokens(tokens: int, real: Tensor | None, sink: int, device: torch.device) -> Tensor:
    """A few hundred tokens, evenly spaced, that are no padding in any row: int64 `[N]`, maybe none."""
    counted = torch.arange(tokens, device=device) if real is None else real.all(0).nonzero()[:, 0]
    counted = counted[sink:]
    return counted[:: max(1, -(-len(counted) // _SAMPLE))]


class LogitGuard:
    """The error that formats of the keys make in the logits of the last queries.

    Args:
        numbers: float32 `[B, Hkv, N, D]`, keys of a few tokens less their centre.
        spread: as in `channels.quantize`.
    """

    def __init__(self, numbers: Tensor, spread: Tensor, last: LastQueries) -> None:
        rows, heads, _, size = numbers.shape
        self.limit = last.limit
        self._numbers, self._spread = numbers, spread
        self._queries = last.queries.float().reshape(rows, heads, -1, size) * last.scaling

    @classmethod
    def of(
        cls, keys: Tensor, positions: Tensor, real: Tensor | None, basis: Basis, last: LastQueries
    ) -> LogitGuard | None:
        """For keys `[B, Hkv, P, D]` at `positions`, broadcast against `[B, Hkv, P]`; None: there is nothing to see."""
        assert basis.spread is not None
        sample = sample_tokens(keys.shape[2], real, last.sink, keys.device)
        if not len(sample):
            return None
        places = sample.expand(*keys.shape[:2], -1)
        return cls(basis.taken(keys, places, positions[..., sample].expand_as(places)), basis.spread, last)

    def parted(self, pick: Pick) -> LogitGuard:
        """The same for some heads."""
        part = copy(self)
        part._numbers, part._spread, part._queries = (pick(x, 1) for x in (self._numbers, self._spread, self._queries))
        return part

    def squared_error(self, form: ChannelFormat) -> Later:
        """Its mean square with a format, of each KV head: `[Hkv]`, in squares of nats."""
        found = quantize(self._numbers, self._spread, form).numbers(self._spread, form)
        error = self._queries @ (found - self._numbers).transpose(-1, -2)
        return Later(error.square().mean((0, 2, 3)))

    def allows(self, squared_error: Tensor) -> bool:
        """Whether the error of heads, `[Hkv]` as above, is small enough for all of them together."""
        return bool(squared_error.mean().sqrt() <= self.limit)


def widened(formats: Formats, bits: int) -> Formats:
    """The formats with so many bits more for the keys whose channels have widths of their own."""

    def more(pair: tuple[float, int]) -> tuple[float, int]:
        keys, values = pair
        return (min(keys + bits, WIDEST) if formats.key_channels(keys) else keys, values)

    return replace(
        formats,
        important=more(formats.important),
        representative=more(formats.representative),
        recent=more(formats.recent),
    )
