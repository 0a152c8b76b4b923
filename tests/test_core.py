"""Budgets, anchors, signatures and grouping, each against something simpler."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from crushkv.budget import Budget
from crushkv.config import Anchor, CrushConfig
from crushkv.core import (
    BatchTail,
    Clock,
    Evictor,
    Shares,
    anchor_bits,
    choose_representatives,
    hamming,
    pack,
    popcount,
    pyramid,
    select,
    token_bits,
    unit_signatures,
)
from crushkv.core.zones import divide
from crushkv.errors import ConfigError
from crushkv.importance import LayerView


@pytest.mark.parametrize(
    ("value", "kind", "amount"),
    [
        (0.25, "fraction", "1/4"),
        ("0.25", "fraction", "1/4"),
        ("25%", "fraction", "1/4"),
        (1.0, "fraction", "1"),
        (1, "tokens", "1"),
        ("1024", "tokens", "1024"),
        ("64MiB", "bytes", str(64 * 2**20)),
        ("1.5 kb", "bytes", "1500"),
    ],
)
def test_budget_forms(value: Any, kind: str, amount: str) -> None:
    budget = Budget.parse(value)
    assert (budget.kind, str(budget.amount)) == (kind, amount)


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        -1,
        -0.5,
        1.01,
        25.0,
        float("nan"),
        float("inf"),
        "0",
        "0%",
        "101%",
        "-3",
        "many",
        "",
        "1/0",
        "0MiB",
        "5 TB",
    ]
    + [None, True, [1]],
)
def test_budgets_that_are_refused_name_the_argument(value: Any) -> None:
    with pytest.raises(ConfigError, match="^budget="):
        Budget.parse(value)


def test_fractions_are_exact() -> None:
    """0.29 * 100 is 28.999999999999996 in floats."""
    seen = torch.tensor([100, 7])
    assert Budget.parse(0.29).tokens(seen, 1).tolist() == [29, 2]
    assert Budget.parse(0.1).tokens(torch.tensor([30]), 1).tolist() == [3]


def test_bytes_and_tokens_are_limits() -> None:
    seen = torch.tensor([10, 1000])
    assert Budget.parse(64).tokens(seen, 1).tolist() == [10, 64]
    assert Budget.parse("1KiB").tokens(seen, 10).tolist() == [10, 102]


@given(
    mean=st.integers(1, 500),
    extra=st.integers(0, 3000),
    layers=st.integers(1, 40),
    least=st.integers(0, 40),
    steepness=st.integers(1, 30),
)
def test_pyramid_shrinks_with_depth_and_keeps_the_sum(
    mean: int, extra: int, layers: int, least: int, steepness: int
) -> None:
    tokens, seen = torch.tensor([mean]), torch.tensor([mean + extra])
    budgets = [int(pyramid(tokens, seen, layer, layers, least, steepness)) for layer in range(layers)]
    assert sum(budgets) == mean * layers
    assert budgets == sorted(budgets, reverse=True)
    assert min(budgets) >= min(least, mean)
    assert max(budgets) <= mean + extra


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_popcount(words: list[int]) -> None:
    assert popcount(torch.tensor(words)).tolist() == [bin(word % 2**64).count("1") for word in words]


@pytest.mark.parametrize("length", [1, 9, 63, 64, 65, 144, 512])
def test_packed_distance_equals_the_count_of_differing_bits(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    bits = torch.rand(2, 50, length, generator=generator) < 0.5
    anchor = torch.rand(2, length, generator=generator) < 0.5
    assert pack(bits).shape == (2, 50, (length + 63) // 64)
    assert torch.equal(hamming(pack(bits), pack(anchor)), (bits ^ anchor[:, None]).sum(-1))


def test_an_anchor_of_another_length_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match="anchor of shape"):
        hamming(torch.zeros(2, 5, 3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("name", get_args(Anchor))
def test_anchors_equal_the_reference(name: Anchor) -> None:
    signatures = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    anchors = anchor_bits(name, signatures, real, seed=11)
    for row, units in ((0, 7), (1, 4)):
        expected = reference.anchor(name, signatures[row, :units].int().tolist(), 11)
        assert anchors[row].int().tolist() == expected


def test_token_bits_are_made_per_query_head() -> None:
    """Each query head votes with its own scores: the bits of a group are not those of its sum."""
    scores = torch.tensor([[[9.0, 1, 5, 0], [0, 7, 6, 0]]])
    bits = token_bits(scores, torch.tensor([[1, 2]]))
    assert bits.int().tolist() == [[[1, 0, 0, 0], [0, 1, 1, 0]]]


def test_ties_go_to_the_earlier_token() -> None:
    assert token_bits(torch.zeros(1, 1, 5), torch.tensor([[2]])).int().tolist() == [[[1, 1, 0, 0, 0]]]


def test_page_signature_concatenates_its_tokens_signatures() -> None:
    bits = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 1]]], dtype=torch.bool)  # 2 heads, 4 tokens
    assert unit_signatures(bits, 2).int().tolist() == [[[1, 0, 0, 0], [1, 0, 1, 1]]]


@given(st.integers(1, 40), st.data())
def test_buckets_are_equal_and_each_gives_one(units: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, units))
    order = data.draw(st.permutations(range(units)))
    chosen = choose_representatives(
        torch.tensor([order]), torch.ones(1, 1, units, dtype=torch.bool), torch.tensor([[count]])
    )
    listed = set(chosen[0, 0].nonzero().flatten().tolist())
    assert listed == reference.representatives(order, set(range(units)), count)
    assert len(listed) == count


@given(
    interval=st.integers(0, 9),
    passes=st.lists(st.one_of(st.just(1), st.integers(1, 12)), max_size=40),
    chunked=st.booleans(),
)
def test_a_clock_counts_the_tokens_decoded(interval: int, passes: list[int], chunked: bool) -> None:
    """Against a counter, for prompts whose end is known (`chunked`: the first three passes) and for those without."""
    prompt_end = sum(passes[:3]) if chunked else None
    clock = Clock(interval, prompt_end)
    seen = last = decoded = 0
    for new in passes:
        reading = new > 1 or (prompt_end is not None and seen < prompt_end)
        assert clock.is_prompt(seen, new) == reading
        decoded = decoded if reading else decoded + 1
        due = (prompt_end is None or seen + new >= prompt_end) if reading else decoded == interval
        assert clock.is_point(seen, new, last) == due
        seen += new
        if due:
            last, decoded = seen, 0


@given(
    seen=st.integers(1, 600),
    dropped=st.integers(0, 500),
    budget=st.one_of(st.floats(0.01, 1.0), st.integers(40, 400)),
    page_size=st.sampled_from([1, 3, 16]),
)
def test_a_selection_keeps_as_many_as_its_zones_say(
    seen: int, dropped: int, budget: float | int, page_size: int
) -> None:
    config = CrushConfig(budget=budget, min_tokens=0, sink=4, window=8, page_size=page_size)
    held = max(1, seen - dropped)
    share = torch.tensor([Shares(config, layers=1).alike(seen, bytes_per_token=2)])
    kept = divide(held, int(share), config).kept
    assert divide(torch.tensor([held]), share, config).kept.tolist() == [kept]  # of several rows, as of one
    selection = select(torch.rand(1, 2, held), 2, share, config)
    assert selection.counts.tolist() == [kept] and selection.kept.indices.shape == (1, 2, kept)
    assert min(held, 12) <= kept <= held and kept <= max(int(share), 12)


def test_the_tail_of_a_batch_keeps_the_last_queries_and_which_are_real() -> None:
    """Whatever the passes, against the whole history."""
    generator = torch.Generator().manual_seed(2)
    tail = BatchTail(5)
    history = torch.zeros(3, 2, 0, 4)
    flags = torch.ones(3, 0, dtype=torch.bool)
    for step in range(80):
        new = 1 if step % 3 else int(torch.randint(1, 12, (1,), generator=generator))
        queries = torch.randn((history.shape[0], 2, new, 4), generator=generator)
        real = None if step % 4 == 0 else torch.rand((history.shape[0], new), generator=generator) < 0.8
        joined, joined_real = tail.joined(queries, real)
        held = tail.count
        assert torch.equal(joined, torch.cat([history[:, :, history.shape[2] - held :], queries], dim=2))
        tail.append(queries, real)
        history = torch.cat([history, queries], dim=2)
        flags = torch.cat([flags, torch.ones(queries.shape[0], new) > 0 if real is None else real], dim=1)
        if joined_real is not None:
            assert torch.equal(joined_real, flags[:, -held - new :])
        if step == 40:
            tail.clear()
            history, flags = history[:, :, :0], flags[:, :0]
            continue
        if step == 20:
            tail.select_rows(torch.tensor([2, 0, 0, 1]))
            history, flags = history[[2, 0, 0, 1]], flags[[2, 0, 0, 1]]
        if step == 30:
            flags[:, -tail.count :] = False
            tail.show(flags[:, -tail.count :])
        assert tail.queries is not None and torch.equal(tail.queries, history[:, :, -5:])
        assert torch.equal(flags[:, -5:], torch.ones_like(flags[:, -5:]) if tail.real is None else tail.real)


def test_the_attention_that_tokens_receive_is_that_of_the_last_queries_or_what_was_gathered() -> None:
    torch.manual_seed(4)
    keys, queries = torch.randn(2, 2, 30, 8), torch.randn(2, 4, 20, 8)
    view = LayerView(keys, keys, queries, 0.3, queries_real=torch.ones(2, 20, dtype=torch.bool))
    found = Evictor(CrushConfig(policy="snapkv")).attended(view)
    assert found is not None
    logits = queries[:, :, -8:] @ keys.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    future = torch.arange(30) > torch.arange(22, 30)[:, None]
    expected = logits.masked_fill(future, -torch.inf).softmax(-1).mean(2)
    torch.testing.assert_close(found, expected)

    h2o = Evictor(CrushConfig(policy="h2o"))
    gathered = h2o.gather(view)
    assert h2o.attended(LayerView(keys, keys, None, 0.3, mass=gathered)) is gathered
    assert Evictor(CrushConfig(policy="key_norm")).attended(LayerView(keys, keys, None, 0.3)) is None
