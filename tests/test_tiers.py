"""Quantized and projected tiers in Transformers: bytes, budgets, plans, and all that generation does with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from architectures import ARCHITECTURES, prompts, small_model
from crushkv import ConfigError, CrushConfig, KVCrush, plan_cache
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.stacking import stack
from crushkv.fingerprint import fingerprint
from crushkv.hf import CrushCache
from crushkv.profile import Profile
from crushkv.storage.basis import fit_channels
from crushkv.storage.channels import fitted_spread

CHURN: dict[str, Any] = {"min_tokens": 0, "logit_limit": None, "sink": 2, "window": 8, "page_size": 4, "interval": 8}
TIERS: dict[str, dict[str, Any]] = {
    "4": {"bits": 4},
    "4, equal widths": {"bits": 4, "key_widths": "equal"},
    "4 and 2.25/2": {
        "bits": 4,
        "representative_bits": "2.25/2",
        "representative_share": 0.5,
        "recent_bits": 4,
        "grouping": "score",
    },
    "3/2": {"bits": "3/2"},
    "8 and 2": {"bits": 8, "representative_bits": 2, "representative_share": 0.5},
    "4/3 and 2/3": {"bits": (4, 3), "representative_bits": [2, 3], "representative_share": 0.25, "group_size": 8},
    "rank": {"rank": 6},
    "rank in bits": {"rank": 6, "bits": 4, "representative_bits": 2, "representative_share": 0.25},
    "not rotated": {"bits": 4, "rotation": False},
    "recent in 4": {"bits": 4, "recent_bits": 4},
    "recent in 8": {"bits": 4, "representative_bits": 2, "representative_share": 0.5, "recent_bits": 8},
}
tiers = pytest.mark.parametrize("fields", TIERS.values(), ids=TIERS)


def read(model: Any, config: CrushConfig, batch: dict[str, torch.Tensor]) -> CrushCache:
    cache = CrushCache(model, config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    return cache


def go_on(model: Any, cache: Any, lengths: list[int], steps: int = 20) -> torch.Tensor:
    """Logits `[steps, rows, V]` of the tokens that follow prompts of so many tokens, always the same ones."""
    generator = torch.Generator().manual_seed(3)
    logits = []
    for step, token in enumerate(torch.randint(2, 128, (steps,), generator=generator)):
        positions = torch.tensor(lengths)[:, None] + step
        with torch.no_grad():
            output = model(input_ids=token.expand(len(lengths), 1), position_ids=positions, past_key_values=cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits)


@tiers
@pytest.mark.parametrize("budget", [1.0, 0.5, "25%", 0.125, 60, "12KiB", "40KiB"])
@pytest.mark.parametrize(("policy", "dtype"), [("snapkv", torch.float32), ("pyramidkv", torch.bfloat16)], ids=str)
def test_bytes_are_planned_and_within_the_budget(
    fields: dict[str, Any], budget: Any, policy: str, dtype: torch.dtype
) -> None:
    model = small_model(dtype=dtype)
    config = CrushConfig(budget=budget, policy=policy, **fields, **CHURN)
    cache = read(model, config, prompts([300]))
    raw_bytes = dtype.itemsize
    plan = plan_cache(model.config, config, 300, raw_bytes)
    if isinstance(budget, str) and budget.endswith("B"):
        assert cache.nbytes <= int(budget.removesuffix("KiB")) * 1024
        assert cache.nbytes == plan.nbytes
    else:
        # Fractions count 16 bits a number, whatever the model's dtype.
        halves = plan_cache(model.config, config, 300)
        assert cache.nbytes_at_16_bits == halves.nbytes
        assert cache.nbytes == plan.nbytes
        if not isinstance(budget, int):
            part = 0.25 if budget == "25%" else budget
            assert cache.nbytes_at_16_bits <= part * halves.full_bytes
            assert cache.report().bytes_fraction == halves.fraction <= part
    for layer, split in zip(cache.crushed_layers, plan.layers, strict=True):
        found = torch.bincount(layer.tiers[0, 0].long(), minlength=5).tolist()
        assert found == [0, split.sink, split.important, split.representative, split.recent]


def test_the_spread_of_channels_is_fitted_to_what_the_last_queries_attend_to() -> None:
    model = small_model(attention="eager")
    batch = prompts([300])
    differ = 0
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight *= 30  # so that single tokens get most of the attention
        full = model(**batch, output_attentions=True)
    cache = read(model, CrushConfig(budget=1.0, bits=(3, 3), **CHURN), batch)
    for layer, keys, weights in zip(cache.crushed_layers, full.past_key_values, full.attentions, strict=True):
        storage = layer.storage
        assert storage.bases is not None and storage.bases[0].rope is not None
        positions = storage.positions[..., : storage.blocked]
        plain = fit_channels(keys[0], torch.arange(300)[None, None], None, storage.bases[0].rope)
        numbers = plain.coordinates(keys[0], torch.arange(300)[None, None])
        numbers = numbers.gather(2, positions[..., None].expand(-1, -1, -1, numbers.shape[-1]))
        attended = weights[:, :, -8:].mean(2).unflatten(1, (positions.shape[1], -1)).mean(2).gather(2, positions)
        assert plain.spread is not None
        expected = fitted_spread(plain.spread, [numbers], storage.forms, attended)
        other = fitted_spread(plain.spread, [numbers], storage.forms, None)
        found = storage.bases[0].spread
        assert (found != expected).float().mean() < 0.03
        differ += int((found != other).sum())
    assert differ


def test_fewer_bits_keep_more_tokens_of_the_same_bytes() -> None:
    model = small_model()
    held = {}
    for bits in (16, 8, 4, 3, 2):
        cache = read(model, CrushConfig(budget=0.1, bits=bits, **{**CHURN, "sink": 0, "window": 1}), prompts([400]))
        held[bits] = cache.report().tokens_held
        assert cache.report().bytes_fraction <= 0.1
    assert held[16] < held[8] < held[4] < held[3] < held[2]
    assert held[4] > 2.2 * held[16]


@tiers
@pytest.mark.parametrize("lengths", [[120, 77, 60], [120]], ids=["padded", "one"])
def test_a_batch_keeps_what_each_row_keeps_alone(fields: dict[str, Any], lengths: list[int], tmp_path: Path) -> None:
    model = small_model()
    # Without a profile, widths of channels would be chosen from all rows.
    energies = torch.rand(2, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    made = Profile(*energies, torch.ones(3, 2, 4), model=fingerprint(model, any_dtype=True))
    profile = made.save(tmp_path / "profile")
    config = CrushConfig(budget=0.4, profile=str(profile.path), **fields, **CHURN)
    batch = prompts(lengths)
    # Keys are quantized where RoPE has turned them to.
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = go_on(model, read(model, config, batch), lengths)
    for row, length in enumerate(lengths):
        ids = batch["input_ids"][row : row + 1, -length:]
        alone = go_on(model, read(model, config, {"input_ids": ids}), [length])
        # Codes on the border of two cells may fall to either side.
        assert (alone[:, 0] - together[:, row]).abs().median() < 1e-2


@tiers
def test_rows_are_selected_and_repeated(fields: dict[str, Any]) -> None:
    model = small_model()
    config = CrushConfig(budget=0.4, **fields, **CHURN)
    expected = go_on(model, read(model, config, prompts([120, 77])), [120, 77])
    cache = read(model, config, prompts([120, 77]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    repeated = expected.repeat_interleave(2, dim=1)
    errors = (go_on(model, cache, [77, 77, 120, 120])[:, [2, 3, 0, 1]] - repeated).abs().amax(-1)
    # With other numbers of rows, a number on the border of two cells may fall into either.
    assert errors.median() < 1e-4 and errors.max() < 0.005 * expected.abs().max()


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", name) for name in TIERS]
    + [(other, name) for other in sorted(ARCHITECTURES) if other != "llama" for name in ("4 and 2.25/2", "rank")],
)
def test_generation_goes_on_in_every_way(architecture: str, name: str) -> None:
    model, fields = small_model(architecture), TIERS[name]
    options: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0}
    with KVCrush(budget=0.2, **fields, **CHURN)(model) as session:
        greedy = model.generate(**prompts([120, 77]), **options, do_sample=False)
        pieces = model.generate(**prompts([120, 77]), **options, do_sample=False, prefill_chunk_size=33)
        if "rank" not in fields or "bits" not in fields:  # codes depend on the directions' signs, which are anyone's
            assert torch.equal(greedy, pieces)
        model.generate(**prompts([120, 77]), **options, do_sample=False, num_beams=3)
        model.generate(**prompts([120]), **options, do_sample=True, num_return_sequences=2)
        assert session.cache is not None
        turn = torch.cat([model.generate(**prompts([120]), **options, do_sample=False), torch.full((1, 30), 9)], dim=1)
        second = session.cache
        model.generate(turn, past_key_values=second, **options, do_sample=False)
        assert second.get_seq_length() == 120 + 20 + 30 + 19
        assert second.report().tokens_held < second.report().tokens_seen


def test_eight_bits_are_nearly_the_full_cache() -> None:
    model = small_model()
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts([200]), past_key_values=full)
    expected = go_on(model, full, [200])
    found = go_on(model, read(model, CrushConfig(bits=8, budget=1.0, **CHURN), prompts([200])), [200])
    unit = expected.std()
    assert (found - expected).abs().median() < 0.05 * unit
    coarse = go_on(model, read(model, CrushConfig(bits=2, budget=1.0, **CHURN), prompts([200])), [200])
    assert (coarse - expected).abs().median() > 0.2 * unit


def test_an_interval_of_zero_leaves_what_is_decoded_alone() -> None:
    model = small_model()
    cache = read(model, CrushConfig(bits=4, budget=1.0, **{**CHURN, "interval": 0}), prompts([100]))
    blocked = cache.crushed_layers[0].storage.blocked
    go_on(model, cache, [100], steps=30)
    assert cache.crushed_layers[0].storage.blocked == blocked > 80


@tiers
def test_branches_and_stacks_are_the_direct_cache(fields: dict[str, Any]) -> None:
    model = small_model()
    config = CrushConfig(budget=0.3, **fields, **CHURN)
    ids = prompts([120])["input_ids"]
    direct = read(model, config.replace(interval=0), {"input_ids": ids})
    recording = Recording(model, ids)
    branch = recording.branch(config.replace(interval=0))
    assert isinstance(branch, CrushCache)
    assert branch.nbytes == direct.nbytes
    expected = go_on(model, direct, [120])
    other = recording.branch(CrushConfig(budget=0.5, **{**CHURN, "interval": 0}))
    assert isinstance(other, CrushCache)
    stacked = go_on(model, stack(model, [other, branch]), [120, 120])
    assert torch.allclose(stacked[:, 1:], expected, atol=1e-3)
    assert torch.allclose(go_on(model, branch, [120]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": "4/1"}, "bits='4/1'"),
        ({"bits": True}, "bits=True"),
        ({"bits": "4/4/4"}, "bits='4/4/4'"),
        ({"bits": 4, "representative_bits": 8}, "representative_bits=8"),
        ({"bits": "4/8", "representative_bits": 4, "representative_share": 0.5, "rank": 0}, "rank=0"),
        ({"representative_bits": 4}, "representative_bits=4 beside unquantized"),
        ({"recent_bits": 4}, "recent_bits=4: accepted is no less than bits=16"),
        ({"bits": "4/3", "recent_bits": 3}, "recent_bits=3"),
        ({"bits": 2, "recent_bits": 5}, "recent_bits=5"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": "all"}, "rank='all'"),
        ({"group_size": 0}, "group_size=0"),
        ({"rotation": "yes"}, "rotation='yes'"),
    ],
)
def test_what_is_no_format_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        CrushConfig(**fields)


def test_a_plan_needs_a_known_rank() -> None:
    with pytest.raises(ConfigError, match="rank=0.9"):
        plan_cache(small_model().config, CrushConfig(rank=0.9), 100)


def test_formats_survive_json() -> None:
    config = CrushConfig(bits=(3, 2), representative_bits=(2, 2), representative_share=0.25, rank=0.5)
    assert config.bits == (3, 2) and config.representative_bits == 2
    assert CrushConfig.from_json(config.to_json()) == config
    assert config.to_dict()["bits"] == "3/2"


@pytest.mark.parametrize(("preset", "most"), [("safe", 0.5), ("balanced", 0.25), ("small", 0.125), ("tiny", 0.0625)])
def test_presets_keep_their_promise(preset: str, most: float) -> None:
    model = small_model()
    with KVCrush(preset, window=8, min_tokens=0, logit_limit=None)(model) as session:
        model.generate(**prompts([480]), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert session.cache is not None
    assert session.cache.report().bytes_fraction <= most
    with pytest.raises(ConfigError, match="unknown preset 'huge'"):
        KVCrush("huge")
