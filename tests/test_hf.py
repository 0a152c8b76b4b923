"""KVCrush in Transformers: what a user does with `generate` and caches."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from architectures import prompts, small_model
from crushkv import ConfigError, CrushCache, CrushError, KVCrush, UnsupportedModelError
from crushkv.core import Tier
from crushkv.errors import ScoreError
from crushkv.hf import plan
from crushkv.hf.interface import cache_in, passed
from crushkv.hf.layer import CrushLayer
from crushkv.later import Later

SMALL: dict[str, Any] = {
    "budget": 0.4,
    "min_tokens": 0,
    "sink": 2,
    "window": 8,
    "interval": 8,
    "page_size": 4,
    "representative_share": 0.1,
}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def untouched(model: Any) -> bool:
    return not (
        {"_prefill", "_prepare_cache_for_generation", "init_continuous_batching", "generate", "forward"}
        & set(model.__dict__)
        or model._forward_pre_hooks
        or model.config._attn_implementation != "sdpa"
    )


def test_block_and_explicit_cache_agree(model: Any) -> None:
    inputs = prompts([120, 77])
    with KVCrush(**SMALL)(model) as session:
        block = model.generate(**inputs, **GREEDY)
        assert session.cache.get_seq_length() == 120 + 23
    cache = KVCrush(**SMALL).cache(model)
    explicit = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(block, explicit)
    assert cache.report() == session.cache.report()
    assert not torch.equal(block, model.generate(**inputs, **GREEDY)), "a crushed cache changes something here"
    assert untouched(model)


def test_nothing_is_left_behind_after_an_error(model: Any) -> None:
    before = model.generate(**prompts([50]), **GREEDY)
    with pytest.raises(RuntimeError, match="on purpose"), KVCrush(**SMALL)(model):
        model.generate(**prompts([50]), **GREEDY)
        raise RuntimeError("on purpose")
    assert untouched(model)

    class Stop(Exception):
        pass

    def fail(*args: Any) -> None:
        raise Stop

    # An error in the middle of a forward pass, between the cache's update and attention's end
    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(Stop), KVCrush(**SMALL)(model):
        model.generate(**prompts([50]), **GREEDY)
    hook.remove()
    assert untouched(model)
    assert torch.equal(before, model.generate(**prompts([50]), **GREEDY))


@pytest.mark.parametrize("under_way", [False, True])
def test_scores_that_are_not_finite_end_the_pass(monkeypatch: pytest.MonkeyPatch, under_way: bool) -> None:
    """At once, or where a device may still be computing them, when all layers have evicted."""
    monkeypatch.setattr(Later, "under_way", under_way)
    model = small_model()
    model.model.layers[0].self_attn.v_proj.weight.data[0] = torch.nan
    evictions: list[int] = []
    evict = CrushLayer.evict
    monkeypatch.setattr(CrushLayer, "evict", lambda self, call: (evictions.append(self.index), evict(self, call)))
    with torch.no_grad(), pytest.raises(ScoreError, match="NaN or infinite"):
        model(**prompts([200]), **passed(KVCrush(**SMALL).cache(model)))
    assert evictions == ([0, 1, 2] if under_way else [0])


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "pyramidkv", "random"])
def test_full_budget_changes_no_token(model: Any, policy: str) -> None:
    inputs = prompts([120, 77, 5])
    full = model.generate(**inputs, **GREEDY)
    with KVCrush(**{**SMALL, "budget": 1.0, "policy": policy})(model):
        assert torch.equal(full, model.generate(**inputs, **GREEDY))


def test_every_prompt_in_a_block_is_compressed(model: Any) -> None:
    with KVCrush(**SMALL)(model) as session:
        results = []
        for _ in range(2):
            results.append((model.generate(**prompts([120]), **GREEDY), session.cache.report()))
        other = model.generate(**prompts([90], seed=5), **GREEDY)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][1].tokens_held < 0.6 * results[0][1].tokens_seen
    assert session.cache.report().tokens_held < 0.6 * other.shape[1]


@pytest.mark.parametrize(
    ("budget", "page_size", "held"),
    [(0.4, 1, 48), (0.4, 4, 48), ("40%", 16, 40), (60, 1, 60), (60, 16, 56), (500, 1, 120), (1.0, 4, 120)],
)
def test_bytes_held_equal_the_budget_to_the_token(model: Any, budget: Any, page_size: int, held: int) -> None:
    """At the end of a prompt of 120 tokens: sink 2, window 8, and 110 in the middle, of which whole pages are kept.

    110 = 27 * 4 + 2 = 6 * 16 + 14: what no page takes joins the window. Pages of 4 within 48: 2 + 8 + 2 + 9 * 4.
    Pages of 16 within 48: 2 + 8 + 14 + 1 * 16; within 60: 2 + 8 + 14 + 2 * 16.
    """
    cache = KVCrush(**{**SMALL, "budget": budget, "page_size": page_size}).cache(model)
    with torch.no_grad():
        model(**prompts([120]), past_key_values=cache)
    per_token = 2 * 2 * 16 * 4  # keys and values, KV heads, head size, float32
    assert [layer.storage.length for layer in cache.crushed_layers] == [held] * 3
    assert cache.nbytes == 3 * held * per_token
    report = cache.report()
    assert report.kv_bytes == cache.nbytes // 2  # counted at 16 bits a number
    assert report.full_kv_bytes == 3 * 120 * per_token // 2
    assert report.room_bytes == 0
    assert report.memory_bytes == cache.nbytes + report.state_bytes
    assert sum(report.tiers.values()) == held


def test_budget_in_bytes_is_never_exceeded(model: Any) -> None:
    cache = KVCrush(**{**SMALL, "budget": "40KiB", "page_size": 1}).cache(model)
    with torch.no_grad():
        model(**prompts([120]), past_key_values=cache)
    assert 40 * 1024 - 3 * 256 < cache.nbytes <= 40 * 1024


def test_pyramid_spends_the_same_bytes_unevenly(model: Any) -> None:
    cache = KVCrush(**{**SMALL, "policy": "pyramidkv", "page_size": 1}).cache(model)
    with torch.no_grad():
        model(**prompts([120]), past_key_values=cache)
    held = [layer.storage.length for layer in cache.crushed_layers]
    assert sum(held) == 3 * 48
    assert held[0] > held[1] > held[2] >= 10


@pytest.mark.parametrize("chunk", [None, 50])
def test_a_long_generation_never_holds_more_than_budget_and_interval(model: Any, chunk: int | None) -> None:
    most = 0

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal most
        if output.past_key_values.get_seq_length() >= 100:
            most = max(most, *(layer.storage.length for layer in output.past_key_values.crushed_layers))

    hook = model.register_forward_hook(watch, with_kwargs=True)
    try:
        with KVCrush(**{**SMALL, "budget": 40})(model) as session:
            model.generate(**prompts([100]), **{**GREEDY, "max_new_tokens": 150}, prefill_chunk_size=chunk)
    finally:
        hook.remove()
    assert session.cache.get_seq_length() == 249
    assert most <= 40 + 8
    # Room to grow stays within the interval as well.
    assert session.cache.nbytes <= 3 * (40 + 8) * 256


@pytest.mark.parametrize("late", [False, True])
def test_the_peak_of_the_prefill_is_one_full_layer(model: Any, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """While a layer attends, the layers before it are compressed already, and those behind it are empty.

    On a GPU, a layer is compressed when the next one has attended.
    """
    monkeypatch.setattr(plan.Plan, "puts_off", lambda *_: late)
    seen: list[list[int]] = []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        seen.append([layer.storage.length for layer in cache_in(kwargs).crushed_layers])

    hooks = [layer.self_attn.register_forward_pre_hook(watch, with_kwargs=True) for layer in model.model.layers]
    cache = KVCrush(**SMALL).cache(model)
    with torch.no_grad():
        model(**prompts([120]), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert seen == [[0, 0, 0], [120, 0, 0], [48, 120, 0]] if late else [[0, 0, 0], [48, 0, 0], [48, 48, 0]]
    assert [layer.storage.length for layer in cache.crushed_layers] == [48, 48, 48]


@pytest.mark.parametrize("config", [SMALL, {"config": "small", "min_tokens": 0}], ids=["snapkv", "small"])
def test_it_holds_the_same_when_layers_evict_late(
    model: Any, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    held = []
    for late in (False, True):
        monkeypatch.setattr(plan.Plan, "puts_off", lambda *_, late=late: late)
        cache = KVCrush(**config).cache(model)
        with torch.no_grad():
            for lengths in ([120], [1], [30]):
                model(input_ids=prompts(lengths)["input_ids"], past_key_values=cache)
        held.append([tensor for layer in cache.crushed_layers for tensor in layer.read()])
        with torch.no_grad():
            model(input_ids=prompts([5])["input_ids"], past_key_values=cache)
        cache.reset()
        assert cache.nbytes == 0
    for one, other in zip(*held, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_the_peak_of_the_prefill_in_bytes(model: Any, policy: str) -> None:
    """No moment of it holds more keys and values than the compressed cache and one full layer."""
    peak = 0
    cache = KVCrush(policy=policy, budget=0.25, min_tokens=0, sink=2, window=8, interval=8, page_size=4).cache(model)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            peak = max(peak, cache.nbytes)
            return func(*args, **(kwargs or {}))

    ids = prompts([400])["input_ids"]
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=full)
        with Watch():
            model(input_ids=ids, past_key_values=cache)
    full_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert full_bytes / 3 < peak <= full_bytes / 4 + full_bytes / len(full.layers)


@torch.no_grad()
@pytest.mark.parametrize(
    ("resident", "after"),
    [
        ([100, 163, 164], []),
        ([100, 165, 100], [2]),
        ([100, 90, 165], [3]),
        ([100, 165, 300], [2]),  # what the first layer after that takes is not growth
        ([None] * 3, []),  # not told
    ],
)
def test_freed_memory_is_given_back_where_the_process_grows(
    model: Any, monkeypatch: pytest.MonkeyPatch, resident: list[int | None], after: list[int]
) -> None:
    held: list[int] = []
    cache = KVCrush(**SMALL).cache(model)
    told = iter(resident)
    monkeypatch.setattr(plan, "resident_memory", lambda: None if (mib := next(told)) is None else mib * 2**20)
    monkeypatch.setattr(plan, "return_freed_memory", lambda: held.append(cache.nbytes))
    model(**prompts([120]), past_key_values=cache)
    assert held == [cache.nbytes * layers // 3 for layers in after]


@pytest.mark.parametrize("chunk", [1, 7, 40, 119, 120, 500])
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "expected_attention"])
def test_chunked_prefill_equals_one_prefill(model: Any, policy: str, chunk: int) -> None:
    inputs = prompts([120, 77])
    with KVCrush(**{**SMALL, "policy": policy})(model) as session:
        whole = model.generate(**inputs, **GREEDY)
        kept = [layer.positions for layer in session.cache.crushed_layers]
        chunked = model.generate(**inputs, **GREEDY, prefill_chunk_size=chunk)
        assert all(map(torch.equal, kept, (layer.positions for layer in session.cache.crushed_layers)))
    assert torch.equal(whole, chunked)


def test_a_row_is_treated_alike_alone_and_in_a_padded_batch(model: Any) -> None:
    inputs = prompts([120, 77])
    with KVCrush(**SMALL)(model):
        batch = model.generate(**inputs, **GREEDY)
        alone = model.generate(
            input_ids=inputs["input_ids"][1:, 43:], attention_mask=inputs["attention_mask"][1:, 43:], **GREEDY
        )
    assert torch.equal(batch[1, 43:], alone[0])


def test_large_seeds(model: Any) -> None:
    with KVCrush(**SMALL, seed=2**62, policy="random", anchor="random")(model):
        results = [model.generate(**prompts([100]), **GREEDY) for _ in range(2)]
    assert torch.equal(*results)


def test_sampling_is_repeatable(model: Any) -> None:
    with KVCrush(**SMALL)(model):
        results = []
        for _ in range(2):
            torch.manual_seed(7)
            results.append(
                model.generate(**prompts([100, 60]), **{**GREEDY, "do_sample": True}, num_return_sequences=2)
            )
    assert torch.equal(*results)
    assert results[0].shape[0] == 4


def test_beam_search(model: Any) -> None:
    """With the whole budget, beams equal the full cache's; with less, every beam's rows follow their beam."""
    inputs = prompts([100, 60])
    beams = {**GREEDY, "num_beams": 3}
    full = model.generate(**inputs, **beams)
    with KVCrush(**{**SMALL, "budget": 1.0})(model):
        assert torch.equal(full, model.generate(**inputs, **beams))
    with KVCrush(**SMALL)(model) as session:
        crushed = model.generate(**inputs, **beams)
        assert session.cache.batch_size == 6
        for row in range(2):  # alone or in a batch
            start = 40 * row
            alone = model.generate(
                input_ids=inputs["input_ids"][row : row + 1, start:],
                attention_mask=inputs["attention_mask"][row : row + 1, start:],
                **beams,
            )
            assert torch.equal(crushed[row, start:], alone[0])


def test_several_turns_on_one_cache(model: Any) -> None:
    cache = KVCrush(**{**SMALL, "budget": 50}).cache(model)
    ids = prompts([100])["input_ids"]
    for turn in range(3):
        ids = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == ids.shape[1] - 1
        assert max(layer.storage.length for layer in cache.crushed_layers) <= 50 + 8
        ids = torch.cat([ids, prompts([30], seed=turn)["input_ids"]], dim=1)
    # A new turn's prompt is compressed with what is held, and its own last tokens are there.
    with torch.no_grad():
        model(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache)
    recent = cache.crushed_layers[0].positions[0, 0, -8:]
    assert recent.tolist() == list(range(ids.shape[1] - 8, ids.shape[1]))


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("whole", [True, False], ids=["all-tokens", "new-tokens"])
def test_turns_in_a_block_end_where_their_prompt_ends(model: Any, chunk: int | None, whole: bool) -> None:
    """Whether the earlier turns' tokens are passed again or not, and however the prompt is cut."""
    ids = prompts([100])["input_ids"]
    with KVCrush(**{**SMALL, "budget": 50})(model) as session:
        cache = KVCrush(**{**SMALL, "budget": 50}).cache(model)
        for turn in range(3):
            mask = torch.ones_like(ids)
            new = ids if whole or not turn else ids[:, cache.get_seq_length() :]
            result = model.generate(
                input_ids=new, attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **GREEDY
            )
            assert session.cache is cache
            assert cache.get_seq_length() == ids.shape[1] + 23
            assert max(layer.storage.length for layer in cache.crushed_layers) <= 50 + 8
            ids = torch.cat([ids, result[:, new.shape[1] :], prompts([60], seed=turn)["input_ids"]], dim=1)


