"""The batched selection against the plain reference, and every property it promises."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from crushkv.config import Anchor, CrushConfig
from crushkv.core import Tier, select
from crushkv.errors import ScoreError


@st.composite
def cases(draw: st.DrawFn) -> dict:
    config = CrushConfig(
        sink=draw(st.integers(0, 4)),
        window=draw(st.integers(1, 6)),
        page_size=draw(st.sampled_from([1, 1, 2, 3, 8])),
        representative_share=draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9])),
        anchor=draw(st.sampled_from(get_args(Anchor))),
        grouping=draw(st.sampled_from(["signature", "signature", "position", "random", "score"])),
        aggregate=draw(st.sampled_from(["mean", "max"])),
    )
    rows, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 4]))  # powers of two: means of integers are exact
    tokens = draw(st.integers(1, 60))
    values = draw(st.sampled_from([2, 4, 50]))  # few values make many ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    head_score = torch.randint(0, values, (rows, kv_heads * group, tokens), generator=generator).float()
    real = None
    if draw(st.booleans()):
        real = torch.rand((rows, tokens), generator=generator) < draw(st.sampled_from([0.5, 0.9]))
        real[:, -1] = True
    count = torch.full((rows,), tokens) if real is None else real.sum(-1)
    fraction = draw(st.floats(0, 1))
    budget = torch.maximum((count * fraction).long(), count.clamp(max=config.sink + config.window))
    return {
        "head_score": head_score,
        "kv_heads": kv_heads,
        "budget": budget,
        "config": config,
        "real": real,
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=400, deadline=None)
@given(cases())
def test_equals_the_plain_reference(case: dict) -> None:
    selection = select(**case)
    rows, _, tokens = case["head_score"].shape
    real = torch.ones(rows, tokens, dtype=torch.bool) if case["real"] is None else case["real"]
    counts = zip(real.sum(-1).tolist(), case["budget"].tolist(), strict=True)
    most_units = max(reference.zones(count, budget, case["config"])[2] for count, budget in counts)
    for row in range(rows):
        expected = reference.select_row(
            case["head_score"][row],
            case["kv_heads"],
            int(case["budget"][row]),
            case["config"],
            real[row].tolist(),
            case["seed"],
            most_units,
        )
        for head in range(case["kv_heads"]):
            tiers = selection.kept.tiers[row, head]
            shown = [
                (t, tier)
                for t, tier in zip(selection.kept.indices[row, head].tolist(), tiers.tolist(), strict=True)
                if tier != Tier.PADDING
            ]
            assert shown == list(expected[head].items())


@settings(max_examples=300, deadline=None)
@given(cases(), st.sampled_from(["signature", "random", "position"]))
def test_properties_of_the_result(case: dict, grouping: str) -> None:
    config = CrushConfig(**{**vars(case["config"]), "grouping": grouping})
    case = {**case, "config": config}
    selection = select(**case)
    rows, _, tokens = case["head_score"].shape
    real = torch.ones(rows, tokens, dtype=torch.bool) if case["real"] is None else case["real"]
    again = select(**case)
    assert torch.equal(selection.kept.indices, again.kept.indices)
    for row in range(rows):
        count, budget = int(real[row].sum()), int(case["budget"][row])
        kept = int(selection.counts[row])
        if count <= budget:
            assert kept == count
        else:
            assert budget - config.page_size < kept <= budget
        for head in range(case["kv_heads"]):
            valid = selection.kept.tiers[row, head] != Tier.PADDING
            assert not valid[: len(valid) - kept].any(), "rows are aligned at the right"
            assert valid[len(valid) - kept :].all()
            indices = selection.kept.indices[row, head][valid]
            assert (indices.diff() > 0).all(), "unique and ascending"
            assert real[row][indices].all(), "padding is never kept"
            tiers = selection.kept.tiers[row, head][valid]
            tokens_real = real[row].nonzero().flatten()
            sink, window = min(config.sink, count), min(config.window, max(0, count - config.sink))
            assert indices[:sink].tolist() == tokens_real[:sink].tolist()
            assert (tiers[:sink] == Tier.SINK).all()
            assert indices[len(indices) - window :].tolist() == tokens_real[count - window :].tolist()
            assert (tiers[len(tiers) - window :] == Tier.RECENT).all()


def test_padding_and_batch_do_not_change_a_row() -> None:
    config = CrushConfig(window=4, page_size=2, representative_share=0.25)
    scores = torch.rand(1, 4, 50, generator=torch.Generator().manual_seed(1))
    alone = select(scores, 2, torch.tensor([20]), config)
    padded = torch.cat([torch.full((1, 4, 13), 9.0), scores], dim=-1)
    batch = torch.cat([padded, torch.rand(1, 4, 63)])
    real = torch.ones(2, 63, dtype=torch.bool)
    real[0, :13] = False
    together = select(batch, 2, torch.tensor([20, 33]), config, real)
    valid = together.kept.tiers[0, 0] != Tier.PADDING
    assert torch.equal(together.kept.indices[0][:, valid] - 13, alone.kept.indices[0])
    assert torch.equal(together.kept.tiers[0][:, valid], alone.kept.tiers[0])


def test_each_head_evicts_for_itself() -> None:
    """Head 0's important tokens are no reason for head 1 to drop or to repeat anything."""
    scores = torch.zeros(1, 2, 40)
    scores[0, 0, 5:15] = 1
    scores[0, 1, 20:30] = 1
    config = CrushConfig(sink=1, window=2, page_size=1, representative_share=0.0)
    kept = select(scores, 2, torch.tensor([13]), config).kept.indices[0]
    assert kept[0].tolist() == [0, *range(5, 15), 38, 39]
    assert kept[1].tolist() == [0, *range(20, 30), 38, 39]


