"""Ways in which a model and its cache are used: each works, or is refused or told with the reason."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Phi3Config
from transformers.generation.streamers import BaseStreamer

from architectures import SMALL as TINY
from architectures import prompts, small_model
from crushkv import ConfigError, CrushCache, CrushError, KVCrush, UnsupportedModelError
from crushkv.hf import support
from crushkv.hf.attachment import Attachment
from crushkv.hf.interface import CACHE, passed
from model_zoo import build

SMALL: dict[str, Any] = {"budget": 0.4, "min_tokens": 0, "sink": 2, "window": 8, "interval": 8, "page_size": 4}
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def kind_of_cache(model: Any) -> str:
    """What `generate` uses now."""
    output = model.generate(**prompts([60]), **GREEDY, return_dict_in_generate=True)
    return type(output[CACHE]).__name__


def untouched(model: Any) -> bool:
    names = {"_prefill", "_prepare_cache_for_generation", "init_continuous_batching"}
    return not (names & set(model.__dict__) or model._forward_pre_hooks)


# Sessions


def test_a_session_without_a_block(model: Any) -> None:
    session = KVCrush("small", min_tokens=0)(model)
    assert not session.enabled and "off" in repr(session) and "LlamaForCausalLM" in repr(session)
    assert not session.cache
    with pytest.raises(CrushError, match=r"enable\(\)"):
        session.cache.report()
    assert kind_of_cache(model) == "DynamicCache"
    assert session.enable() is session and session.enabled and " on" in repr(session)
    with pytest.raises(CrushError, match="No generate"):
        session.cache.report()
    session.enable()  # it is on already
    assert kind_of_cache(model) == "CrushCache"
    session.disable()
    session.disable()
    assert kind_of_cache(model) == "DynamicCache"
    assert session.cache.report().tokens_seen == 64
    with session:
        assert kind_of_cache(model) == "CrushCache"
    assert untouched(model)


def test_the_innermost_session_counts(model: Any) -> None:
    outer, inner = KVCrush(**SMALL)(model), KVCrush(**SMALL)(model)
    with outer:
        with inner:
            kind_of_cache(model)
            assert not outer.cache
            with outer:  # once more: what was on is on afterwards
                pass
        first = inner.cache
        kind_of_cache(model)
        assert outer.cache and inner.cache is first
    assert untouched(model)


def test_a_thread_that_is_started_in_a_block(model: Any) -> None:
    kinds: list[str] = []
    with KVCrush(**SMALL)(model):
        thread = threading.Thread(target=lambda: kinds.append(kind_of_cache(model)))
        thread.start()
        thread.join()
    assert kinds == ["CrushCache"]


def at_once(works: list[Callable[[], None]], switch_seconds: float) -> None:
    """Runs each in a thread of its own. They take turns wherever they can, as often as `switch_seconds` says."""
    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=work) for work in works]
    try:
        sys.setswitchinterval(switch_seconds)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_threads_in_one_block_have_caches_of_their_own(model: Any) -> None:
    inputs = [prompts([100], seed=seed) for seed in range(3)]
    results: list[list[Any]] = [[] for _ in inputs]
    with KVCrush(**SMALL)(model):
        alone = [model.generate(**each, **GREEDY) for each in inputs]

        def work(index: int) -> None:
            for _ in range(8):
                results[index].append(model.generate(**inputs[index], **GREEDY, return_dict_in_generate=True))

        at_once([partial(work, i) for i in range(len(inputs))], switch_seconds=1e-5)
    for found, expected in zip(results, alone, strict=True):
        assert [torch.equal(each.sequences, expected) for each in found] == [True] * 8
    assert len({id(each[CACHE]) for found in results for each in found}) == 24


def test_a_new_cache_is_its_own_threads(model: Any) -> None:
    made: list[Any] = []  # kept, so that no two have one id
    with KVCrush(**SMALL)(model) as session:
        model.generate(**prompts([100]), **GREEDY)

        def work() -> None:
            made.extend(session.new_cache(model) for _ in range(200))

        at_once([work] * 4, switch_seconds=1e-6)
    assert len({id(cache) for cache in made}) == len(made) == 800


def answers(model: Any) -> Iterator[str]:
    with KVCrush(**SMALL)(model):
        for _ in range(3):
            yield kind_of_cache(model)


def test_a_generator_that_other_threads_read_from(model: Any) -> None:
    async def serve() -> list[str]:
        items, found = answers(model), []
        while (item := await asyncio.to_thread(next, items, None)) is not None:
            found.append(item)
        return found

    assert asyncio.run(serve()) == ["CrushCache"] * 3
    assert untouched(model)


def test_who_reads_from_a_generator_is_outside_of_its_block(model: Any) -> None:
    half_read = answers(model)
    assert next(half_read) == "CrushCache"
    assert kind_of_cache(model) == "DynamicCache"
    assert next(half_read) == "CrushCache"
    del half_read
    gc.collect()
    assert untouched(model)


@contextlib.contextmanager
def compressed(model: Any) -> Iterator[Any]:
    with KVCrush(**SMALL)(model) as session:
        yield session


def test_context_managers_of_others(model: Any) -> None:
    with compressed(model):
        assert kind_of_cache(model) == "CrushCache"
    with contextlib.ExitStack() as stack:
        stack.enter_context(KVCrush(**SMALL)(model))
        assert kind_of_cache(model) == "CrushCache"
    assert untouched(model)


def test_a_streamer_in_a_generator(model: Any) -> None:
    """As streaming endpoints do it: generate runs in a thread, the generator hands out what arrives."""
    kinds = []

    class Queue(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.more = threading.Condition()
            self.done = False

        def put(self, value: Any) -> None:
            with self.more:
                self.tokens += value.flatten().tolist()
                self.more.notify()

        def end(self) -> None:
            with self.more:
                self.done = True
                self.more.notify()

    def stream() -> Iterator[int]:
        with KVCrush(**SMALL)(model):
            queue = Queue()

            def work() -> None:
                output = model.generate(**prompts([60]), **GREEDY, streamer=queue, return_dict_in_generate=True)
                kinds.append(type(output[CACHE]).__name__)

            thread = threading.Thread(target=work)
            thread.start()
            at = 0
            while not (queue.done and at == len(queue.tokens)):
                with queue.more:
                    queue.more.wait_for(lambda: queue.done or len(queue.tokens) > at)
                yield from queue.tokens[at : (at := len(queue.tokens))]
            thread.join()

    assert len(list(stream())) == 65
    assert kinds == ["CrushCache"]
    assert untouched(model)


def test_leaving_restores_what_was_there(model: Any) -> None:
    mine = model._prefill
    model._prefill = mine
    try:
        with KVCrush(**SMALL)(model):
            assert kind_of_cache(model) == "CrushCache"
        assert model.__dict__["_prefill"] is mine
        with KVCrush(**SMALL)(model):
            later = model.__dict__["_prefill"]
            model._prefill = lambda *args, **kwargs: later(*args, **kwargs)
        assert kind_of_cache(model) == "DynamicCache"  # what came later stays, and passes on
    finally:
        del model._prefill
    assert untouched(model)


def test_names_of_transformers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from crushkv.hf.interface import check_interface

    check_interface()
    monkeypatch.delattr(transformers.GenerationMixin, "_prefill")
    with pytest.raises(CrushError, match=f"Transformers {transformers.__version__} has no GenerationMixin._prefill"):
        check_interface()
    monkeypatch.setattr(transformers.GenerationMixin, "_prefill", lambda self: None, raising=False)
    with pytest.raises(CrushError, match="no parameter 'input_ids'"):
        check_interface()


# Blocks that compress nothing


def told(session: Any, run: Any) -> str:
    """What is said at the end of a block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with session:
            run()
    found = [str(w.message) for w in caught if "crushkv" in str(w.message)]
    assert len(found) <= 1
    return found[0] if found else ""


