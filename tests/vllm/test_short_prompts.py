"""Short prompts: left alone below `min_tokens`, and wherever no block would come free."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import engine, random_prompts
from vllm import SamplingParams

PASSWORD = (
    "The password is 'marble'. Please keep it in mind. The weather today is mild, with a light breeze from the west "
    "and some clouds in the afternoon, and the trains are running on time again after the repairs last week. "
    "What is the password?"
)


def test_answers_are_those_of_the_full_cache(smollm: Path) -> None:
    """Facts at the start, the question at the end, and the documented default."""
    with engine(smollm, {"budget": 0.25}, num_gpu_blocks_override=60) as e:
        answers = {
            how: e.llm.chat(
                [{"role": "user", "content": PASSWORD}],
                SamplingParams(temperature=0, max_tokens=16, extra_args={"crushkv": how}),
                use_tqdm=False,
            )[0]
            .outputs[0]
            .text
            for how in ("on", "off")
        }
        assert answers["on"] == answers["off"] and "marble" in answers["on"]
        assert e.scheduler.counters.tokens_dropped == 0
        e.check_empty()


@pytest.mark.parametrize("block_size", [32, 128])
def test_every_eviction_frees_a_block(small: Path, block_size: int) -> None:
    """Also where no prompt is too short."""
    prompts = random_prompts([82, 128, 129, 200, 300, 520, 31, 5])
    config = {"budget": 0.25, "min_tokens": 0, "sink": 2, "window": 16, "interval": 16, "page_size": 8}
    with engine(small, config, skip_tokenizer_init=True, block_size=block_size) as e:
        counters, before = e.scheduler.counters, [0, 0]

        def after_step(_: object) -> None:
            compactions, freed = counters.compactions - before[0], counters.blocks_freed - before[1]
            assert freed >= compactions
            before[:] = counters.compactions, counters.blocks_freed

        e.generate(prompts[:1], 3, after_step)
        assert (counters.compactions > 0) == (block_size == 32), "82 tokens are one block of 128"
        e.generate(prompts, 60, after_step)
        assert counters.compactions > 4
