"""Every policy and way of selecting gives the tokens that the Transformers integration gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Reference, engine, random_prompts

SMALL: dict[str, Any] = {"budget": 0.3, "min_tokens": 0, "sink": 2, "window": 16, "interval": 16, "page_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "pages": {},
    "tokens": {"page_size": 1},
    "kvcrush": {"representative_share": 0.3},
    "kvcrush-tokens": {"representative_share": 0.3, "page_size": 1, "anchor": "alternating"},
    "kvcrush-random": {"representative_share": 0.3, "grouping": "random"},
    "h2o": {"policy": "h2o", "page_size": 1},
    "h2o-window": {"policy": "snapkv", "policy_options": {"kernel": 1}},
    "streaming_llm": {"policy": "streaming_llm"},
    "random": {"policy": "random"},
    "expected_attention": {"policy": "expected_attention", "policy_options": {"samples": 40}},
    "key_diff": {"policy": "key_diff"},
    "tokens-budget": {"budget": 100, "interval": 0},
    "bytes-budget": {"budget": "150KB"},  # 1.5 KB a token
    "short-interval": {"interval": 5},
}
PROMPTS = random_prompts([150, 300, 90, 40, 220, 260, 20, 180])


@pytest.mark.parametrize("name", CONFIGS)
def test_policy(small: Path, small_reference: Reference, name: str) -> None:
    config = {**SMALL, **CONFIGS[name]}
    with engine(small, config, skip_tokenizer_init=True, max_num_batched_tokens=128, enable_prefix_caching=True) as e:
        answers = e.generate(PROMPTS, 40, lambda e: e.check_blocks())
        assert e.crush.totals.compactions
        assert answers == small_reference.generate(config, PROMPTS, 40)
        e.check_empty()


def test_compiled(small: Path, small_reference: Reference) -> None:
    """`torch.compile` instead of eager."""
    options = {"enforce_eager": False, "max_num_batched_tokens": 128, "enable_prefix_caching": True}
    with engine(small, SMALL, skip_tokenizer_init=True, **options) as e:
        assert e.runner.compilation_config.mode.name != "NONE"
        assert e.generate(PROMPTS, 40, lambda e: e.check_blocks()) == small_reference.generate(SMALL, PROMPTS, 40)
        e.check_empty()