def test_a_block_that_compressed_nothing_says_so(model: Any) -> None:
    def session() -> Any:
        return KVCrush(**SMALL)(model)

    assert "use_cache is off" in told(session(), lambda: model.generate(**prompts([60]), **GREEDY, use_cache=False))
    assert "no generate()" in told(session(), lambda: None)
    assert told(session(), lambda: kind_of_cache(model)) == ""
    model.train()
    try:
        assert "training mode" in told(session(), lambda: model(**prompts([60])))
    finally:
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="on purpose"), session():
            raise RuntimeError("on purpose")


def test_use_cache_off_in_the_checkpoint() -> None:
    from transformers import LlamaForCausalLM

    off = LlamaForCausalLM(LlamaConfig(**TINY, use_cache=False)).eval()
    session = KVCrush(**SMALL)(off)
    assert "use_cache is off" in told(session, lambda: off.generate(**prompts([60]), **GREEDY))
    with pytest.raises(CrushError, match="use_cache is off"):
        session.cache.report()
    cache = KVCrush(**SMALL).cache(off)
    with pytest.raises(ConfigError, match="use_cache"), KVCrush(**SMALL)(off):
        off.generate(**prompts([60]), **GREEDY, **passed(cache))


def test_continuous_batching_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="generate_batch"), KVCrush(**SMALL)(model):
        model.generate_batch([[5, 6, 7]])


