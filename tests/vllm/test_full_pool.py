"""Eviction where no block is free."""

from __future__ import annotations

from pathlib import Path

from engines import Reference, engine, random_prompts
from test_requests import CONFIG


def test_pool_without_a_free_block(small: Path, small_reference: Reference) -> None:
    """A prompt that fills the pool leaves no block to copy into: its own are written, and leave the prefix cache."""
    long, other = random_prompts([1395, 200], seed=3)
    prompts = [long, long[:640] + other, long[:640] + other[:50], long]
    options = {"num_gpu_blocks_override": 45, "enable_prefix_caching": True, "skip_tokenizer_init": True}
    with engine(small, CONFIG, max_num_batched_tokens=256, **options) as e:
        name = e.add(long, 12)
        while not e.scheduler.counters.compactions:
            tables = list(e.manager.req_to_blocks.values())
            before = {block.block_id for block in tables[0]} if tables else set()
            free = e.pool.get_num_free_blocks()
            answer = e.step()
        (after,) = e.manager.req_to_blocks.values()
        assert free < len(after) and before & {block.block_id for block in after}
        assert all(block.block_hash is None for block in after)
        while e.llm.llm_engine.has_unfinished_requests():
            answer = e.step()
        assert [answer[name]] == small_reference.generate(CONFIG, [long], 12)
        assert e.generate(prompts, 12, lambda e: e.check_blocks()) == small_reference.generate(CONFIG, prompts, 12)
        e.check_empty()
