"""Seeded requests on a CPU: they run, and their tokens do not depend on how vLLM gets there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, engine, random_prompts
from test_requests import CONFIG
from vllm import SamplingParams

PROMPTS = random_prompts([150, 300, 90, 220])
NEW = 30


EIGHT: dict[str, Any] = {"n": 8, "temperature": 1.0, "max_tokens": NEW, "ignore_eos": True, "seed": 5}


@pytest.fixture(scope="module")
def alone(small: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Each prompt in one step, by itself; and eight samples of one."""
    with engine(small, CONFIG, skip_tokenizer_init=True) as e:
        return [sampled(e, [prompt])[0] for prompt in PROMPTS], samples(e)


@pytest.fixture(scope="module")
def chunked(small: Path, alone: object) -> Iterator[Engine]:  # two engines cannot be in one process at once
    options = {"max_num_batched_tokens": 100, "enable_prefix_caching": True, "skip_tokenizer_init": True}
    with engine(small, CONFIG, **options) as made:
        yield made


def samples(e: Engine) -> list[list[int]]:
    (output,) = e.llm.generate({"prompt_token_ids": PROMPTS[1]}, SamplingParams(**EIGHT), use_tqdm=False)
    return [list(sample.token_ids) for sample in output.outputs]


def sampled(e: Engine, prompts: list[list[int]], after_step: Any = None) -> list[list[int]]:
    parameters = {"temperature": 1.0, "ignore_eos": True, "max_tokens": NEW, "seed": 11}
    engine = e.llm.llm_engine
    names = [f"seeded{i}-{len(prompts)}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(**parameters))
    answers: dict[str, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        answers |= e.step()
        e.check_blocks()
        step += 1
        if after_step is not None:
            after_step(step)
    return [answers[name] for name in names]


def test_prompt_longer_than_a_chunk(chunked: Engine, alone: Any) -> None:
    assert sampled(chunked, PROMPTS) == alone[0]
    chunked.check_empty()


def test_preempted(chunked: Engine, alone: Any) -> None:
    def preempt(step: int) -> None:
        if step in (3, 12, 25):
            assert chunked.scheduler.reset_prefix_cache(reset_running_requests=True)

    assert sampled(chunked, PROMPTS, preempt) == alone[0]
    assert len(chunked.preempted) >= len(PROMPTS)
    chunked.check_empty()


def test_samples_of_one_prompt(chunked: Engine, alone: Any) -> None:
    """Eight at once, whose prompt comes out of the prefix cache the second time."""
    assert [samples(chunked), samples(chunked)] == [alone[1], alone[1]]
    assert len({tuple(answer) for answer in alone[1]}) == 8
    chunked.check_empty()