def test_models_inside_models(model: Any) -> None:
    """`generate` of the outer model calls that of an inner one."""
    from transformers import LlamaForCausalLM

    class Wrapper(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = small_model("qwen2")

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner.generate(*args, **kwargs)

    wrapper = Wrapper(LlamaConfig(**TINY)).eval()
    with KVCrush(**SMALL)(wrapper) as session:
        assert kind_of_cache(wrapper) == "CrushCache"
    assert session.cache.report().bytes_fraction < 0.8
    assert untouched(wrapper) and untouched(wrapper.inner)


def test_wrappers_of_torch(model: Any) -> None:
    with KVCrush(**SMALL)(torch.compile(model, backend="eager")):
        assert kind_of_cache(model) == "CrushCache"
    with pytest.raises(UnsupportedModelError, match=r"\.module"):
        KVCrush(**SMALL)(torch.nn.DataParallel(model))


# PEFT


def test_lora() -> None:
    """Adapters are layers of the model: what it caches is compressed, as it is with their weights merged."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(small_model(), config).eval()
    assert kind_of_cache(adapted) == "DynamicCache"
    full = adapted.generate(**prompts([60]), **GREEDY)
    with KVCrush(budget=1.0)(adapted) as session:
        assert torch.equal(adapted.generate(**prompts([60]), **GREEDY), full)
    with KVCrush(**SMALL)(adapted) as session:
        found = adapted.generate(**prompts([60]), **GREEDY)
    assert session.cache.report().bytes_fraction < 0.8
    merged = adapted.merge_and_unload()
    with KVCrush(**SMALL)(merged):
        assert torch.equal(merged.generate(**prompts([60]), **GREEDY), found)
    assert untouched(merged)


def test_prompt_tuning() -> None:
    """Trained embeddings before the prompt are tokens like others."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        small_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    ).eval()
    full = tuned.generate(**prompts([60]), **GREEDY)
    with KVCrush(budget=1.0)(tuned) as session:
        assert torch.equal(tuned.generate(**prompts([60]), **GREEDY), full)
    # PEFT 0.21 reads its embeddings again in each step where Transformers calls the cache `cache`: with any cache.
    again = GREEDY["max_new_tokens"] if CACHE == "cache" else 1
    assert session.cache.report().tokens_seen == 60 + 8 * again + GREEDY["max_new_tokens"] - 1
    with KVCrush(**SMALL)(tuned) as session:
        tuned.generate(**prompts([60]), **GREEDY)
    assert session.cache.report().bytes_fraction < 0.8


def test_prefix_tuning_is_refused() -> None:
    """Trained keys and values in the cache belong to no token, and have no query that scores them."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        small_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
    ).eval()
    with pytest.raises(UnsupportedModelError, match="prefix tuning fills the cache with trained keys and values"):
        KVCrush(**SMALL)(tuned)


# Models that throw their cache away


def phi3() -> Any:
    """Beyond 64 tokens the factors of RoPE are others, and `generate` reads the whole text anew."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    torch.manual_seed(0)
    config = Phi3Config(**TINY, original_max_position_embeddings=64, rope_parameters=rope | factors)
    return AutoModelForCausalLM.from_config(config).eval()


def skip_where_the_text_is_forgotten(full: Any) -> None:
    if full[CACHE].get_seq_length() < 79:
        pytest.skip("this release of Transformers throws the cache away and reads the last token alone, with any cache")


@pytest.mark.parametrize("fields", [SMALL, {**SMALL, "bits": 4}], ids=str)
def test_a_cache_that_is_thrown_away_in_the_middle(fields: dict[str, Any]) -> None:
    model, inputs = phi3(), prompts([60, 41])
    longer: dict[str, Any] = {**GREEDY, "max_new_tokens": 20, "return_dict_in_generate": True}
    full = model.generate(**inputs, **longer)
    with KVCrush(budget=1.0)(model):
        assert torch.equal(model.generate(**inputs, **longer).sequences, full.sequences)
    skip_where_the_text_is_forgotten(full)
    with KVCrush(**fields)(model) as session:
        found = model.generate(**inputs, **longer)
        assert found[CACHE] is session.cache
    assert session.cache.report().tokens_seen == 79
    assert session.cache.report().bytes_fraction < 0.8
    # The text at the switch is read as one prompt; what follows goes on from there.
    switch = found.sequences[:, :65]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    with KVCrush(**fields)(model):
        again = model.generate(switch, attention_mask=mask, **{**longer, "max_new_tokens": 15})
    assert torch.equal(again.sequences, found.sequences)


def test_a_cache_of_ones_own_that_is_thrown_away_is_told() -> None:
    """Outside of a block nobody can give the model another one."""
    model, inputs = phi3(), prompts([60])
    longer: dict[str, Any] = {**GREEDY, "max_new_tokens": 20, "return_dict_in_generate": True}
    skip_where_the_text_is_forgotten(model.generate(**inputs, **longer))
    cache = KVCrush(**SMALL).cache(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 4}, **passed(cache))
        with KVCrush(**SMALL)(model) as session:
            model.generate(**inputs, **{**GREEDY, "max_new_tokens": 20}, **passed(KVCrush(**SMALL).cache(model)))
        assert session.cache.report().tokens_seen == 79
    with pytest.warns(UserWarning, match="throws its cache away when a text grows beyond 64 tokens"):
        model.generate(**inputs, **{**GREEDY, "max_new_tokens": 20}, **passed(KVCrush(**SMALL).cache(model)))