@pytest.mark.filterwarnings("ignore:crushkv. a later turn is read in one piece")
@pytest.mark.parametrize("whole", [True, False], ids=["all-tokens", "new-tokens"])
def test_turns_read_in_chunks_are_those_of_the_full_cache(model: Any, whole: bool) -> None:
    answers = []
    for cache, chunk in ((DynamicCache(config=model.config), None), (KVCrush(budget=1.0).cache(model), 20)):
        ids = prompts([100])["input_ids"]
        with KVCrush(budget=1.0)(model) if chunk else contextlib.nullcontext():
            for turn in range(3):
                mask = torch.ones_like(ids)
                new = ids if whole or not turn else ids[:, cache.get_seq_length() :]
                result = model.generate(
                    input_ids=new, attention_mask=mask, prefill_chunk_size=chunk, **passed(cache), **GREEDY
                )
                ids = torch.cat([ids, result[:, new.shape[1] :], prompts([60], seed=turn)["input_ids"]], dim=1)
        answers.append(ids)
    assert torch.equal(*answers)


def test_an_interrupted_cache_is_refused(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**prompts([50]), past_key_values=cache, **GREEDY)
    hook.remove()
    with pytest.raises(UnsupportedModelError, match="interrupted"):
        model.generate(**prompts([50]), past_key_values=cache, **GREEDY)
    cache.reset()
    model.generate(**prompts([50]), past_key_values=cache, **GREEDY)


