"""Configurations to start from, chosen by measurement (docs/accuracy.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "safe": {"budget": 0.5, "bits": 8},
    "balanced": {
        "budget": 0.25,
        "bits": 4,
        "representative_bits": 2,
        "representative_share": 0.5,
        "grouping": "score",
    },
    "small": {"budget": 0.125, "bits": "3/2"},
}
"""Fields of `CrushConfig`; at most a half, a quarter and an eighth of the full cache's bytes."""