def test_only_the_new_tokens_of_a_second_turn(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)
    with KVCrush(**SMALL)(model):
        model.generate(**prompts([100]), **passed(cache), **GREEDY)
        with pytest.raises(ConfigError, match="the cache has seen 104 already. Pass the whole conversation"):
            model.generate(**prompts([12]), **passed(cache), **GREEDY)


# Numbers


def test_short_first_turns_in_few_bits(model: Any) -> None:
    """Sink and window have room for the whole first turn, so that the first quantization comes later."""
    for length, interval in ((1, 128), (10, 100), (36, 200)):
        with KVCrush("balanced", min_tokens=0, interval=interval)(model) as session:
            model.generate(**prompts([length]), **{**GREEDY, "max_new_tokens": 220})
        assert session.cache.report().bytes_fraction < 0.9


@pytest.mark.parametrize(
    "fields", [{}, {"policy": "h2o"}, {"bits": 8, "recent_bits": 8}, {"bits": 4, "rank": 8}], ids=str
)
def test_autocast_changes_nothing_of_ours(model: Any, fields: dict[str, Any]) -> None:
    """With the whole budget, the answer under autocast is the full cache's; with less, it runs."""
    inputs = prompts([100])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 24})
        if not fields.get("bits"):
            with KVCrush(**{**SMALL, **fields, "budget": 1.0})(model):
                assert torch.equal(full, model.generate(**inputs, **{**GREEDY, "max_new_tokens": 24}))
        with KVCrush(**{**SMALL, **fields})(model) as session:
            model.generate(**inputs, **{**GREEDY, "max_new_tokens": 24})
    assert session.cache.report().bytes_fraction < 0.7
    if fields.get("policy") == "h2o":
        # Each of 123 queries gives away a mass of 1 a head; what was evicted took some of it along.
        mass = session.cache.crushed_layers[0].groups[0].mass
        assert mass.dtype == torch.float32