def test_turns_with_padding_in_the_middle(model: Any) -> None:
    """A second turn padded at its front: the padding inside the row is dropped, not kept."""
    cache = KVCrush(**SMALL).cache(model)
    first, second = prompts([60, 60]), prompts([40, 10], seed=3)
    with torch.no_grad():
        model(**first, past_key_values=cache)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        model(input_ids=second["input_ids"], attention_mask=mask, past_key_values=cache)
    for layer in cache.crushed_layers:
        kept = layer.positions[1][:, layer.tiers[1, 0] != Tier.PADDING]
        assert not ((kept >= 60) & (kept < 90)).any()
        assert (kept[:, -8:] == torch.arange(92, 100)).all()


def test_short_prompts_are_left_alone(model: Any) -> None:
    with KVCrush(**{**SMALL, "budget": 100})(model) as session:
        crushed = model.generate(**prompts([40]), **GREEDY)
    assert torch.equal(crushed, model.generate(**prompts([40]), **GREEDY))
    assert session.cache.report().tokens_held == 63


def test_one_warning_where_the_budget_leaves_no_room_for_a_page(model: Any) -> None:
    with (
        KVCrush(**{**SMALL, "budget": 0.1})(model) as session,
        pytest.warns(UserWarning, match="sink . window") as caught,
    ):
        model.generate(**prompts([50]), **GREEDY)
    assert len([w for w in caught if "crushkv" in str(w.message)]) == 1
    assert session.cache.crushed_layers[0].storage.length <= 10 + 8