def test_the_far_end_of_the_order_is_represented() -> None:
    """Buckets cover all candidates: with equal scores, the first and the last stretch both give one."""
    config = CrushConfig(sink=0, window=1, page_size=1, representative_share=0.5, grouping="position")
    selection = select(torch.zeros(1, 1, 101), 1, torch.tensor([21]), config)
    chosen = selection.kept.indices[0, 0][selection.kept.tiers[0, 0] == Tier.REPRESENTATIVE]
    assert len(chosen) == 10
    assert chosen.min() < 10 + 9
    assert chosen.max() >= 100 - 9


def test_signatures_separate_tokens_that_heads_treat_differently() -> None:
    """Two query heads of one KV head, each with its own favourites: summed scores would look alike."""
    scores = torch.zeros(1, 2, 62)
    scores[0, 0, :60:3] = 1.0
    scores[0, 1, 1:60:3] = 1.0
    config = CrushConfig(sink=0, window=2, page_size=1, representative_share=0.5, anchor="alternating")
    selection = select(scores, 1, torch.tensor([14]), config)
    expected = reference.select_row(scores[0], 1, 14, config, [True] * 62, 0)[0]
    assert (
        dict(zip(selection.kept.indices[0, 0].tolist(), selection.kept.tiers[0, 0].tolist(), strict=True)) == expected
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_cannot_be_ranked(bad: float) -> None:
    scores = torch.zeros(1, 2, 40)
    scores[0, 1, 3] = bad
    with pytest.raises(ScoreError, match="NaN or infinite"):
        select(scores, 2, torch.tensor([37]), CrushConfig())


def test_scores_of_a_wrong_shape() -> None:
    with pytest.raises(ScoreError, match="multiple of 2 KV heads"):
        select(torch.zeros(1, 3, 40), 2, torch.tensor([37]), CrushConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    scores = torch.randint(0, 50, (2, 4, 80), generator=torch.Generator().manual_seed(0))
    config = CrushConfig(window=4, page_size=4)
    ours = select(scores.to(dtype), 2, torch.tensor([40, 40]), config)
    assert torch.equal(ours.kept.indices, select(scores.double(), 2, torch.tensor([40, 40]), config).kept.indices)
