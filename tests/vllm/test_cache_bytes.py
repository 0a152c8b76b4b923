"""What a compacted cache holds are the bytes that were written once: nothing is converted or quantized again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import BLOCK, Engine, engine, random_prompts
from torch import Tensor


def need_fp8(cache: str) -> None:
    if cache != "auto" and not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM has fp8 caches on CPUs with AVX-512 or AMX only")


PROMPT = random_prompts([300])[0]
KEPT = 75


def stored(e: Engine, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, as bytes `[Hkv, tokens, bytes]`, of the only request."""
    (request,) = e.scheduler.running
    table = torch.tensor([block.block_id for block in e.manager.req_to_blocks[request.request_id]])
    assert len(table) == -(-tokens // BLOCK)
    parts = [layer.read(table, tokens) for layer in e.crush.layers]
    return [(keys.contiguous().view(torch.uint8), values.contiguous().view(torch.uint8)) for keys, values in parts]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize(
    ("dtype", "cache"),
    [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "fp8_e5m2"), ("float16", "auto")],
)
def test_bytes(small: Path, dtype: str, cache: str, caching: bool) -> None:
    need_fp8(cache)
    # What StreamingLLM keeps is known without looking at scores: the first 4 and the last 71.
    config = {"policy": "streaming_llm", "budget": KEPT, "page_size": 1, "interval": 0}
    options = {"dtype": dtype, "kv_cache_dtype": cache, "enable_prefix_caching": caching, "skip_tokenizer_init": True}
    with engine(small, {"budget": 1.0, "interval": 0}, **options) as full:
        full.add(PROMPT, 8)
        full.step()
        before = stored(full, len(PROMPT))
    kept = torch.tensor([*range(4), *range(len(PROMPT) - KEPT + 4, len(PROMPT))])
    with engine(small, config, **options) as e:
        e.add(PROMPT, 8)
        e.step()
        e.step()  # which compacts before it computes
        after = [(keys[:, :KEPT], values[:, :KEPT]) for keys, values in stored(e, KEPT + 1)]
        for (keys, values), (full_keys, full_values) in zip(after, before, strict=True):
            assert full_keys.any() and full_values.any()
            assert torch.equal(keys, full_keys[:, kept])
            assert torch.equal(values, full_values[:, kept])
        for _ in range(8):
            e.step()
        e.check_empty()


@pytest.mark.parametrize(("dtype", "cache"), [("bfloat16", "auto"), ("bfloat16", "fp8"), ("float32", "fp8_e5m2")])
def test_scores_of_a_narrow_cache(small: Path, dtype: str, cache: str) -> None:
    """SnapKV reads the cache, so it has to read it right: it keeps nearly what it keeps in float32."""
    need_fp8(cache)
    config = {"budget": KEPT, "page_size": 1, "sink": 2, "window": 16, "interval": 0}
    kept = []
    for options in ({"dtype": "float32"}, {"dtype": dtype, "kv_cache_dtype": cache}):
        with engine(small, config, skip_tokenizer_init=True, **options) as e:
            e.add(PROMPT, 8)
            e.step()
            e.step()
            layer, table = (
                e.crush.layers[0],
                torch.tensor([b.block_id for b in next(iter(e.manager.req_to_blocks.values()))]),
            )
            kept.append(layer.decode(*layer.read(table, KEPT))[0].float())
    # The first layer's keys depend on the token and its position alone: equal ones are the same token.
    distance = torch.cdist(kept[0], kept[1])  # [Hkv, kept, kept]
    same = (distance.amin(-1) < 0.15 * kept[0].norm(dim=-1)).float().mean()
    assert same > 0.85