def test_calls_of_the_model_itself(model: Any) -> None:
    with torch.no_grad(), KVCrush(**SMALL)(model):
        output = model(**prompts([120]))
        assert isinstance(output.past_key_values, CrushCache)
        assert model(**prompts([20]), use_cache=False).past_key_values is None
        with pytest.raises(UnsupportedModelError, match="DynamicCache"):
            model(**prompts([20]), past_key_values=DynamicCache(config=model.config))
    assert isinstance(model(**prompts([20])).past_key_values, DynamicCache)


def test_inference_mode_and_back(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)
    ids = prompts([100])["input_ids"]
    with torch.inference_mode():
        ids = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    ids = model.generate(input_ids=ids, past_key_values=cache, **GREEDY)
    other = KVCrush(**SMALL).cache(model)
    expected = model.generate(input_ids=prompts([100])["input_ids"], past_key_values=other, **GREEDY)
    assert torch.equal(ids, model.generate(input_ids=expected, past_key_values=other, **GREEDY))


def test_a_copied_cache_is_a_branch(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)
    with torch.no_grad():
        model(**prompts([100]), past_key_values=cache)
        branch = copy.deepcopy(cache)
        question = prompts([5], seed=9)["input_ids"]
        first = model(input_ids=question, past_key_values=cache).logits
        assert branch.get_seq_length() == 100
        assert torch.equal(first, model(input_ids=question, past_key_values=branch).logits)


