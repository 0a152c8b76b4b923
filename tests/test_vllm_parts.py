"""The parts of the vLLM plugin that need no vLLM: layouts of caches, schedules of eviction, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architectures import prompts, small_model
from crushkv import ConfigError, CrushConfig, KVCrush
from crushkv.core import QueryTails, Shares
from crushkv.vllm.layout import CacheLayout, InterleavedLayout, PermutedLayout, StridedLayout
from crushkv.vllm.schedule import EvictionSchedule
from crushkv.vllm.settings import engine_config, request_config, request_schedule

BLOCKS, HEADS, SIZE, DIM = 7, 2, 4, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]


def permuted() -> PermutedLayout:
    places = torch.stack([torch.randperm(SIZE * DIM, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    return PermutedLayout(*places.view(2, SIZE, DIM))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bytes, NaN among them: a layout moves, and does not compute."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


LAYOUTS: dict[str, CacheLayout] = {
    "interleaved": InterleavedLayout(DIM),
    "strided": StridedLayout(SIZE, DIM, (1, SIZE), (DIM, 1)),
    "permuted": permuted(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 12])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_written_is_read(layout: CacheLayout, tokens: int, dtype: torch.dtype) -> None:
    cache = numbers((BLOCKS, HEADS, SIZE, 2 * DIM), dtype)
    before = cache.clone()
    blocks = torch.tensor([5, 1, 3])
    keys, values = numbers((HEADS, tokens, DIM), dtype, 1), numbers((HEADS, tokens, DIM), dtype, 2)
    layout.write(cache, blocks, keys, values)
    read_keys, read_values = layout.read(cache, blocks)
    assert same(read_keys[:, :tokens], keys) and same(read_values[:, :tokens], values)
    # Nothing else is touched: the slots behind, and the other blocks.
    old_keys, old_values = layout.read(before, blocks)
    assert same(read_keys[:, tokens:], old_keys[:, tokens:]) and same(read_values[:, tokens:], old_values[:, tokens:])
    others = [0, 2, 4, 6]
    assert same(cache[others], before[others])


def test_interleaved_layout_is_flash_attentions() -> None:
    """`[blocks, Hkv, block size, D + D]`, in memory `[blocks, block size, Hkv, D + D]`: a view with strides."""
    memory = numbers((BLOCKS, SIZE, HEADS, 2 * DIM), torch.float32)
    cache = memory.transpose(1, 2)
    layout = InterleavedLayout(DIM)
    keys, values = layout.read(cache, torch.tensor([4, 2]))
    for token in range(2 * SIZE):
        block, slot = [4, 2][token // SIZE], token % SIZE
        for head in range(HEADS):
            assert same(keys[head, token], memory[block, slot, head, :DIM])
            assert same(values[head, token], memory[block, slot, head, DIM:])
    layout.write(cache, torch.tensor([6]), keys[:, 5:7], values[:, 5:7])
    assert same(memory[6, 1, 1, :DIM], keys[1, 6])


def test_permuted_layout_goes_where_it_is_told() -> None:
    layout = permuted()
    cache = torch.zeros((1, 1, SIZE, 2 * DIM))
    keys = torch.arange(1.0, SIZE * DIM + 1).view(1, SIZE, DIM)
    layout.write(cache, torch.tensor([0]), keys, -keys)
    flat = cache.flatten()
    for token in range(SIZE):
        for dimension in range(DIM):
            place = int(layout._places[0].view(SIZE, DIM)[token, dimension])
            assert flat[place] == keys[0, token, dimension]
    assert sorted(flat[SIZE * DIM :].tolist()) == sorted((-keys).flatten().tolist())


def test_strided_layout_is_the_permuted_one() -> None:
    """Keys with their dimensions outermost, as vLLM's CPU kernels want them."""
    numbers_of_block = torch.arange(SIZE * DIM)
    keys, values = numbers_of_block.view(DIM, SIZE).t(), numbers_of_block.view(SIZE, DIM)
    cache = numbers((BLOCKS, HEADS, SIZE, 2 * DIM), torch.bfloat16)
    blocks = torch.tensor([3, 0])
    strided, general = LAYOUTS["strided"].read(cache, blocks), PermutedLayout(keys, values).read(cache, blocks)
    assert same(strided[0], general[0]) and same(strided[1], general[1])


