"""`crushkv run` on the real model: what `make run` does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crushkv import KVCrush
from crushkv.demo import load_questions
from crushkv.embedded import embedded_model_path

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The main job over three questions, as a user runs it."""
    command = [sys.executable, "-m", "crushkv", "run", "--questions", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_answers(result: dict[str, Any]) -> None:
    """The full cache answers every question, and a quarter of it answers as many."""
    for question in result["questions"]:
        assert question["full"]["correct"], question
    assert result["summary"]["kvcrush"]["correct"] == 3, result["questions"]


def test_the_bytes_are_a_quarter(result: dict[str, Any]) -> None:
    for question in result["questions"]:
        full, crushed = question["full"], question["kvcrush"]
        assert full["prompt_tokens"] >= 6000
        per_token = 30 * 2 * 3 * 64 * 4  # layers, keys and values, KV heads, head size, float32
        assert full["kv_bytes"] == full["tokens_seen"] * per_token
        # A quarter of the prompt, the tokens of the answer, and room to grow.
        assert crushed["kv_bytes"] <= (full["prompt_tokens"] // 4 + 64) * per_token
        assert sum(crushed["tiers"].values()) == pytest.approx(crushed["tokens_held"], abs=0.01)
        tiers = crushed["tiers"]
        assert tiers["representative"] == 0 and min(tiers["sink"], tiers["important"], tiers["recent"]) > 0


def test_the_peak_is_lower(result: dict[str, Any]) -> None:
    if result["summary"]["full"]["peak_memory_bytes"] is None:
        pytest.skip("this platform does not tell peak memory")
    # The allocator's leftovers only ever add to a peak: the lowest of several is nearest to what was needed.
    full, crushed = (
        min(question[kind]["peak_above_start_bytes"] for question in result["questions"])
        for kind in ("full", "kvcrush")
    )
    saved = result["questions"][0]["full"]["kv_bytes"] - result["questions"][0]["kvcrush"]["kv_bytes"]
    assert full - crushed > saved / 2


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
    assert 0.2 < report.bytes_fraction < 0.35  # a quarter, less what fills no page, and room to grow
    full = model.generate(**inputs, **greedy)
    with KVCrush(budget=1.0)(model):
        assert torch.equal(full, model.generate(**inputs, **greedy))