def test_rows_can_be_selected_and_repeated(model: Any) -> None:
    inputs = prompts([100, 60])
    cache = KVCrush(**SMALL).cache(model)
    step = torch.tensor([[5], [6]])
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        branch = copy.deepcopy(cache)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        expected = model(input_ids=step, attention_mask=mask, past_key_values=cache).logits
        branch.batch_repeat_interleave(2)
        branch.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(input_ids=step.flip(0), attention_mask=mask.flip(0), past_key_values=branch).logits
    assert torch.allclose(swapped.flip(0), expected, atol=1e-5)


def test_reset_makes_a_cache_new(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)
    first = model.generate(**prompts([100]), past_key_values=cache, **GREEDY)
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(first, model.generate(**prompts([100]), past_key_values=cache, **GREEDY))


def test_two_models_and_nested_blocks(model: Any) -> None:
    other = small_model("qwen2")
    inputs = prompts([100])
    with KVCrush(**SMALL)(other):
        expected_other = other.generate(**inputs, **GREEDY)
    with KVCrush(**SMALL)(model) as outer:
        expected = model.generate(**inputs, **GREEDY)
        with KVCrush(**SMALL)(other), KVCrush(**{**SMALL, "budget": 1.0})(model) as inner:
            assert torch.equal(expected_other, other.generate(**inputs, **GREEDY))
            full = model.generate(**inputs, **GREEDY)
        assert inner.cache.report().bytes_fraction > 0.99
        assert torch.equal(expected, model.generate(**inputs, **GREEDY))
        assert outer.cache.report().bytes_fraction < 0.7
    assert torch.equal(full, model.generate(**inputs, **GREEDY))
    assert untouched(model)
    assert untouched(other)


