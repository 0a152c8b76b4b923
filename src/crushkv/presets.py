"""Configurations to start from, chosen by measurement on two models (docs/accuracy.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "safe": {"policy": "readahead", "budget": 0.5, "bits": 8, "recent_bits": 8},
    # A quarter has room for every token of a prompt of about a thousand tokens and more.
    "balanced": {"policy": "readahead", "budget": 0.25, "bits": "4.25/3", "recent_bits": 8},
    # About a sixth of the tokens is evicted. In 8 bits, sink and window would take bytes that serve more tokens in few.
    "small": {"policy": "readahead", "budget": 0.125, "bits": "2.25/2", "recent_bits": 4},
}
"""Fields of `CrushConfig`; at most a half, a quarter and an eighth of the full cache's bytes."""
