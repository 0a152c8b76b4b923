"""The OpenAI-compatible server, with the engine in a process of its own."""

from __future__ import annotations

import random
import re
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import Reference, document_prompts, random_prompts
from servers import Server, server
from test_parity import CONFIG, LENGTHS, NEW

from crushkv.vllm.metrics import DESCRIPTIONS

SOAK = {"budget": 0.3, "min_tokens": 0, "sink": 2, "window": 16, "interval": 16, "page_size": 8}


def test_tokens(smollm: Path, smollm_reference: Reference) -> None:
    """The embedded model's tokens are those of the Transformers integration, and the metrics tell what was done."""
    prompts = document_prompts(smollm, LENGTHS, shared=128)
    with server(smollm, CONFIG) as running:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: running.complete(prompt, NEW), prompts))
        assert answers == smollm_reference.generate(CONFIG, prompts, NEW)
        assert running.complete(prompts[0], NEW) == answers[0], "out of the prefix cache"
        compactions = running.metric("crushkv:compactions_total")
        assert compactions > len(prompts)
        assert running.metric("crushkv:tokens_dropped_total") > 0.5 * sum(LENGTHS)
        assert running.metric("crushkv:blocks_freed_total") > 0.4 * sum(LENGTHS) / 32
        assert running.metric("crushkv:microseconds_total") > 1000
        assert running.metric("vllm:kv_cache_usage_perc") == 0
        # A request may switch it off, and is told where it asks for what there is not.
        off = running.complete(prompts[1], NEW, vllm_xargs={"crushkv": "off"})
        assert running.metric("crushkv:compactions_total") >= compactions
        assert off == smollm_reference.generate({"budget": 1.0}, [prompts[1]], NEW)[0]


def test_operator_and_clients(small_with_text: Path) -> None:
    """What the log and the metrics say, with two API servers, and what is answered to a bad request."""
    prompts = random_prompts([200] * 12)
    with server(small_with_text, SOAK, api_server_count=2) as running:
        # From the start on there is a line in vLLM's log, and every metric, with the model's name.
        (line,) = [line for line in running.log().splitlines() if "crushkv" in line and "is on" in line]
        assert re.search(r"INFO \d\d-\d\d \d\d:\d\d:\d\d \[.*\] crushkv \S+ is on: budget=0.3, min_tokens=0", line)
        for name in DESCRIPTIONS:
            assert re.search(
                rf'^crushkv:{name}_total{{engine="0",model_name="model"}} 0', running.get("/metrics"), re.M
            )
        for prompt in prompts:
            running.complete(prompt, 1)
        time.sleep(2)  # the last statistics are on their way
        assert running.metric("vllm:request_success_total") == len(prompts)
        assert running.metric("crushkv:compactions_total") == len(prompts), "whoever took them"
        assert running.metric("crushkv:tokens_dropped_total") == len(prompts) * 144  # 56 of 60 fill pages
        for bad in ("of", "1e1000000000", "9" * 5000, 2**63, "1B", 1.5, -1, ["0.5"]):
            start = time.monotonic()
            told = running.refused("/v1/completions", {"prompt": [5, 6], "vllm_xargs": {"crushkv": bad}})
            assert "vllm_xargs" in told and "crushkv" in told
            assert time.monotonic() - start < 20, "on a busy machine"
        running.refused("/v1/completions", {"prompt": [5, 6], "vllm_xargs": {"crushkv": 10**4000}})  # by vLLM itself
        chat = {"messages": [{"role": "user", "content": "Hi!"}], "vllm_xargs": {"CrushKV": "off"}}
        assert "Did you mean 'crushkv'" in running.refused("/v1/chat/completions", chat)
        assert running.complete(prompts[0], 3) == running.complete(prompts[0], 3)


@pytest.fixture(scope="module")
def soaked(small_with_text: Path) -> Iterator[Server]:
    with server(small_with_text, SOAK, num_gpu_blocks_override=60, max_num_batched_tokens=256) as running:
        yield running


def complete_or_abort(running: Server, prompt: list[int], new: int, seconds: float | None) -> int | None:
    """How many tokens an answer has, or None where the client goes away after some seconds."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 1, "ignore_eos": True}
    try:
        answer = running.post("/v1/completions", body, timeout=300 if seconds is None else seconds)
    except (TimeoutError, urllib.error.URLError) as error:
        if seconds is None:
            raise AssertionError("the request was not aborted, and has no answer") from error
        return None
    return int(answer["usage"]["completion_tokens"])


def test_soak(soaked: Server) -> None:
    """200 requests of mixed lengths, 16 at once, some aborted at random moments, in a pool for two long ones.

    Three times: vLLM's own memory grows at first (from its start by 93, 43 and 27 MiB here, without crushkv), and then
    it does not. With long answers that are aborted, it grew by 116, 66 and 42 MiB.
    """
    memory = [soaked.memory()]
    for seed in range(3):
        draw = random.Random(seed)
        prompts = random_prompts([draw.randint(20, 900) for _ in range(200)], seed)
        patience = [draw.uniform(0.02, 0.7) if draw.random() < 0.25 else None for _ in prompts]
        # Whoever goes away has asked for more than a fast machine makes until then.
        asked_for = zip(prompts, patience, strict=True)
        new = [draw.randint(1, 80) if seconds is None else 1000 - len(prompt) for prompt, seconds in asked_for]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda *job: complete_or_abort(soaked, *job), prompts, new, patience))
        # Counted, not read: one token of a random model may have no text (a control token, a part of a letter).
        for seconds, asked, answer in zip(patience, new, answers, strict=True):
            assert answer == asked or (answer is None and seconds is not None), "an unaborted request ends complete"
        assert sum(answer is None for answer in answers) >= 5, "some were aborted"
        memory.append(soaked.memory())
    deadline = time.monotonic() + 30
    while soaked.metric("vllm:kv_cache_usage_perc") or soaked.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "blocks are lost"
        time.sleep(0.5)
    assert memory[3] - memory[2] < 64 * 2**20, f"resident memory grows: {[m >> 20 for m in memory]} MiB"
    assert soaked.metric("crushkv:compactions_total") > 300