def test_threads_with_blocks_of_their_own(model: Any) -> None:
    """Two configurations at the same time on the same model: each thread runs in the block that it entered."""
    inputs = prompts([100])
    configs: list[dict[str, Any]] = [SMALL, {**SMALL, "budget": 0.7, "policy": "h2o"}]

    def run(fields: dict[str, Any]) -> torch.Tensor:
        with KVCrush(**fields)(model):
            return model.generate(**inputs, **GREEDY)

    expected = [run(fields) for fields in configs]
    failures: list[str] = []

    def work(index: int) -> None:
        for _ in range(4):
            if not torch.equal(run(configs[index]), expected[index]):
                failures.append(str(configs[index]))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert untouched(model)


def test_sliding_layers_are_left_to_themselves() -> None:
    gemma = small_model("gemma3")
    with KVCrush(**SMALL)(gemma) as session:
        gemma.generate(**prompts([120]), **GREEDY)
    names = [type(layer).__name__ for layer in session.cache.layers]
    assert names == ["DynamicSlidingWindowLayer", "CrushLayer"] * 2
    report = session.cache.report()
    assert report.kv_bytes < report.full_kv_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"past_key_values": "dynamic"}, "DynamicCache"),
    ],
    ids=str,
)
def test_ways_of_generating_that_are_refused(model: Any, change: dict[str, Any], message: str) -> None:
    if "past_key_values" in change:
        change = {"past_key_values": DynamicCache(config=model.config)}
    with pytest.raises(UnsupportedModelError, match=message), KVCrush(**SMALL)(model):
        model.generate(**prompts([50]), **GREEDY, **change)
    assert untouched(model)


def test_models_that_are_refused(model: Any) -> None:
    """Those beside the matrix of test_models.py."""
    tiny = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    sliding = MistralForCausalLM(MistralConfig(**tiny, num_key_value_heads=2, intermediate_size=16, sliding_window=8))
    for refused, message in (
        (t5, "encoder-decoder"),
        (sliding, "sliding window"),
        (torch.nn.Linear(1, 1), "no Transformers model"),
    ):
        with pytest.raises(UnsupportedModelError, match=message), KVCrush()(refused):
            pass
    flex = small_model()
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        CrushCache(flex)


def test_prompts_that_are_refused(model: Any) -> None:
    with KVCrush(**SMALL)(model), pytest.raises(ConfigError, match="prompt: it is empty"):
        model.generate(input_ids=torch.zeros(1, 0, dtype=torch.long), **GREEDY)


def test_nan_in_the_model_is_named(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(CrushError, match="NaN"), KVCrush(**SMALL)(broken):
        broken.generate(**prompts([100]), **GREEDY)
    assert untouched(broken)


def test_a_cache_of_another_batch_is_refused(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)
    model.generate(**prompts([50]), past_key_values=cache, **GREEDY)
    with pytest.raises(UnsupportedModelError, match="1 rows, but the input has 2"):
        model.generate(**prompts([90, 80]), past_key_values=cache, **GREEDY)


def test_attention_that_bypasses_the_interface_is_noticed(model: Any) -> None:
    """The cache must not be silently uncompressed when its layers never see a query."""
    cache = KVCrush(**SMALL).cache(model)
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
            model.generate(**prompts([50]), past_key_values=cache, **GREEDY)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = wrapped


def test_other_models_run_through_the_wrapped_functions_unchanged() -> None:
    """Eager attention is wrapped too once a crushed model used it; others still find their own."""
    eager = small_model("llama", "eager")
    other = small_model("gemma3", "eager")
    expected = other.generate(**prompts([60]), **GREEDY)
    KVCrush(**SMALL).cache(eager)
    assert torch.equal(expected, other.generate(**prompts([60]), **GREEDY))


def test_a_compiled_model(model: Any) -> None:
    """Dynamo traces around the cache and the attention function."""
    inputs = prompts([100, 60])
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="eager")
    with KVCrush(**SMALL)(model), KVCrush(**SMALL)(compiled):
        assert torch.equal(model.generate(**inputs, **GREEDY), compiled.generate(**inputs, **GREEDY))


