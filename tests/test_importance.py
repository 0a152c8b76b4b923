"""Importance policies: exact mass without S x S, and what each policy promises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from crushkv import CrushConfig
from crushkv.config_text import parse_config
from crushkv.errors import ConfigError, ScoreError
from crushkv.importance import (
    LayerView,
    Policy,
    attention_mass,
    attention_with_mass,
    greatest_attention,
    make_policy,
    policies,
    register,
    registry,
    scores,
)


def tensors(rows: int = 2, tokens: int = 50, queries: int | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    count = tokens if queries is None else queries
    return (
        torch.randn(rows, 6, count, 8, generator=generator) * 2,
        torch.randn(rows, 2, tokens, 8, generator=generator),
        torch.randn(rows, 2, tokens, 8, generator=generator),
    )


def padded(rows: int, tokens: int, padding: int) -> torch.Tensor:
    real = torch.ones(rows, tokens, dtype=torch.bool)
    real[1, :padding] = False
    return real


@pytest.mark.parametrize("block_bytes", [1, 10_000, 2**25])
@pytest.mark.parametrize("queries", [1, 7, 50])
@pytest.mark.parametrize("padding", [0, 20])
def test_attention_mass_is_exact(block_bytes: int, queries: int, padding: int) -> None:
    query, key, value = tensors(queries=queries)
    real = padded(2, 50, padding) if padding else None
    last = None if real is None else real[:, -queries:]
    ours = attention_mass(LayerView(key, value, query, 0.35, real), last, block_bytes)
    assert torch.allclose(ours.double(), reference.attention_mass(query, key, 0.35, real), atol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 50])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_greatest_attention_is_that_of_one_query(queries: int, sinks: bool) -> None:
    query, key, value = tensors(queries=queries)
    beside = torch.linspace(-1, 1, query.shape[1]) if sinks else None
    ours = greatest_attention(LayerView(key, value, query, 0.35, softcap=2.0, sinks=beside))
    logits = 2.0 * torch.tanh(query @ key.repeat_interleave(3, dim=1).transpose(-1, -2) * 0.35 / 2.0)
    logits = logits.masked_fill(torch.ones(queries, 50, dtype=torch.bool).triu(50 - queries + 1), -math.inf)
    if beside is not None:
        logits = torch.cat([logits, beside[None, :, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    torch.testing.assert_close(ours, logits.softmax(-1)[..., :50].amax(2))


@pytest.mark.parametrize("block_bytes", [1, 10_000, None])
@pytest.mark.parametrize("queries", [1, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_mass_in_one_pass(block_bytes: int | None, queries: int, dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in tensors(queries=queries))
    view = LayerView(key, value, query, 0.35)
    output, mass = attention_with_mass(view, block_bytes)
    future = torch.ones(queries, 50, dtype=torch.bool).triu(50 - queries + 1)
    repeated = (x.float().repeat_interleave(3, dim=1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query.float(), *repeated, attn_mask=~future, scale=0.35)
    torch.testing.assert_close(output, expected.to(dtype))
    assert torch.equal(mass, attention_mass(view, block_bytes=block_bytes))


def test_h2o_in_chunks_equals_h2o_at_once() -> None:
    query, key, value = tensors()
    policy = make_policy("h2o")
    mass = None
    for start, end in ((0, 13), (13, 14), (14, 50)):
        view = LayerView(key[:, :, :end], value[:, :, :end], query[:, :, start:end], 0.35, mass=mass)
        mass = policy.accumulate(view)
    assert mass is not None
    assert torch.allclose(mass.double(), reference.attention_mass(query, key, 0.35), atol=1e-5)


def test_h2o_stays_far_below_eager_attention_in_memory() -> None:
    """At 8k tokens the weights of one block are held, not S x S of them: measured as the largest tensor made."""
    tokens, heads = 8192, 9
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    query, key = torch.randn(1, heads, tokens, 8), torch.randn(1, 3, tokens, 8)
    with Watch():
        attention_mass(LayerView(key, key, query, 0.35))
    eager = heads * tokens * tokens * 4
    assert largest * 2 < 0.05 * eager, f"{largest / 2**20:.0f} MiB, eager needs {eager / 2**20:.0f} MiB"


@pytest.mark.parametrize("ahead", [0, 5, 60])
@pytest.mark.parametrize("kernel", [1, 3])
def test_snapkv_is_the_smoothed_attention_of_the_window(kernel: int, ahead: int) -> None:
    query, key, value = tensors(queries=8)
    score = make_policy("snapkv", {"kernel": kernel, "ahead": ahead}).score(LayerView(key, value, query, 0.35))
    mass = reference.attention_mass(query, key, 0.35) / 8
    beside = kernel // 2
    for token in range(42):
        expected = mass[..., max(0, token - beside - ahead) : min(42, token + beside + 1)].amax(-1)
        assert torch.allclose(score[..., token].double(), expected, atol=1e-6)
    assert torch.allclose(score[..., 42:].double(), mass[..., 42:], atol=1e-6), "the window lends nothing"


def test_snapkv_by_averages() -> None:
    query, key, value = tensors(queries=8)
    score = make_policy("snapkv", {"kernel": 3, "ahead": 2, "pooling": "avg"}).score(LayerView(key, value, query, 0.35))
    mass = reference.attention_mass(query, key, 0.35) / 8
    for token in range(42):
        expected = mass[..., max(0, token - 3) : min(42, token + 2)].sum(-1) / 5
        assert torch.allclose(score[..., token].double(), expected, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 45])
def test_snapkv_with_later_queries_and_the_norm_of_values(padding: int) -> None:
    query, key, value = tensors(queries=8)
    real = padded(2, 50, padding) if padding else None
    last = None if real is None else real[:, -8:]
    options = {"kernel": 1, "half_life": 3, "value_norm": True}
    score = make_policy("snapkv", options).score(LayerView(key, value, query, 0.35, real, last))
    for row, head in ((0, 0), (0, 5), (1, 4)):
        first = padding if row else 0
        weights = {}
        for place in range(max(42, first), 50):
            logits = query[row, head, place - 42] @ key[row, head // 3, first : place + 1].T * 0.35
            weights[place] = F.pad(logits.softmax(-1), (first, 49 - place))
        shares = torch.tensor([0.5 ** ((49 - place) / 3) for place in weights])
        mass = (torch.stack(list(weights.values())) * shares[:, None]).sum(0) / shares.sum()
        expected = mass * value[row, head // 3].square().sum(-1).sqrt()
        assert torch.allclose(score[row, head, first:], expected[first:], atol=1e-6)


def test_readahead_is_snapkv_with_other_defaults() -> None:
    query, key, value = tensors(queries=8)
    view = LayerView(key, value, query, 0.35)
    same = {"ahead": 16, "half_life": 8, "value_norm": True}
    assert torch.equal(make_policy("readahead").score(view), make_policy("snapkv", same).score(view))
    none = {"ahead": 0, "half_life": 0, "value_norm": False}
    assert torch.equal(make_policy("readahead", none).score(view), make_policy("snapkv").score(view))


def test_tova_reads_the_last_query_only() -> None:
    query, key, value = tensors(queries=1)
    score = make_policy("tova").score(LayerView(key, value, query, 0.35))
    assert torch.allclose(score.double(), reference.attention_mass(query, key, 0.35), atol=1e-6)


def test_expected_attention_estimates_the_attention_of_gaussian_queries() -> None:
    """With many queries drawn from a Gaussian, the closed form agrees with the mean over fresh draws."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.randn(4, generator=generator), torch.randn(4, 4, generator=generator) * 0.5
    sample = (torch.randn(2, 20_000, 4, generator=generator) @ spread + mean).unsqueeze(1)
    key, value = torch.randn(2, 1, 30, 4, generator=generator), torch.ones(2, 1, 30, 4)
    policy = make_policy("expected_attention", {"samples": 20_000})
    score = policy.score(LayerView(key, value, sample, 0.5)).squeeze(1)
    fresh = torch.randn(2, 20_000, 4, generator=generator) @ spread + mean
    unnormalised = (fresh @ key[:, 0].transpose(-1, -2) * 0.5).exp().mean(1)
    expected = unnormalised / unnormalised.sum(-1, keepdim=True) * math.sqrt(4)
    assert torch.allclose(score, expected, rtol=0.1)