def test_gradients(model: Any) -> None:
    """Those of a prompt are the full cache's; through what a cache holds already there are none, and that is said."""
    ids = prompts([60])["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, -1].max(), embeds)
        return found

    full = gradient()
    with KVCrush(**SMALL)(model):
        assert torch.allclose(gradient(), full, atol=1e-6)
        cache = model(input_ids=ids)[CACHE]
        logits = model(inputs_embeds=embeds, **passed(cache)).logits
        with pytest.raises(UnsupportedModelError, match="gradients"):
            torch.autograd.grad(logits[0, -1].max(), embeds)


def test_attention_that_does_not_get_the_keys_of_the_cache() -> None:
    from transformers import DiffLlamaConfig

    diff = AutoModelForCausalLM.from_config(DiffLlamaConfig(**TINY)).eval()
    with pytest.raises(UnsupportedModelError, match="each layer attends twice"), KVCrush(**SMALL)(diff):
        diff.generate(**prompts([60]), **GREEDY)


def test_keys_that_are_repeated_after_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """JetMoE is refused by its name when a block opens; one that nobody has named, in its first pass."""
    jetmoe = build("jetmoe")
    with pytest.raises(UnsupportedModelError, match="repeats its keys once for each chosen expert"):
        KVCrush(**SMALL)(jetmoe)
    monkeypatch.delitem(support._REFUSED_KINDS, "jetmoe")
    torch.manual_seed(0)
    unnamed = AutoModelForCausalLM.from_config(jetmoe.config).eval()
    with pytest.raises(UnsupportedModelError, match="it changes the keys after the cache"), KVCrush(**SMALL)(unnamed):
        unnamed.generate(**prompts([60]), **GREEDY)


@pytest.mark.parametrize("policy", ["readahead", "h2o"])
def test_attention_to_later_tokens_without_a_mask_is_refused(policy: str) -> None:
    """In sdpa and flash attention, a module says itself whether it is causal where there is no mask."""
    both_ways = small_model()
    for layer in both_ways.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="is_causal is False"), KVCrush(**SMALL, policy=policy)(both_ways):
        both_ways.generate(**prompts([60]), **GREEDY)
    # With padding there is a mask, which says it.
    padded = prompts([60, 41])
    with KVCrush(budget=1.0, policy=policy)(both_ways):
        assert torch.equal(both_ways.generate(**padded, **GREEDY), small_model().generate(**padded, **GREEDY))


def test_attention_that_never_follows_the_last_layer() -> None:
    """A model of one layer has no next layer that would notice."""
    from transformers import LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    one = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 1})).eval()
    session, cache = KVCrush(**SMALL)(one), KVCrush(**SMALL).cache(one)
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        with torch.no_grad():
            assert "does not receive the keys" in told(session, lambda: one(**prompts([60]), **passed(cache)))
            with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
                one(**prompts([20]), **passed(session.cache))
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = wrapped


def test_another_attention_call_in_between_is_left_alone(model: Any) -> None:
    """The layer is known by its keys, not by being the next that attends."""
    other = small_model("qwen2")
    seen: list[torch.Tensor] = []
    update = CrushCache.update

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(self, *args, **kwargs)
        if not seen:
            seen.append(other(**prompts([30]), use_cache=False).logits)
        return found

    with torch.no_grad():
        expected = other(**prompts([30]), use_cache=False).logits
        with KVCrush(**SMALL)(model):
            alone = model.generate(**prompts([100]), **GREEDY)
            CrushCache.update = interrupted  # type: ignore[method-assign]
            try:
                found = model.generate(**prompts([100]), **GREEDY)
            finally:
                CrushCache.update = update  # type: ignore[method-assign]
    assert torch.equal(seen[0], expected)
    assert torch.equal(found, alone)


