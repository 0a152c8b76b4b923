"""Budgets, anchors, signatures and grouping, each against something simpler."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from crushkv.budget import Budget
from crushkv.config import Anchor
from crushkv.core import (
    anchor_bits,
    choose_representatives,
    hamming,
    pack,
    popcount,
    pyramid,
    token_bits,
    unit_signatures,
)
from crushkv.errors import ConfigError


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