def test_key_norm_and_key_diff_rank_as_their_papers_say() -> None:
    key = torch.tensor([[[[3.0, 0], [1, 0], [0, 2]]]])
    view = LayerView(key, key, None, 1.0)
    assert make_policy("key_norm").score(view)[0, 0].argmax() == 1
    assert make_policy("key_diff").score(view)[0, 0].argmax() == 2


def test_random_is_drawn_from_its_seed() -> None:
    query, key, value = tensors()
    policy = make_policy("random")
    first, again, other = (policy.score(LayerView(key, value, None, 1.0, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", policies())
def test_scores_do_not_see_padding(name: str) -> None:
    """The same row with and without padding in front gets the same scores (but for random ones)."""
    policy = make_policy(name)
    query, key, value = tensors()
    real = padded(2, 50, 20)

    def score(row: slice, start: int, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = query[row, :, start:], key[row, :, start:], value[row, :, start:]
        mass = policy.accumulate(LayerView(k, v, q, 0.35, mask, mask)) if policy.streams else None
        tail = policy.queries(8)
        last = None if mask is None else mask[:, -tail:]
        return policy.score(LayerView(k, v, q[:, :, -tail:] if tail else None, 0.35, mask, last, mass))

    batch = score(slice(0, 2), 0, real)[1, :, 20:]
    alone = score(slice(1, 2), 20, None)[0]
    assert torch.isfinite(batch).all()
    if name == "streaming_llm":
        alone = alone + 20
    if name == "random":
        assert batch.shape == alone.shape
    else:
        assert torch.allclose(batch, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapvk", {}, "Did you mean 'snapkv'"),
        ("snapkv", {"kernal": 3}, "no option 'kernal'. Did you mean 'kernel'"),
        ("snapkv", {"kernel": 4}, "kernel=4"),
        ("snapkv", {"kernel": True}, "kernel=True"),
        ("snapkv", {"ahead": -1}, "ahead=-1: accepted is an integer of at least 0"),
        ("snapkv", {"half_life": -1.0}, "half_life=-1.0: accepted is a number of at least 0"),
        ("snapkv", {"half_life": float("nan")}, "half_life=nan: accepted is a number of at least 0"),
        ("snapkv", {"value_norm": 1}, "value_norm=1: accepted is true or false"),
        ("snapkv", {"pooling": "sum"}, "pooling='sum'"),
        ("expected_attention", {"epsilon": "abc"}, "epsilon='abc'"),
        ("pyramidkv", {"steepness": 0}, "steepness=0"),
        ("expected_attention", {"samples": 0}, "samples=0"),
        ("h2o", {"kernel": 3}, "no options"),
    ],
)
def test_bad_names_and_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CrushConfig(policy=name, policy_options=options)


@dataclass(frozen=True)
class Newest(Policy):
    name = "newest_first"
    paper = "none"

    def score(self, view: LayerView) -> torch.Tensor:
        return torch.zeros(view.keys.shape[:3])


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_failed", {})
    registry._load_entry_points.cache_clear()
    yield
    registry._load_entry_points.cache_clear()


@pytest.mark.usefixtures("fresh_registry")
def test_a_third_party_policy_comes_through_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("newest", f"{__name__}:Newest", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.ENTRY_POINTS else [])
    assert isinstance(CrushConfig(policy="newest_first").make_policy(), Policy)


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("value", ["no_such_package:Policy", "json:dumps", "json:no_such_name"])
def test_a_policy_that_does_not_load_fails_for_its_own_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entries = [EntryPoint("gone", value, registry.ENTRY_POINTS), EntryPoint("newest", f"{__name__}:Newest", "")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    assert CrushConfig().policy == "readahead" and "newest_first" in policies()
    for make in (lambda: CrushConfig(policy="gone"), lambda: parse_config("gone:budget=0.5")):
        with pytest.raises(ConfigError, match=f"policy='gone': the entry point '{value}' does not load"):
            make()
    assert list(registry.failed_policies()) == ["gone"]


def test_two_policies_of_one_name() -> None:
    with pytest.raises(ConfigError, match="registered twice"):
        register(type("Other", (Newest,), {"name": "h2o"}))


@pytest.mark.parametrize("cut", [(slice(None), slice(None), slice(1, None)), (slice(1), slice(None), slice(None)), 0])
def test_scores_of_another_shape_are_refused(cut: object) -> None:
    @dataclass(frozen=True)
    class Cut(Policy):
        name = "cut"
        paper = "none"

        def score(self, view: LayerView) -> torch.Tensor:
            return view.keys.sum(-1)[cut]

    _, keys, values = tensors()
    with pytest.raises(ScoreError, match=r"policy 'cut' gave scores of shape .*: expected \[2, heads, 50\]"):
        scores(Cut(), LayerView(keys=keys, values=values, queries=None, scaling=1.0))