CONFIGS: dict[str, dict[str, Any]] = {
    "fraction": {"budget": 0.4},
    "short prompts left alone": {"budget": 0.4, "min_tokens": 70},
    "tokens": {"budget": 40, "page_size": 1},
    "small": {"budget": 0.05},
    "half, long interval": {"budget": 0.5, "interval": 30},
    "never while decoding": {"budget": 0.3, "interval": 0},
}


@pytest.mark.filterwarnings("ignore:crushkv:UserWarning")  # budgets that leave no room for a page
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt", [5, 30, 61, 130])
def test_schedule_is_that_of_the_transformers_integration(name: str, prompt: int) -> None:
    """Step by step, a generation holds what the schedule says."""
    config = CrushConfig(**{"min_tokens": 0, "sink": 2, "window": 8, "interval": 8, "page_size": 4, **CONFIGS[name]})
    model = small_model()
    inputs = prompts([prompt])
    cache = KVCrush(config).cache(model)
    cache.prefill_end = prompt
    schedule = request_schedule(config, prompt, None, bytes_per_token=1)
    assert schedule is not None
    held = seen = most = 0
    token = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(70):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            cache.prefill_end = None
            step = prompt if seen == 0 else 1
            assert schedule.clock.next_point(seen) is None or seen + step <= schedule.clock.next_point(seen)  # type: ignore[operator]
            seen, held = seen + step, held + step
            most = max(most, held)
            if schedule.clock.is_point(seen - 1) and (eviction := schedule.eviction(seen, held)):
                assert eviction.kept < held
                held = eviction.kept
            assert [layer.storage.length for layer in cache.crushed_layers] == [held] * 3
            assert most <= schedule.most_held(seen) <= max(most, held)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 600),
    tokens=st.integers(0, 300),
    budget=st.one_of(st.floats(0.01, 1.0), st.integers(40, 400)),
    page_size=st.sampled_from([1, 4, 16]),
    interval=st.integers(0, 70),
)
def test_points(prompt: int, tokens: int, budget: float, page_size: int, interval: int) -> None:
    config = CrushConfig(budget=budget, min_tokens=0, sink=4, window=8, page_size=page_size, interval=interval)
    schedule = EvictionSchedule(config, prompt, (Shares(config, 1),), 1)
    seen, points = 0, []
    while (point := schedule.clock.next_point(seen)) is not None and point <= prompt + tokens:
        assert point > seen and schedule.clock.is_point(point - 1)
        points.append(point)
        seen = point
    assert points == [prompt, *(range(prompt + interval, prompt + tokens + 1, interval) if interval else ())]
    eviction = schedule.eviction(prompt, prompt)
    if eviction is not None:
        assert eviction.budget - page_size < eviction.kept <= eviction.budget < prompt
    if interval:
        bound = max(
            prompt, int(config.parsed_budget.tokens(torch.tensor([prompt + tokens]), 1)) + interval, 12 + interval
        )
        assert schedule.most_held(prompt + tokens) <= bound


def test_query_tails_keep_the_last_queries() -> None:
    """Whatever the steps, against plain lists."""
    generator = torch.Generator().manual_seed(0)
    tails = QueryTails(layers=2, length=5)
    seen: dict[str, list[torch.Tensor]] = {}
    for step in range(60):
        name = f"r{step % 7}"
        if step % 11 == 10:
            tails.release(name)
            seen.pop(name, None)
            continue
        known = seen.setdefault(name, [])
        new = torch.randn((int(torch.randint(1, 6, (1,), generator=generator)), 3, 2), generator=generator)
        places = torch.tensor(tails.places(name, len(known), len(known) + len(new)))
        for layer in range(2):
            tails.record(layer, new * (layer + 1), places)
        known += list(new)
        for other, queries in seen.items():
            count = min(5, len(queries))
            expected = torch.stack(queries[-count:]).transpose(0, 1)
            for layer in range(2):
                assert torch.equal(tails.last(layer, [other], len(queries), count)[0], expected * (layer + 1))
    assert tails.nbytes <= 2 * 9 * 5 * 3 * 2 * 4


