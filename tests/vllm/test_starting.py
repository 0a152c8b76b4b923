"""What an engine says when it starts, and its metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from engines import engine, random_prompts
from prometheus_client import REGISTRY

LABELS = {"engine": "0"}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the scheduler writes; vLLM sets the handlers of its own loggers anew with each engine."""
    logger = logging.getLogger("crushkv-in-a-test")
    logger.setLevel(logging.INFO)
    monkeypatch.setattr("crushkv.vllm.scheduler.logger", logger)
    return caplog


def said(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "crushkv-in-a-test"]


def test_one_line_says_that_it_is_on(small: Path, log: pytest.LogCaptureFixture) -> None:
    with engine(small, {"budget": "12.5%"}, skip_tokenizer_init=True):
        (line,) = said(log)
        assert line.startswith("crushkv ") and "is on: budget=12.5%, min_tokens=512, policy=readahead" in line
    log.clear()
    with engine(small, None, skip_tokenizer_init=True):
        assert not said(log)


@pytest.mark.parametrize("crush", [{"budget": 1.0}, {"min_tokens": 5000}])
def test_an_engine_that_never_compresses_says_so(
    small: Path, log: pytest.LogCaptureFixture, crush: dict[str, Any]
) -> None:
    with engine(small, crush, skip_tokenizer_init=True):
        assert "is on" in said(log)[0] and "nothing will be compressed" in said(log)[1]


def test_metrics_of_a_second_engine(small: Path) -> None:
    """In one process, one after the other: those of the first are gone, as vLLM's are."""
    config = {"budget": 0.3, "min_tokens": 0, "sink": 2, "window": 16}

    def metric(name: str) -> float | None:
        return REGISTRY.get_sample_value(f"crushkv:{name}_total", {**LABELS, "model_name": str(small)})

    for _ in range(2):
        with engine(small, config, skip_tokenizer_init=True, disable_log_stats=False) as e:
            assert metric("compactions") == metric("microseconds") == 0
            e.generate(random_prompts([200, 300]), 4)
            assert metric("compactions") == 2
            assert metric("blocks_freed") == e.scheduler.counters.blocks_freed
            assert metric("tokens_dropped") == e.scheduler.counters.tokens_dropped > 300
            assert metric("microseconds") > 0
    with engine(small, None, skip_tokenizer_init=True, disable_log_stats=False):
        assert metric("compactions") is None
