"""The tokens of the embedded model are those of the Transformers integration, however vLLM gets there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, Reference, document_prompts, engine

# Evicts at the end of each prompt and once while decoding.
CONFIG: dict[str, Any] = {"interval": 64, "min_tokens": 0}
LENGTHS = [500, 420, 160, 233, 512, 150, 340, 177]
NEW = 70
TIGHT: dict[str, Any] = {"num_gpu_blocks_override": 20, "max_model_len": 608, "max_num_batched_tokens": 300}
WAYS: dict[str, dict[str, Any]] = {
    "one prefill": {},
    "chunked prefill": {"max_num_batched_tokens": 100},
    "prefix caching": {"enable_prefix_caching": True},
    "small pool": TIGHT,
    "small pool, prefix caching": {**TIGHT, "enable_prefix_caching": True},
}


@pytest.fixture(scope="module")
def prompts(smollm: Path) -> list[list[int]]:
    return document_prompts(smollm, LENGTHS, shared=128)


@pytest.fixture(scope="module")
def expected(smollm_reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return smollm_reference.generate(CONFIG, prompts, NEW)


@pytest.fixture(scope="module", params=WAYS)
def running(request: pytest.FixtureRequest, smollm: Path) -> Iterator[tuple[str, Engine]]:
    with engine(smollm, CONFIG, **WAYS[request.param]) as made:
        yield request.param, made


def test_tokens(running: tuple[str, Engine], prompts: list[list[int]], expected: list[list[int]]) -> None:
    way, e = running
    most = 0

    def after_step(e: Engine) -> None:
        nonlocal most
        e.check_blocks()
        most = max(most, len(e.scheduler.running))

    assert e.generate(prompts, NEW, after_step) == expected
    assert e.crush.totals.compactions > len(prompts)
    if way.startswith("small pool"):
        assert most < len(prompts), "requests have to queue"
        assert e.preempted, "some have to start anew"
    e.check_empty()


def test_again_with_hits(running: tuple[str, Engine], prompts: list[list[int]], expected: list[list[int]]) -> None:
    """The same prompts once more: what a prefix cache then holds is what was written before eviction."""
    way, e = running
    if "prefix caching" not in way:
        pytest.skip("prefix caching is off")
    e.hits.clear()
    assert e.generate(prompts, NEW) == expected
    if way == "prefix caching":
        assert sum(e.hits.values()) > 0.75 * sum(LENGTHS)
    e.check_empty()