def test_engine_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRUSHKV_VLLM", raising=False)
    assert engine_config({}) is None and engine_config(None) is None and engine_config({"crushkv": False}) is None
    assert engine_config({"crushkv": True}) == engine_config({"crushkv": {}}) == CrushConfig()
    assert engine_config({"crushkv": {"budget": 0.5}}) == CrushConfig(budget=0.5)
    monkeypatch.setenv("CRUSHKV_VLLM", '{"policy": "h2o"}')
    assert engine_config({}) == CrushConfig(policy="h2o")
    assert engine_config({"crushkv": False}) is None, "the option comes before the variable"
    for on in ("1", "true", "True", "on", "{}"):
        monkeypatch.setenv("CRUSHKV_VLLM", on)
        assert engine_config({}) == CrushConfig()
    for off in ("0", "false", "off", ""):
        monkeypatch.setenv("CRUSHKV_VLLM", off)
        assert engine_config({}) is None
    monkeypatch.setenv("CRUSHKV_VLLM", "budget=0.5")
    with pytest.raises(ConfigError, match="environment variable CRUSHKV_VLLM"):
        engine_config({})
    with pytest.raises(ConfigError, match="crushkv.*budget=3.5"):
        engine_config({"crushkv": {"budget": 3.5}})


@pytest.mark.parametrize(
    ("given", "kept"),
    [("on", 100), (True, 100), ("1", 100), (0.1, 40), ("10%", 40), (50, 50), ("90%", 100)],
)
def test_request_budget(given: Any, kept: int) -> None:
    config = CrushConfig(budget=0.25, min_tokens=0, page_size=1)
    schedule = request_schedule(config, 400, {"crushkv": given}, 1)
    assert schedule is not None
    eviction = schedule.eviction(400, 400)
    assert eviction is not None and eviction.kept == kept


def test_request_budget_off_and_wrong() -> None:
    config = CrushConfig()
    for off in ("off", False, 0, "false", "0", "OFF"):
        assert request_config(config, {"crushkv": off}) is None
    for wrong in ("of", 7.5, {"budget": 0.1}, [0.1], 3, "1B"):
        with pytest.raises(ConfigError, match="extra_args"):
            request_config(config, {"crushkv": wrong}, bytes_per_token=100)
    with pytest.raises(ConfigError, match="Did you mean 'crushkv'"):
        request_config(config, {"crush-kv": "off"})


@pytest.mark.parametrize(("block_size", "kept"), [(1, 25), (32, 25), (64, 25), (100, None), (128, None)])
def test_no_eviction_without_a_free_block(block_size: int, kept: int | None) -> None:
    schedule = request_schedule(CrushConfig(budget=25, sink=2, window=8, page_size=1), 100, None, 1, block_size)
    assert schedule is not None
    eviction = schedule.eviction(100, 100)
    assert (None if eviction is None else eviction.kept) == kept
    assert schedule.most_held(100) == 100


def test_a_fraction_leaves_short_prompts_alone() -> None:
    for prompt, evicted in ((49, False), (50, True)):
        for extra, always in ((None, False), ({"crushkv": 40}, True), ({"crushkv": 0.1}, False)):
            config = CrushConfig(budget=0.9, min_tokens=50, page_size=1)
            schedule = request_schedule(config, prompt, extra, 1)
            assert schedule is not None
            assert (schedule.eviction(prompt, prompt) is not None) == (evicted or always)
