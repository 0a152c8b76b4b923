"""Logits with a crushed cache equal those of the full cache with the evicted entries masked per head."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from architectures import ARCHITECTURES, SMALL, prompts, small_model
from crushkv import CrushConfig
from crushkv.importance import policies
from model_zoo import build
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


# Each policy in each architecture, tokens and pages, whole and in pieces; all of these together in one architecture.
PREFILLS: list[tuple[int, int | None]] = [(1, None), (16, 33), (1, 33), (16, None)]
EVERY = [
    pytest.param(architecture, policy, page_size, chunk, id=f"{architecture}-{policy}-{page_size}-{chunk}")
    for architecture in ARCHITECTURES
    for policy in policies()
    for page_size, chunk in (PREFILLS if architecture == "llama" else PREFILLS[:2])
]


@pytest.mark.parametrize(("architecture", "policy", "page_size", "chunk"), EVERY)
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


# What an architecture has a say in: where its keys are centred, which channels turn, and by how much they differ.
BY_ARCHITECTURE = ["4", "4, equal widths", "2, not rotated", "keys as they are", "h2o", "4 and 1.5/2, recent in 8"]


@pytest.mark.parametrize(
    ("architecture", "tiers"),
    [("llama", tiers) for tiers in QUANTIZED]
    + [(other, tiers) for other in ("qwen2", "qwen3", "phi3", "gemma3") for tiers in BY_ARCHITECTURE],
)
def test_quantized_tiers(architecture: str, tiers: str) -> None:
    """Against rounding token by token, from the numbers that the model made: nothing is ever rounded twice."""
    config = CrushConfig(**{"page_size": 4, **CHURN, **QUANTIZED[tiers]})
    model = shared_model(architecture)
    recording = record(model, config, prompts([120, 77, 31]), max_new_tokens=20, prefill_chunk_size=50)
    expected = replay(model, recording)
    errors = torch.stack([(a - b).abs().amax(-1) for a, b in zip(recording.logits, expected, strict=True)])
    assert errors.median() < 10 * TOLERANCE  # over passes and rows
    assert errors.max() < BORDERLINE * max(float(logits.abs().max()) for logits in expected)
    assert any(layer.storage.blocked for layer in recording.cache.crushed_layers)


@pytest.mark.parametrize(
    "fields", [{"budget": 0.4}, {"budget": 1.0, "bits": 4}, {"budget": 0.2, "bits": "2.25/2"}], ids=str
)
def test_a_switch_of_long_rope_in_the_middle_of_a_text(fields: dict[str, Any]) -> None:
    """Beyond the original positions all new keys are turned otherwise.

    Those in the cache stay as they were turned, as in the full cache. Few bits hold the new ones less a mean that is
    turned in the old way, which is added again just so.
    """
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope | factors)).eval()
    config = CrushConfig(**{"page_size": 4, **CHURN, **fields})
    recording = record(model, config, prompts([120, 77, 31]), max_new_tokens=20)
    assert recording.cache.get_seq_length() > 128
    expected = replay(model, recording)
    errors = torch.stack([(a - b).abs().amax(-1) for a, b in zip(recording.logits, expected, strict=True)])
    assert errors.median() < 10 * TOLERANCE
    assert errors.max() < BORDERLINE * max(float(logits.abs().max()) for logits in expected)
    # The switch is there: keys turned with the factors of a long text from the start make other logits.
    with torch.no_grad():
        whole = model(recording.sequences, attention_mask=recording.inputs[-1]["attention_mask"].new_ones(3, 140))
    assert (whole.logits[0, -2] - expected[-1][0]).abs().max() > 100 * errors.max()


@pytest.mark.parametrize("policy", ["readahead", "h2o"])
def test_attention_sinks(policy: str) -> None:
    """gpt-oss: a logit of each head takes a part of the softmax, here the larger one."""
    model = build("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(15.0)
    config = CrushConfig(policy=policy, budget=0.4, page_size=4, **CHURN)
    check(model, config, [120, 77, 31])
    recording = record(model, config, prompts([100]), max_new_tokens=1)
    replay(model, recording)
    assert recording.weights[1].sum(-1).mean() < 0.9, "sinks take so little that leaving them out would pass"


def test_bfloat16() -> None:
    """Half precision: the same tokens are kept whichever kernel attends, and logits agree to its precision."""
    model = small_model("llama", dtype=torch.bfloat16)
    config = CrushConfig(budget=0.4, representative_share=0.1, page_size=4, **CHURN)
    recording = record(model, config, prompts([120, 77, 31]), max_new_tokens=20)
    assert recording.cache.layers[0].keys.dtype == torch.bfloat16
    for ours, theirs in zip(recording.logits, replay(model, recording), strict=True):
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