def test_the_wrapper_is_installed_once(model: Any) -> None:
    KVCrush(**SMALL).cache(model)
    first = ALL_ATTENTION_FUNCTIONS["sdpa"]
    KVCrush(**SMALL).cache(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first


# min_tokens


FLOOR: dict[str, Any] = {**SMALL, "min_tokens": 100}


def test_a_fraction_leaves_short_prompts_alone(model: Any) -> None:
    """Until so many tokens were seen nothing is evicted or quantized; the next eviction is as ever."""
    for fields in ({}, {"bits": 4}, {"policy": "h2o"}):
        cache = KVCrush(**{**FLOOR, **fields}).cache(model)
        tokens = model.generate(**prompts([60]), past_key_values=cache, **GREEDY)  # 83 seen
        assert torch.equal(tokens, model.generate(**prompts([60]), **GREEDY))
        report = cache.report()
        assert (report.tokens_held, report.untouched_rows) == (83, 1)
        assert cache.crushed_layers[0].storage.blocked == 0
        longer = {"input_ids": torch.cat([tokens, prompts([30])["input_ids"]], dim=1)}
        model.generate(**longer, past_key_values=cache, **GREEDY)
        report = cache.report()
        assert report.untouched_rows == 0 and report.bytes_fraction < 0.6
        assert bool(cache.crushed_layers[0].storage.blocked) == ("bits" in fields)


@pytest.mark.parametrize("fields", [{}, {"bits": 8}, {"policy": "pyramidkv"}], ids=str)
def test_rows_on_both_sides_of_the_floor(model: Any, fields: dict[str, Any]) -> None:
    inputs = prompts([200, 60])
    cache = KVCrush(**{**FLOOR, **fields, "interval": 0}).cache(model)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 201, dtype=torch.long)}
        step["attention_mask"][:, :200] = inputs["attention_mask"]
        step["position_ids"] = torch.tensor([[200], [60]])
        found = model(**step, past_key_values=cache).logits[1]
        full = DynamicCache(config=model.config)
        model(**inputs, past_key_values=full)
        expected = model(**step, past_key_values=full).logits[1]
    assert cache.report().untouched_rows == 1
    for layer in cache.crushed_layers:
        kept = [(layer.tiers[row, 0] != Tier.PADDING).sum().item() for row in range(2)]
        assert kept[1] == 61 and (kept[0] < 201 or fields.get("bits") == 8)
        assert sorted(layer.positions[1, 0][layer.tiers[1, 0] != Tier.PADDING].tolist()) == list(range(140, 201))
    assert torch.allclose(found, expected, atol=0.3 if fields.get("bits") else 1e-4)


def test_budgets_that_do_not_read_min_tokens(model: Any) -> None:
    for budget in (40, "30KiB"):
        cache = KVCrush(**{**FLOOR, "budget": budget}).cache(model)
        with torch.no_grad():
            model(**prompts([60]), past_key_values=cache)
        assert cache.report().untouched_rows == 0 and cache.report().tokens_held < 60


def test_the_plan_of_a_short_prompt(model: Any) -> None:
    from crushkv import CrushConfig
    from crushkv.hf import plan_cache

    for fields in ({}, {"bits": 4}):
        config = CrushConfig(**{**FLOOR, **fields})
        short, long = (plan_cache(model.config, config, tokens) for tokens in (99, 100))
        assert short.untouched and short.fraction == 1 and short.layers[0].tokens == 99
        assert not long.untouched and long.fraction < 0.6
