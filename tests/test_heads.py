"""Budgets by head: what a profile says that heads need, and caches whose heads hold different numbers of tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from architectures import ARCHITECTURES, SMALL, prompts, small_model
from crushkv import ConfigError, CrushConfig, KVCrush, load_cache, profile_model, save_cache
from crushkv.core import HeadNeeds, Shares
from crushkv.core import heads as head_budgets
from crushkv.core.heads import alike, curve, levels
from crushkv.evaluation.inspection import inspect_prompt
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.stacking import stack
from crushkv.evaluation.token_text import tokenize
from crushkv.hf import CrushCache
from crushkv.hf.planning import plan_cache
from crushkv.profile import Profile
from crushkv.storage import LayerSizes
from model_zoo import build
from oracle import record, replay
from test_oracle import BORDERLINE, CHURN, QUANTIZED, TOLERANCE
from test_profile import letters


def scores_of(layers: int, heads: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """Heads that are as unlike as those of real models: some look at single tokens, and some at none."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.randn(layers, heads, 1, generator=generator).mul(3).exp()
    return torch.rand(layers, heads, tokens, generator=generator) * sharpness


# What heads need


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.25, 0.5, 0.9])
def test_needs_are_what_tokens_win_that_compete(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_budgets, "WEIGHT", 1.0)
    scores = scores_of(4, 3, 4096)
    needs = HeadNeeds(curve(scores))
    limit = scores.flatten().sort(descending=True).values[int(mean * scores.numel())]
    expected = (scores > limit).double().mean(-1)
    found = torch.stack([needs.parts(layer, torch.tensor([mean]))[0] for layer in range(4)])
    assert (found - expected).abs().max() < 0.05  # levels are at most that far apart
    assert found.mean() == pytest.approx(mean)


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_parts_are_parts_and_have_the_mean_that_was_asked_for(seed: int, mean: float, layers: int, heads: int) -> None:
    needs = HeadNeeds(curve(scores_of(layers, heads, 100, seed)))
    asked = torch.tensor([mean], dtype=torch.float64)
    parts = torch.cat([needs.parts(layer, asked) for layer in range(layers)])
    assert bool(((parts >= 0) & (parts <= 1 + 1e-9)).all()) and parts.mean() == pytest.approx(mean, abs=1e-9)


def test_a_curve_has_the_scores_at_its_levels() -> None:
    scores = torch.arange(1000).float().flip(0)
    assert levels()[-1] == 1 and bool((levels().diff() > 0).all())
    assert curve(scores)[0] == 999 and bool((curve(scores).diff() <= 0).all())
    assert curve(scores)[31] == 999 - 242  # between (31 / 64) ** 2 and (32 / 64) ** 2 of a thousand tokens


def test_heads_without_needs_are_alike() -> None:
    needs = HeadNeeds(torch.zeros(3, 4, head_budgets.STEPS))
    assert needs.groups(0, 0.3) == [(0, 1, 2, 3)] or len(needs.groups(0, 0.3)) <= head_budgets.MOST_GROUPS


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
@settings(max_examples=100, deadline=None)
def test_groups_are_the_best_of_all_ways_to_cut(parts: list[float]) -> None:
    def error(groups: list[tuple[int, ...]]) -> float:
        total = 0.0
        for group in groups:
            mean = sum(parts[h] for h in group) / len(group)
            total += sum((parts[h] - mean) ** 2 for h in group)
        return total

    found = alike(parts)
    assert sorted(itertools.chain(*found)) == list(range(len(parts))) and len(found) <= head_budgets.MOST_GROUPS
    order = sorted(range(len(parts)), key=lambda head: parts[head])
    for count in range(1, len(found) + 1):
        cuts = itertools.combinations(range(1, len(parts)), count - 1)
        ways = [[tuple(order[a:b]) for a, b in itertools.pairwise((0, *cut, len(parts)))] for cut in cuts]
        best = min(map(error, ways))
        limit = head_budgets.ALIKE**2 * len(parts)
        assert best > limit if count < len(found) else error(found) == pytest.approx(best, abs=1e-12)


# How many tokens that makes


@pytest.mark.parametrize("tokens", [700, 4096])
@pytest.mark.parametrize(
    "fields",
    [{"budget": 0.25}, {"budget": 300}, {"budget": "1MiB"}, {"budget": 0.1, "bits": 4}, {"budget": "500KiB", "bits": 3}]
    + [CrushConfig.preset(name).to_dict() for name in ("small", "tiny")],
    ids=str,
)
def test_the_sum_over_heads_and_layers_is_the_budget(fields: dict[str, Any], tokens: int) -> None:
    layers, heads = 6, 4
    config = CrushConfig(**{**fields, "heads": "equal"})
    sizes = LayerSizes(config.formats, heads, (64, 64), (64, 64), 2)
    equal = Shares(config, layers)
    by_need = Shares(config, layers, HeadNeeds(curve(scores_of(layers, heads))))
    seen = torch.tensor([tokens])
    page = sizes.raw(1) // heads * config.page_size
    held_equal, held, kept = 0, 0, []
    for layer in range(layers):
        held_equal += equal.split(layer, tokens, sizes).nbytes
        held += by_need.split(layer, tokens, sizes).nbytes
        for group in by_need.groups(layer, tokens, sizes):
            own = int(by_need.tokens(layer, seen, seen, replace(sizes, kv_heads=len(group)), group))
            kept += [own] * len(group)
    assert abs(held - held_equal) <= layers * heads * page
    assert min(kept) >= config.sink + config.window and max(kept) <= tokens
    assert max(kept) > 1.5 * min(kept), "all heads keep as many, so nothing was tested"


