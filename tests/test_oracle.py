"""Logits with a crushed cache equal those of the full cache with the evicted entries masked per head."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from architectures import ARCHITECTURES, prompts, small_model
from crushkv import CrushConfig
from crushkv.importance import policies
from oracle import record, replay

TOLERANCE = 1e-4
# Small enough that a short prompt and a few decoded tokens evict again and again.
CHURN: dict[str, Any] = {"min_tokens": 0, "sink": 2, "window": 8, "interval": 8}
shared_model = cache(small_model)


def check(model: Any, config: CrushConfig, lengths: list[int], **generation: Any) -> None:
    recording = record(model, config, prompts(lengths), max_new_tokens=20, **generation)
    expected = replay(model, recording)
    evictions = [
        step
        for step in range(1, len(recording.visible))
        if any(not seen.all() for seen in recording.visible[step].values())
    ]
    assert evictions, "nothing was evicted, so nothing was tested"
    for step, (ours, theirs) in enumerate(zip(recording.logits, expected, strict=True)):
        assert (ours - theirs).abs().max() < TOLERANCE, f"forward pass {step}"


@pytest.mark.parametrize("chunk", [None, 33], ids=["one-prefill", "chunked"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", policies())
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_policy_and_architecture(architecture: str, policy: str, page_size: int, chunk: int | None) -> None:
    """Padded batch, several decode steps, evictions while decoding."""
    config = CrushConfig(policy=policy, budget=0.4, page_size=page_size, representative_share=0.25, **CHURN)
    check(shared_model(architecture), config, [120, 77, 31], prefill_chunk_size=chunk)


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 48},
        {"budget": 48, "interval": 1},
        {"budget": "20KiB"},
        {"representative_share": 0.5, "anchor": "alternating"},
        {"aggregate": "max"},
        {"grouping": "random"},
        {"representative_share": 0.0},
        {"policy": "h2o", "interval": 3},
        {"policy": "h2o", "interval": 0},
        {"policy": "expected_attention", "interval": 3, "policy_options": {"samples": 7}},
    ],
    ids=str,
)
def test_other_configurations(fields: dict[str, Any]) -> None:
    config = CrushConfig(**{"budget": 0.4, "page_size": 4, "representative_share": 0.1, **CHURN, **fields})
    check(shared_model("llama"), config, [120, 77, 31])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_eager_attention(architecture: str) -> None:
    config = CrushConfig(budget=0.4, representative_share=0.1, **CHURN)
    check(shared_model(architecture, "eager"), config, [120, 77, 31], prefill_chunk_size=50)


def test_without_padding_no_mask_is_made() -> None:
    config = CrushConfig(budget=0.4, representative_share=0.1, **CHURN)
    check(shared_model("llama"), config, [120, 120])


QUANTIZED: dict[str, dict[str, Any]] = {
    "4": {"budget": 0.2, "bits": 4},
    "3, all tokens": {"budget": 1.0, "bits": 3},
    "2, not rotated": {"budget": 0.15, "bits": 2, "rotation": False},
    "8 and 2": {"budget": 0.2, "bits": 8, "representative_bits": 2, "representative_share": 0.5},
    "4/3 and 2, groups of 8": {
        "budget": 0.2,
        "bits": (4, 3),
        "representative_bits": 2,
        "representative_share": 0.3,
        "group_size": 8,
    },
    "keys as they are": {"budget": 0.3, "bits": (16, 4)},
    "h2o": {"policy": "h2o", "budget": 0.2, "bits": 4, "interval": 3},
    "tokens": {"budget": 50, "bits": 4, "page_size": 1, "interval": 1},
    "bytes": {"budget": "20KiB", "bits": 4},
    "recent tokens, too": {"budget": 0.2, "bits": 4, "recent_bits": 8, "interval": 3},
    "recent tokens as important ones": {
        "budget": 0.2,
        "bits": 4,
        "representative_bits": 2,
        "representative_share": 0.5,
        "recent_bits": 4,
        "page_size": 1,
    },
    "pyramid": {"policy": "pyramidkv", "budget": 0.2, "bits": 4},
}
QUANTIZED |= {
    f"{name}, equal widths": {**QUANTIZED[name], "key_widths": "equal"}
    for name in ("4", "2, not rotated", "8 and 2", "4/3 and 2, groups of 8", "recent tokens as important ones")
}
QUANTIZED |= {
    "2.25/2": {"budget": 0.2, "bits": "2.25/2"},
    "4 and 1.5/2, recent in 8": {
        "budget": 0.3,
        "bits": 4,
        "representative_bits": "1.5/2",
        "representative_share": 0.5,
        "grouping": "score",
        "recent_bits": 8,
        "interval": 3,
    },
}
# Two runs make a number that lies on the border of two cells fall into one or the other: one channel of one token is
# then off by a cell, in one row, for as long as the token is held.
BORDERLINE = 0.02


@pytest.mark.parametrize("fields", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "gemma3"])
def test_quantized_tiers(architecture: str, fields: dict[str, Any]) -> None:
    """Against rounding token by token, from the numbers that the model made: nothing is ever rounded twice."""
    config = CrushConfig(**{"page_size": 4, **CHURN, **fields})
    model = shared_model(architecture)
    recording = record(model, config, prompts([120, 77, 31]), max_new_tokens=20, prefill_chunk_size=50)
    expected = replay(model, recording)
    errors = torch.stack([(a - b).abs().amax(-1) for a, b in zip(recording.logits, expected, strict=True)])
    assert errors.median() < 10 * TOLERANCE  # over passes and rows
    assert errors.max() < BORDERLINE * max(float(logits.abs().max()) for logits in expected)
    assert any(layer.storage.blocked for layer in recording.cache.crushed_layers)


def test_bfloat16() -> None:
    """Half precision: the same tokens are kept whichever kernel attends, and logits agree to its precision."""
    model = small_model("llama", dtype=torch.bfloat16)
    config = CrushConfig(budget=0.4, representative_share=0.1, page_size=4, **CHURN)
    recording = record(model, config, prompts([120, 77, 31]), max_new_tokens=20)
    assert recording.cache.layers[0].keys.dtype == torch.bfloat16
    for ours, theirs in zip(recording.logits, replay(model, recording), strict=True):
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
