"""A policy that fails, or scores that cannot be ranked: the request is left in full, and nobody else notices."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Reference, engine, random_prompts
from torch import Tensor
from transformers import AutoModelForCausalLM

from crushkv.importance import LayerView, SnapKV, register
from crushkv.importance.h2o import H2O

PROMPTS = random_prompts([150, 300, 90, 220, 260, 180])
BAD = 220  # held by one request only, when it is compacted first
NEW = 40
CONFIG: dict[str, Any] = {"budget": 0.3, "min_tokens": 0, "sink": 2, "window": 16, "interval": 16, "page_size": 8}


@register
@dataclass(frozen=True)
class Failing(SnapKV):
    """SnapKV, which fails in one of several ways where it is shown `BAD` tokens."""

    name = "failing"
    how: str = "nan"

    def score(self, view: LayerView) -> Tensor:
        score = super().score(view)
        if view.keys.shape[2] == BAD:
            if self.how == "raises":
                raise ValueError("no scores today")
            if self.how == "shape":
                return score[..., 1:]
            if self.how == "nan":
                score[..., 5] = torch.nan
        return score


@register
@dataclass(frozen=True)
class FailingStream(H2O):
    name = "failing_stream"

    def accumulate(self, view: LayerView) -> Tensor:
        if view.keys.shape[2] == BAD:
            raise RuntimeError("no mass today")
        return super().accumulate(view)


@pytest.mark.parametrize(
    ("policy", "how", "message", "caching"),
    [
        ("failing", "nan", "NaN", True),
        ("failing", "nan", "NaN", False),
        ("failing", "raises", "ValueError: no scores today", False),
        ("failing", "shape", "crushkv", True),
        ("failing_stream", None, "RuntimeError: no mass today", False),
    ],
)
def test_left_in_full(
    small: Path,
    small_reference: Reference,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    how: str | None,
    message: str,
    caching: bool,
) -> None:
    config = {**CONFIG, "policy": policy, **({"policy_options": {"how": how}} if how else {})}
    expected = [
        small_reference.generate({"budget": 1.0} if len(prompt) == BAD else config, [prompt], NEW)[0]
        for prompt in PROMPTS
    ]
    with engine(
        small, config, skip_tokenizer_init=True, max_num_batched_tokens=128, enable_prefix_caching=caching
    ) as e:
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # the first engine configures the log
        caplog.set_level(logging.WARNING, "vllm.crushkv")
        assert e.generate(PROMPTS, NEW, lambda e: e.check_blocks()) == expected
        assert e.generate(PROMPTS, NEW, lambda e: e.check_blocks()) == expected, "and again"
        # A record may be captured by more than one logger on its way up.
        said = list({id(r): r.getMessage() for r in caplog.records if "left in full" in r.getMessage()}.values())
        assert len(said) == 1 and message in said[0]
        e.check_empty()


@pytest.mark.parametrize("caching", [False, True], ids=["no prefix caching", "prefix caching"])
def test_numbers_that_are_not(tmp_path: Path, small: Path, small_reference: Reference, caching: bool) -> None:
    """A model that gives NaN for one token: its request ends with some text, the others with theirs.

    Also those that get its blocks afterwards; vLLM alone lets them read the NaN that lies there.
    """
    expected = small_reference.generate(CONFIG, PROMPTS, NEW)
    seen = {token for tokens in [*PROMPTS, *expected] for token in tokens}
    bad = next(token for token in range(3, 512) if token not in seen)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    model.save_pretrained(tmp_path)
    options = {"num_gpu_blocks_override": 60, "max_model_len": 1024, "enable_prefix_caching": caching}
    with engine(tmp_path, CONFIG, skip_tokenizer_init=True, max_num_batched_tokens=128, **options) as e:
        for _ in range(3):
            failed = e.add([*PROMPTS[1][:100], bad, *PROMPTS[2]], NEW)
            names = [e.add(prompt, NEW) for prompt in PROMPTS]
            answers: dict[str, list[int]] = {}
            while e.llm.llm_engine.has_unfinished_requests():
                answers |= e.step()
                e.check_blocks()
            assert len(answers[failed]) == NEW
            assert [answers[name] for name in names] == expected
        e.check_empty()
