"""`crushkv run` on the real model: what `make run` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv import KVCrush
from crushkv.cli.run import FULL, PUBLISHED
from crushkv.demo import load_questions
from crushkv.embedded import embedded_model_path

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The main job with one question, as a user runs it."""
    command = [sys.executable, "-m", "crushkv", "run", "--questions", "1", "--json"]
    # glibc gives every freed block back at once: the peak is what was needed, whatever its reserve would have kept.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_answers(result: dict[str, Any]) -> None:
    """The full cache answers the question, and so does the preset, in a quarter of it."""
    assert list(result["summary"]) == [FULL, "balanced", PUBLISHED]
    for name in (FULL, "balanced"):
        assert result["summary"][name]["correct"] == 1, result["questions"]


def test_the_bytes_are_a_quarter(result: dict[str, Any]) -> None:
    for question in result["questions"]:
        full = question["runs"][FULL]
        assert full["prompt_tokens"] >= 6000
        per_token = 30 * 2 * 3 * 64 * 2  # layers, keys and values, KV heads, head size, 16 bits
        assert full["kv_bytes"] == full["tokens_seen"] * per_token
        for name in ("balanced", PUBLISHED):
            run = question["runs"][name]
            # A quarter of the prompt, and the tokens of the answer.
            assert run["kv_bytes"] <= (full["prompt_tokens"] / 4 + run["new_tokens"]) * per_token
            assert run["full_kv_bytes"] == run["tokens_seen"] * per_token
            assert sum(run["tiers"].values()) == pytest.approx(run["tokens_held"], abs=0.01)
        assert question["runs"]["balanced"]["tokens_held"] > 0.9 * full["prompt_tokens"]
        assert min(question["runs"][PUBLISHED]["tiers"].values()) > 0


@pytest.mark.parametrize("name", ["balanced", PUBLISHED])
def test_the_peak_is_lower(result: dict[str, Any], name: str) -> None:
    if result["summary"][FULL]["peak_memory_bytes"] is None:
        pytest.skip("this platform does not tell peak memory")
    for question in result["questions"]:
        full, crushed = (question["runs"][kind] for kind in (FULL, name))
        saved = full["peak_above_start_bytes"] - crushed["peak_above_start_bytes"]
        assert saved > 0.8 * (full["memory_bytes"] - crushed["memory_bytes"])


def test_the_embedded_model_is_the_same_in_pieces_and_compressed_twice() -> None:
    """Chunked prefill, and a second run in the same block, on the real model."""
    folder = embedded_model_path()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = load_questions(1)[0].prompt[-4000:]
    inputs = tokenizer(text, return_tensors="pt")
    greedy = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    with KVCrush(budget=0.25)(model) as session:
        first = model.generate(**inputs, **greedy)
        report = session.cache.report()
        assert torch.equal(first, model.generate(**inputs, **greedy))
        assert torch.equal(first, model.generate(**inputs, **greedy, prefill_chunk_size=256))
        assert session.cache.report() == report
    assert 0.2 < report.bytes_fraction < 0.27  # a quarter, less what fills no page, and the answer
    full = model.generate(**inputs, **greedy)
    with KVCrush(budget=1.0)(model):
        assert torch.equal(full, model.generate(**inputs, **greedy))
