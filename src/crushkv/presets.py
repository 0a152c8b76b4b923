"""Configurations to start from, chosen by measurement on two models (docs/accuracy.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "safe": {"policy": "readahead", "budget": 0.5, "bits": 8, "recent_bits": 8},
    # A quarter has room for every token of a prompt of about a thousand tokens and more.
    "balanced": {"policy": "readahead", "budget": 0.25, "bits": "4.25/3", "recent_bits": 8},
    # The better half of what is kept in more bits, the next best half in few; about a third of the tokens is evicted.
    "small": {
        "policy": "readahead",
        "budget": 0.125,
        "bits": "4/3",
        "representative_bits": 2,
        "representative_share": 0.5,
        "grouping": "score",
        "recent_bits": 8,
        "heads": "profile",
    },
    # So few bytes serve more tokens in one narrow format better, sink and window included.
    "tiny": {"policy": "readahead", "budget": 0.0625, "bits": "2.25/2", "recent_bits": 4, "heads": "profile"},
}
"""Fields of `CrushConfig`; at most a half, a quarter, an eighth and a sixteenth of the full cache's bytes."""
