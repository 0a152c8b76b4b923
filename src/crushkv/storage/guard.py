"""What the widths of key channels do to the attention logits, measured before they are used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .basis import Basis
from .buffers import take
from .channels import ChannelFormat, ChannelTensor, quantize
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


def logit_error(
    keys: Tensor, positions: Tensor, sample: Tensor, basis: Basis, form: ChannelFormat, last: LastQueries
) -> float:
    """Root mean square of the error that a format makes in the logits of the last queries, in nats.

    Args:
        keys: `[B, Hkv, P, D]` at `positions`, broadcast against `[B, Hkv, P]`.
        sample: int64 `[N]`, the tokens that are looked at.
    """
    assert basis.spread is not None
    if not len(sample):
        return 0.0
    keys = take(keys, sample.expand(*keys.shape[:2], -1))
    numbers = basis.coordinates(keys, positions[..., sample])
    found = torch.empty_like(numbers)
    ChannelTensor.of(quantize(numbers, basis.spread, form), form).write(basis.spread, found)
    rows, heads, _, size = keys.shape
    queries = last.queries.float().reshape(rows, heads, -1, size) * last.scaling
    error = queries @ (found - numbers).transpose(-1, -2)
    return float(error.square().mean().sqrt())


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
