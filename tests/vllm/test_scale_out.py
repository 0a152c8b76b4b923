"""Several workers: tensor parallel gives the same tokens, data parallel starts and answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import Reference, random_prompts
from servers import server

CONFIG = {"budget": 0.3, "min_tokens": 0, "sink": 2, "window": 16, "interval": 16, "page_size": 8}
PROMPTS = random_prompts([150, 300, 90, 60, 220, 260, 70, 180])
NEW = 40


@pytest.fixture(scope="module")
def reference(small_with_text: Path) -> Reference:
    return Reference(small_with_text)


@pytest.mark.parametrize(
    "options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=["tensor parallel", "data parallel"]
)
def test_two_workers(
    small_with_text: Path, reference: Reference, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that share what cores there are."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with server(small_with_text, CONFIG, max_num_batched_tokens=128, **options) as running:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: running.complete(prompt, NEW), PROMPTS))
        assert answers == reference.generate(CONFIG, PROMPTS, NEW)
        assert running.metric("crushkv:compactions_total") > len(PROMPTS)
        assert running.metric("vllm:kv_cache_usage_perc") == 0
