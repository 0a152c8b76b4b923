"""Configurations to start from, chosen by measurement (docs/accuracy.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The better scored half of what is kept in 4 bits, the other in 2; sink and window in 8. A quarter has room for every
# token with only a third in 2.
_HALVES: Mapping[str, Any] = {
    "policy": "readahead",
    "bits": 4,
    "representative_bits": 2,
    "representative_share": 0.5,
    "grouping": "score",
    "recent_bits": 8,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "safe": {"policy": "readahead", "budget": 0.5, "bits": 8, "recent_bits": 8},
    "balanced": {"budget": 0.25, **_HALVES, "representative_share": 0.35},
    "small": {"budget": 0.125, **_HALVES},
}
"""Fields of `CrushConfig`; at most a half, a quarter and an eighth of the full cache's bytes."""
