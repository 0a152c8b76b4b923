"""The first token does not wait for the compaction, and a request that ends with it is not compacted at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import engine, random_prompts
from test_requests import CONFIG


@pytest.mark.parametrize("caching", [False, True], ids=["no prefix caching", "prefix caching"])
def test_compaction_comes_after_the_first_token(small: Path, caching: bool) -> None:
    prompt, other = random_prompts([300, 90])
    with engine(small, CONFIG, skip_tokenizer_init=True, enable_prefix_caching=caching) as e:
        name = e.add(prompt, 5)
        assert len(e.step()[name]) == 1
        # The scheduler has given the blocks back, and the worker has not moved anything yet.
        e.check_blocks()
        assert (e.scheduler.counters.compactions, e.crush.totals.compactions) == (1, 0)
        e.step()
        assert e.crush.totals.compactions == 1
        while e.llm.llm_engine.has_unfinished_requests():
            e.step()
        done = e.crush.totals.compactions
        e.generate([prompt], 1)
        e.generate([other[:20]], 3)
        assert e.crush.totals.compactions == done
        e.check_empty()