def test_a_budget_for_everything_parts_no_heads() -> None:
    config = CrushConfig(budget=1.0, bits=4)
    sizes = LayerSizes(config.formats, 4, (64, 64), (64, 64), 2)
    shares = Shares(config, 2, HeadNeeds(curve(scores_of(2, 4))))
    assert shares.groups(0, 1000, sizes) == [(0, 1, 2, 3)]
    assert shares.groups(0, 100, sizes) == [(0, 1, 2, 3)]  # untouched


def test_what_needs_equal_heads_is_refused_beside_a_profile() -> None:
    with pytest.raises(ConfigError, match="grouping='score'"):
        CrushConfig(heads="profile", representative_share=0.1)
    with pytest.raises(ConfigError, match="divide the budget among"):
        CrushConfig(heads="profile", policy="pyramidkv")
    with pytest.raises(ConfigError, match="heads='profil'"):
        CrushConfig(heads="profil")


# Caches


def four_heads() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4})).eval()


def profiled(model: Any, folder: Path, seed: int = 0) -> str:
    """A profile of the model, with needs of heads that are unlike: those of random models are all alike."""
    made = profile_model(model, letters())
    needs = curve(scores_of(*made.needs.shape[:2], seed=seed))
    return str(replace(made, needs=needs).save(folder / f"profile{seed}.safetensors").path)


def configured(model: Any, folder: Path, **fields: Any) -> CrushConfig:
    fields = {"budget": 0.4, "page_size": 4, **CHURN, **fields}
    return CrushConfig(**fields, heads="profile", profile=profiled(model, folder))


FORMATS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "h2o": {"policy": "h2o", "interval": 3},
    "4 bits": {"budget": 0.2, "bits": 4, "logit_limit": None},
    "two tiers": {**QUANTIZED["4 and 1.5/2, recent in 8"], "budget": 0.25, "logit_limit": None},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [None, 33], ids=["one-prefill", "chunked"])
@pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("architecture", ["four heads", "qwen2", "phi3", "gemma3"])
def test_logits_are_those_of_the_full_cache_with_evicted_tokens_masked(
    architecture: str, fields: dict[str, Any], chunk: int | None, attention: str, tmp_path: Path
) -> None:
    """A padded batch, several turns, evictions while decoding; quantized tokens are rounded."""
    model = four_heads() if architecture == "four heads" else small_model(architecture)
    model.set_attn_implementation(attention)
    config = configured(model, tmp_path, **fields)
    options: dict[str, Any] = {} if chunk is None else {"prefill_chunk_size": chunk}
    recording = record(model, config, prompts([120, 77, 31]), turns=2, max_new_tokens=12, **options)
    layers = recording.cache.crushed_layers
    assert any(layer.parted for layer in layers)
    assert len({group.storage.length for layer in layers for group in layer.groups}) > 1
    errors = [(a - b).abs().amax(-1) for a, b in zip(recording.logits, replay(model, recording), strict=True)]
    if config.formats.raw:
        assert torch.stack(errors).max() < TOLERANCE
    else:
        assert torch.stack(errors).median() < 10 * TOLERANCE
        assert torch.stack(errors).max() < BORDERLINE * max(float(x.abs().max()) for x in recording.logits)


@pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
def test_what_is_held_is_what_the_plan_says(fields: dict[str, Any], tmp_path: Path) -> None:
    model = four_heads()
    config = configured(model, tmp_path, **fields)
    cache = KVCrush(config).cache(model)
    with torch.no_grad():
        model(**prompts([120]), past_key_values=cache)
    plan = plan_cache(model.config, config, 120, 4, Profile.load(Path(str(config.profile))))
    equal = plan_cache(model.config, config.replace(heads="equal"), 120, 4)
    held = [sum(group.storage.nbytes for group in layer.groups) for layer in cache.crushed_layers]
    assert held == [layer.nbytes for layer in plan.layers]
    assert abs(plan.nbytes - equal.nbytes) < 0.1 * equal.nbytes
    assert plan.heads is not None
    for layer, kept in zip(cache.crushed_layers, plan.heads, strict=True):
        assert [int((tiers != 0).sum()) for tiers in layer.tiers[0]] == list(kept)


@pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
def test_a_loaded_cache_goes_on_bit_for_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    model = four_heads()
    config = configured(model, tmp_path, **fields)
    cache = KVCrush(config).cache(model)
    batch = prompts([120, 77])
    tokens = model.generate(**batch, past_key_values=cache, do_sample=False, max_new_tokens=5, pad_token_id=0)
    save_cache(tmp_path / "a.safetensors", cache, model, tokens[:, : cache.get_seq_length()])
    loaded = load_cache(tmp_path / "a.safetensors", model).cache()
    assert loaded.report().tiers == cache.report().tiers and any(layer.parted for layer in loaded.crushed_layers)

    def go_on(cache: CrushCache) -> Tensor:
        new, logits = torch.full((2, 1), 7), []
        for _ in range(20):
            with torch.no_grad():
                logits.append(model(input_ids=new, past_key_values=cache).logits[:, -1])
            new = logits[-1].argmax(-1, keepdim=True)
        return torch.stack(logits)

    assert torch.equal(go_on(loaded), go_on(cache))


def test_beams_and_samples_are_rows(tmp_path: Path) -> None:
    """Beams that are all the same answer give the greedy one; rows can be taken out and repeated."""
    model = four_heads()
    config = configured(model, tmp_path, bits=4)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    batch = prompts([120])
    with KVCrush(config)(model) as session:
        greedy = model.generate(**batch, **options)
        assert session.cache is not None and any(layer.parted for layer in session.cache.crushed_layers)
        beams = model.generate(**batch, num_beams=3, num_return_sequences=3, **options)
        assert session.cache.crushed_layers[1].batch_size == 3
    assert beams.shape == (3, 144) and greedy.shape == (1, 144)

    cache = KVCrush(config).cache(model)
    with torch.no_grad():
        model(**prompts([120, 77]), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        logits = model(input_ids=torch.tensor([[3], [3], [3]]), past_key_values=cache).logits[:, -1]
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])


def test_a_branch_of_a_recording_is_the_cache_itself(tmp_path: Path) -> None:
    model = four_heads()
    ids = prompts([120])["input_ids"]
    recording = Recording(model, ids)
    configs = [configured(model, tmp_path, **fields) for fields in FORMATS.values()]
    branches = [recording.branch(config.replace(interval=0)) for config in configs]
    for config, branch in zip(configs, branches, strict=True):
        cache = KVCrush(config).cache(model)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        for ours, theirs in zip(branch.crushed_layers, cache.crushed_layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions) and torch.equal(ours.tiers, theirs.tiers)
    together = stack(model, branches)  # type: ignore[arg-type]
    new = torch.tensor([[9]])
    with torch.no_grad():
        logits = model(input_ids=new.expand(len(branches), 1), past_key_values=together).logits[:, -1]
        for row, branch in enumerate(branches):
            alone = model(input_ids=new, past_key_values=branch).logits[0, -1]
            assert (alone - logits[row]).abs().max() < 10 * TOLERANCE
        # Some answers have ended: the others go on without them.
        left = list(range(len(branches)))[1:]
        together.batch_select_indices(torch.tensor(left))
        logits = model(input_ids=new.expand(len(left), 1), past_key_values=together).logits[:, -1]
        for row, number in enumerate(left):
            alone = model(input_ids=new, past_key_values=branches[number]).logits[0, -1]
            assert (alone - logits[row]).abs().max() < 10 * TOLERANCE


def test_inspect_shows_what_each_head_keeps(tmp_path: Path) -> None:
    model = four_heads()
    config = configured(model, tmp_path)
    prompt = tokenize(letters(), "The quick brown fox jumps over the lazy dog. " * 4)
    inspection = inspect_prompt(model, prompt, config)
    kept = (inspection.tiers != 0).sum(-1)
    assert int(kept.min()) < int(kept.max()) and bool((inspection.tiers[:, :, 0] != 0).all())
    assert inspection.report.heads == "by profile"


def test_where_heads_stay_together_the_report_says_why(tmp_path: Path) -> None:
    sinks = build("gpt_oss")
    assert "sinks" in report_of(sinks, tmp_path)
    assert report_of(four_heads(), tmp_path) == "by profile"
    with pytest.warns(UserWarning, match="all heads keep the same number of tokens"):
        cache = KVCrush(CrushConfig(heads="profile")).cache(four_heads())
    assert cache.report().heads == "equal (there is no profile)"


def report_of(model: Any, folder: Path) -> str:
    return CrushCache(model, CrushConfig(heads="profile", profile=profiled(model, folder))).report().heads


def test_gradients_through_parted_heads_are_refused(tmp_path: Path) -> None:
    model = four_heads()
    cache = KVCrush(configured(model, tmp_path)).cache(model)
    with torch.no_grad():
        model(**prompts([120]), past_key_values=cache)
    embedded = model.get_input_embeddings()(torch.tensor([[3, 4]])).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, past_key_values=cache).logits
    with pytest.raises(Exception, match="gradients through a compressed cache"):
        logits.sum().backward()


def test_architectures_that_are_tested_here_exist() -> None:
    assert {"qwen2", "phi3", "gemma3"} <= set(ARCHITECTURES)