def test_a_full_cache_of_the_users_own_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="DynamicCache"), KVCrush(**SMALL)(model):
        model.generate(**prompts([50]), **GREEDY, **passed(DynamicCache(config=model.config)))


def test_the_attachment_is_shared(model: Any) -> None:
    from crushkv.hf import attachment

    with KVCrush(**SMALL)(model), KVCrush(**SMALL)(model):
        assert isinstance(attachment._attached[model], Attachment) and len(attachment._attached[model].sessions) == 2
        kind_of_cache(model)
    assert model not in attachment._attached


# Masks


def turns(model: Any, cache: Any, pad: int, mask_pads: bool = True) -> torch.Tensor:
    """Two rows, of which the second ends early and is filled up with `pad` tokens, which the next turn's mask hides.

    Returns the second row's logits at the end of the second prompt and along 12 decoded tokens, `[13, V]`.
    """
    first, second = prompts([100, 100])["input_ids"], prompts([20, 20], seed=1)["input_ids"]
    said = prompts([10, 10], seed=2)["input_ids"]
    said[1, 4:] = pad
    mask = torch.ones(2, 150, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=first, attention_mask=mask[:, :100], **passed(cache))
        for i in range(10):  # as generate does it: a finished row goes on with pads, and mask 1
            model(input_ids=said[:, i : i + 1], attention_mask=mask[:, : 101 + i], **passed(cache))
        if mask_pads:
            mask[1, 104:110] = 0
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        parts = [second, *torch.full((12, 2, 1), 7)]
        found, end = [], 110
        for part in parts:
            start, end = end, end + part.shape[1]
            places = position[:, start:end]
            output = model(input_ids=part, attention_mask=mask[:, :end], position_ids=places, **passed(cache))
            found.append(output.logits[1, -1])
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 1.0},
        {"budget": 60, "policy": "streaming_llm", "page_size": 1, "window": 50},
        {"budget": 0.7, "page_size": 1, "interval": 0},
        {"budget": 0.7, "policy": "expected_attention", "interval": 0},
        {"budget": 0.5, "policy": "key_diff", "bits": 8, "recent_bits": 8, "interval": 0},
    ],
    ids=str,
)
def test_pads_between_turns_count_for_nothing(attention: str, fields: dict[str, Any]) -> None:
    model = small_model(attention=attention)
    full = turns(model, DynamicCache(config=model.config), 3)
    found = [turns(model, KVCrush(**{**SMALL, **fields}).cache(model), pad) for pad in (3, 99)]
    assert torch.allclose(found[0], found[1], atol=1e-4)
    if fields["budget"] == 1.0:
        assert torch.allclose(found[0], full, atol=1e-4)
        assert not torch.allclose(turns(model, DynamicCache(config=model.config), 3, mask_pads=False), full, atol=1e-2)


def causal(tokens: int, seen: int | None = None) -> torch.Tensor:
    seen = tokens if seen is None else seen
    return (torch.arange(seen) <= torch.arange(seen - tokens, seen)[:, None])[None, None]


def test_masks_of_ones_own_that_are_right(model: Any) -> None:
    """Causal masks with hidden tokens, bool or additive, for one row or for each."""
    ids = prompts([100])["input_ids"]
    plain = causal(100).clone()
    plain[..., 10:20] = False
    plain[..., 10:20, 10:20] = torch.eye(10, dtype=torch.bool)  # what is hidden may see itself
    additive = torch.zeros(plain.shape).masked_fill(~plain, torch.finfo(torch.float32).min)
    seen = []
    with torch.no_grad():
        for mask in (plain, additive, additive.clamp(min=-1e9), plain.float().log()):
            cache = KVCrush(**SMALL).cache(model)
            seen.append(model(input_ids=ids, attention_mask=mask, **passed(cache)).logits)
            kept = torch.stack([layer.positions for layer in cache.crushed_layers])
            assert not ((kept >= 10) & (kept < 20)).any()
    assert all(torch.allclose(found[:, 20:], seen[0][:, 20:], atol=1e-5) for found in seen)


def soft() -> torch.Tensor:
    mask = torch.zeros(1, 1, 100, 100).masked_fill(~causal(100), torch.finfo(torch.float32).min)
    mask[..., 50:, 20:30] = -0.5
    return mask


