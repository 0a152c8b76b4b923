"""What becomes of single requests: preempted, aborted, switched off, with a budget of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import BLOCK, Engine, Reference, engine, random_prompts
from vllm.exceptions import VLLMValidationError
from vllm.utils.math_utils import cdiv

CONFIG: dict[str, Any] = {"budget": 0.3, "min_tokens": 0, "sink": 2, "window": 16, "interval": 16, "page_size": 8}
PROMPTS = random_prompts([150, 300, 90, 60, 220, 260, 70, 180])
NEW = 40


@pytest.fixture(scope="module", params=[False, True], ids=["no prefix caching", "prefix caching"])
def running(request: pytest.FixtureRequest, small: Path) -> Iterator[Engine]:
    with engine(
        small, CONFIG, skip_tokenizer_init=True, max_num_batched_tokens=128, enable_prefix_caching=request.param
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left(running: Engine) -> Iterator[None]:
    yield
    running.check_empty()


def test_preemption_changes_nothing(running: Engine, small_reference: Reference) -> None:
    """All running requests are preempted again and again, before and between their evictions."""
    steps = 0

    def after_step(e: Engine) -> None:
        nonlocal steps
        steps += 1
        if steps in (3, 12, 25, 40):
            assert e.scheduler.reset_prefix_cache(reset_running_requests=True)
        e.check_blocks()

    answers = running.generate(PROMPTS, NEW, after_step)
    assert len(running.preempted) == len(PROMPTS)
    assert answers == small_reference.generate(CONFIG, PROMPTS, NEW)


def test_abort(running: Engine, small_reference: Reference) -> None:
    """Aborted while waiting, in the middle of a prompt, and while decoding; the others do not notice."""
    names = [running.add(prompt, NEW) for prompt in PROMPTS]
    answers: dict[str, list[int]] = {}
    for step in range(100):
        if step in (0, 2, 30):
            running.llm.llm_engine.abort_request([names[{0: 5, 2: 1, 30: 3}[step]]])
        answers |= running.step()
        running.check_blocks()
    left = [i for i in range(len(PROMPTS)) if i not in (1, 3, 5)]
    expected = small_reference.generate(CONFIG, [PROMPTS[i] for i in left], NEW)
    assert [answers[names[i]] for i in left] == expected


def test_aborted_in_the_step_of_its_eviction(running: Engine) -> None:
    name = running.add(PROMPTS[0][:100], NEW)
    running.step()
    running.llm.llm_engine.abort_request([name])
    running.add(PROMPTS[1], 3)
    for _ in range(10):
        running.step()
        running.check_blocks()


def test_held_is_bounded(running: Engine) -> None:
    """A long generation holds no more than the blocks of its budget, and one interval."""
    prompt = PROMPTS[1]

    def after_step(e: Engine) -> None:
        for request in e.scheduler.running:
            seen = request.num_computed_tokens
            if seen > len(prompt):
                bound = cdiv(int(0.3 * seen), BLOCK) * BLOCK + CONFIG["interval"]
                assert e.manager.held(request.request_id, seen) <= bound
                assert len(e.manager.req_to_blocks[request.request_id]) <= cdiv(bound, BLOCK)

    running.generate([prompt], 200, after_step)


def test_off_for_one_request(running: Engine, small_reference: Reference) -> None:
    dropped = running.crush.totals.tokens_dropped
    answers = running.generate(PROMPTS[:2], NEW, extra_args={"crushkv": "off"})
    assert running.crush.totals.tokens_dropped == dropped
    assert answers == small_reference.generate({"budget": 1.0}, PROMPTS[:2], NEW)


def test_lower_budget_for_one_request(running: Engine, small_reference: Reference) -> None:
    answers = running.generate(PROMPTS[:2], NEW, extra_args={"crushkv": 0.2})
    assert answers == small_reference.generate({**CONFIG, "budget": 0.2}, PROMPTS[:2], NEW)
    # A request cannot take more than the engine's configuration gives.
    answers = running.generate(PROMPTS[:2], NEW, extra_args={"crushkv": "90%"})
    assert answers == small_reference.generate(CONFIG, PROMPTS[:2], NEW)


@pytest.mark.parametrize("value", ["of", 2.0, {"policy": "h2o"}, 3])
def test_bad_extra_args_are_refused(running: Engine, value: Any) -> None:
    with pytest.raises(VLLMValidationError, match="crushkv"):
        running.add(PROMPTS[0], NEW, extra_args={"crushkv": value})
    running.generate(PROMPTS[:1], 2)


def test_several_samples(running: Engine) -> None:
    """`n` samples of one prompt are requests of their own, which share the prompt's blocks while it is read."""
    from vllm import SamplingParams

    sampling = SamplingParams(n=3, temperature=1.0, max_tokens=NEW, ignore_eos=True)
    output = running.llm.generate({"prompt_token_ids": PROMPTS[1]}, sampling, use_tqdm=False)[0]
    assert [len(sample.token_ids) for sample in output.outputs] == [NEW] * 3
