"""A recorded prompt's branches are the caches that reading it with their configurations leaves."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from architectures import ARCHITECTURES, small_model
from crushkv import CrushConfig, KVCrush
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.stacking import stack
from crushkv.hf import CrushCache

CONFIGS = [
    CrushConfig(
        policy=policy,
        budget=budget,
        page_size=page,
        representative_share=share,
        sink=2,
        window=8,
        interval=0,
        min_tokens=0,
    )
    for policy in ("h2o", "snapkv", "pyramidkv", "expected_attention", "random")
    for budget in (0.5, 0.25)
    for page, share in ((1, 0.25), (4, 0.25), (4, 0))
]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_branches_equal_direct_prefills(name: str) -> None:
    model = small_model(name)
    ids = torch.randint(1, model.config.get_text_config(decoder=True).vocab_size, (1, 150))
    recording = Recording(model, ids)
    for config in CONFIGS:
        branch = recording.branch(config)
        direct = CrushCache(model, config)
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=direct).logits[0, -1]
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # H2O's attention is computed by blocks
        close(recording.logits, logits.float())
        assert isinstance(branch, CrushCache)
        assert branch.nbytes == direct.nbytes
        for ours, theirs in zip(branch.crushed_layers, direct.crushed_layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions)
            assert torch.equal(ours.tiers, theirs.tiers)
            close(ours.keys, theirs.keys)
            close(ours.values, theirs.values)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_read_in_pieces_is_the_same_recording(name: str) -> None:
    model = small_model(name)
    ids = torch.randint(1, model.config.get_text_config(decoder=True).vocab_size, (1, 150))
    one, pieces = Recording(model, ids), Recording(model, ids, chunk=33)
    torch.testing.assert_close(one.logits, pieces.logits, rtol=1e-4, atol=1e-4)
    for config in CONFIGS:
        a, b = one.branch(config), pieces.branch(config)
        assert isinstance(a, CrushCache) and isinstance(b, CrushCache)
        for ours, theirs in zip(a.crushed_layers, b.crushed_layers, strict=True):
            assert torch.equal(ours.positions, theirs.positions)


def _greedy(model: torch.nn.Module, cache: object, first: int, count: int) -> torch.Tensor:
    tokens, logits = [first], []
    for _ in range(count):
        with torch.no_grad():
            step = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0, -1]
        logits.append(step)
        tokens.append(int(step.argmax()))
    return torch.stack(logits)


def test_the_full_branch_is_the_full_cache_and_branches_do_not_share() -> None:
    model = small_model("llama")
    ids = torch.randint(1, model.config.vocab_size, (1, 90))
    recording = Recording(model, ids)
    first = int(recording.logits.argmax())
    one = _greedy(model, recording.branch(None), first, 12)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=13, min_new_tokens=13, do_sample=False)[0, 90:]
    assert [first, *one.argmax(-1).tolist()][:13] == expected.tolist()
    again = _greedy(model, recording.branch(None), first, 12)
    torch.testing.assert_close(one, again)
    config = CONFIGS[3]
    torch.testing.assert_close(
        _greedy(model, recording.branch(config), first, 12), _greedy(model, recording.branch(config), first, 12)
    )


def test_stacked_rows_answer_as_they_do_alone() -> None:
    model = small_model("llama")
    ids = torch.randint(1, model.config.vocab_size, (1, 150))
    recording = Recording(model, ids)
    first = int(recording.logits.argmax())
    caches = [cache for config in CONFIGS if isinstance(cache := recording.branch(config), CrushCache)]
    lengths = {cache.crushed_layers[0].tiers.shape[-1] for cache in caches}
    assert len(lengths) > 2, "rows of different lengths are what has to be shown"
    together = stack(model, caches)
    tokens = torch.full((len(caches), 1), first)
    steps = []
    for _ in range(10):
        with torch.no_grad():
            logits = model(input_ids=tokens, past_key_values=together).logits[:, -1]
        steps.append(logits)
        tokens = logits.argmax(-1, keepdim=True)
    for row, config in enumerate(CONFIGS):
        alone = _greedy(model, recording.branch(config), first, 10)
        torch.testing.assert_close(torch.stack([step[row] for step in steps]), alone, rtol=1e-4, atol=1e-4)
        tiers = together.crushed_layers[0].tiers[row]
        held = caches[row].crushed_layers[0].tiers.shape[-1] + 10
        assert int((tiers != 0).sum(-1).max()) == held


def test_only_caches_of_one_prompt_stack() -> None:
    model = small_model("llama")
    caches = []
    for length in (60, 70):
        cache = KVCrush(CONFIGS[0]).cache(model)
        with torch.no_grad():
            model(input_ids=torch.ones((1, length), dtype=torch.long), past_key_values=cache)
        caches.append(cache)
    with pytest.raises(ValueError, match="different lengths"):
        stack(model, caches)


def test_a_recording_is_of_one_prompt() -> None:
    with pytest.raises(ValueError, match=r"\[1, tokens\]"):
        Recording(small_model("llama"), torch.ones((2, 8), dtype=torch.long))