def per_head() -> torch.Tensor:
    mask = causal(100).repeat(1, 4, 1, 1)
    mask[:, 2, 50:, :20] = False
    return mask


def holes() -> torch.Tensor:
    mask = causal(100).clone()
    mask[..., 50:60, :20] = False
    return mask


def test_packed_prompts_are_right(model: Any) -> None:
    """Two texts in one row: the second goes on, and no query of it sees the first."""
    ids = prompts([100])["input_ids"]
    mask = causal(100).clone()
    mask[..., 50:, :50] = False
    places = torch.cat([torch.arange(50), torch.arange(50)])[None]
    later = torch.ones(1, 1, 1, 101, dtype=torch.bool)
    later[..., :50] = False
    found = []
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), KVCrush(**{**SMALL, "budget": 60}).cache(model)):
            first = model(input_ids=ids, attention_mask=mask, position_ids=places, **passed(cache)).logits
            second = model(
                input_ids=torch.tensor([[7]]),
                attention_mask=later,
                position_ids=torch.tensor([[50]]),
                **passed(cache),
            ).logits
            found.append(torch.cat([first, second], dim=1))
    assert cache.report().tokens_held == 51  # the first text is gone, and nothing else
    assert torch.allclose(*found, atol=1e-4)


def test_parts_of_a_picture_that_see_each_other(model: Any) -> None:
    """Right for policies that read the last queries; H2O would add up what causal attention gives, so it is refused."""
    ids = prompts([100])["input_ids"]
    mask = causal(100).clone()
    mask[..., 20:40, 20:40] = True
    later = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 101, dtype=torch.long)}
    seen = []
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), KVCrush(budget=1.0).cache(model)):
            model(input_ids=ids, attention_mask=mask, **passed(cache))
            seen.append(model(**later, **passed(cache)).logits)
        assert torch.allclose(*seen, atol=1e-5)
        with pytest.raises(UnsupportedModelError, match="some of them see later tokens"):
            model(input_ids=ids, attention_mask=mask, **passed(KVCrush(**SMALL, policy="h2o").cache(model)))


@pytest.mark.parametrize(
    ("make", "message"), [(soft, "weakens"), (per_head, "differs between heads"), (holes, "from some queries")]
)
def test_masks_that_are_refused(model: Any, make: Any, message: str) -> None:
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=message):
        model(**{"input_ids": prompts([100])["input_ids"], "attention_mask": make()}, **passed(KVCrush().cache(model)))


def test_hidden_tokens_in_the_mass_of_h2o(model: Any) -> None:
    """What is hidden while it is held receives nothing from then on."""
    cache = KVCrush(**{**SMALL, "budget": 60, "policy": "h2o", "interval": 0}).cache(model)
    mask = torch.ones(1, 110, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=prompts([100])["input_ids"], attention_mask=mask[:, :100], **passed(cache))
        layer = cache.crushed_layers[0]
        before = layer.groups[0].mass.clone()
        hidden = layer.positions[0, 0, 20:25]  # of the first KV head
        mask[0, hidden] = 0
        end = cache.prefill_end = 1000  # the queries below are part of a prompt that goes on
        model(input_ids=prompts([10])["input_ids"], attention_mask=mask, **passed(cache))
        assert end > cache.get_seq_length()
    gained = layer.groups[0].mass[..., : before.shape[-1]] - before
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    assert (gained[:, :group, 20:25] == 0).all()
    assert (gained[:, :group].sum(-1) > 0).all()


def test_a_mask_that_shows_padding_again_is_refused(model: Any) -> None:
    cache = KVCrush(**SMALL).cache(model)
    mask = torch.ones(1, 101, dtype=torch.long)
    mask[0, :10] = 0
    with torch.no_grad():
        model(input_ids=prompts([100])["input_ids"], attention_mask=mask[:, :100], **passed(cache))
        mask[0, 5:10] = 1
        with pytest.raises(UnsupportedModelError, match="hid when they were read"):
            model(input_ids=torch.tensor([[7]]), attention_mask=mask, **passed(cache))
