"""The GPU's kernels against the plain ones; `test_kernels_gpu.py` runs this in a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import stores
from compiled_cases import (  # noqa: F401
    test_centres_are_found_and_taken_off_as_plainly,
    test_keys_by_channel_are_quantized_as_plainly,
    test_no_tokens_take_no_bytes,
    test_the_spread_of_channels_is_fitted_as_plainly,
    test_tokens_are_quantized_as_plainly,
)
from crushkv import compiled, kernels
from crushkv.config import CrushConfig
from crushkv.kernels import gpu, plain
from crushkv.kernels.gpu_prepared import prepared
from crushkv.presets import PRESETS
from crushkv.rope import Rope
from crushkv.storage import RAW, Formats, TieredStorage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    return DEVICE


rope_of = partial(stores.rope_of, base=100.0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def shape_of(store: TieredStorage) -> tuple[int, int, int, int]:
    assert store.dense.keys is not None and store.dense.values is not None
    return store.rows, store.kv_heads, store.dense.keys.shape[-1], store.dense.values.shape[-1]


def keep(store: TieredStorage, part: float = 0.8, dense: int = 4) -> None:
    """Keeps a part of the tokens, other ones for each head, of which the last `dense` stay out of the blocks."""
    rows, heads, *_ = shape_of(store)
    formats, length = store.formats, store.length
    kept = int(part * (length - 8)) if store.blocked == 0 else length - 8 - length // 10
    order = torch.rand(rows, heads, length - 8, device=DEVICE).argsort(-1)[..., :kept].sort(-1).values
    tail = torch.arange(length - 8, length, device=DEVICE).expand(rows, heads, -1)
    recent = 8 - dense
    lengths = [kept] if len(formats.contested) == 1 else [kept - kept // 3, kept // 3]
    if formats.recent_block:
        lengths += [recent]
    else:
        lengths[-1] += recent
    store.keep(torch.cat([order, tail], dim=-1), (*lengths, dense))


def held(
    formats: Formats,
    tokens: int = 60,
    shape: tuple[int, int, int, int] = (1, 2, 32, 32),
    rope: Rope | None = None,
    dtype: torch.dtype = torch.float32,
    dense: int = 4,
) -> TieredStorage:
    torch.manual_seed(0)
    rows, heads, size, size_of_values = shape
    keys = torch.randn(rows, heads, tokens, size) * torch.linspace(0.2, 3, size)
    centre = 5 * torch.randn(heads, 1, size)
    keys = keys + centre if rope is None else rope.turned(keys + centre, torch.arange(tokens))
    store = TieredStorage(formats)
    store.append(keys.to(DEVICE, dtype), random(rows, heads, tokens, size_of_values, dtype=dtype))
    store.fit(None, rope if rope is None else rope.to(DEVICE))
    keep(store, dense=dense)
    return store


def check(store: TieredStorage, group: int = 2, shown: Tensor | None = None, steps: int = 1) -> None:
    """New tokens come, one by one, and the output is that of the plain kernels."""
    rows, heads, size, size_of_values = shape_of(store)
    dtype = store.dense.keys.dtype  # type: ignore[union-attr]
    for _ in range(steps):
        store.append(random(rows, heads, 1, size, dtype=dtype), random(rows, heads, 1, size_of_values, dtype=dtype))
        queries = random(rows, heads * group, 1, size, dtype=dtype)
        if shown is not None:
            shown = torch.cat([shown, torch.ones_like(shown[..., :1])], dim=-1)
            shown = torch.stack([shown, ~shown], dim=-1)[..., 0]  # flags with gaps between them
        assert gpu.refusal(queries, store) is None
        found = gpu.attend(queries, store, size**-0.5, shown)
        if DEVICE.type == "cuda":  # what was compiled is called by itself from the second time on
            assert torch.equal(gpu.attend(queries, store, size**-0.5, shown), found)
        expected = plain.attend(queries, store, size**-0.5, shown)
        assert found.shape == expected.shape and found.dtype == dtype and bool(found.isfinite().all())
        # Products are of float16, as far as codes and weights go; the plain ones round what they unpack.
        bound = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < bound


WIDTHS = [8, 4, 3, 2, RAW]


def some(cases: Iterable[Any], quick: Any) -> list[Any]:
    """All of them, of which only one is quick: the interpreter takes a second for a few thousand numbers."""
    return [case if case == quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("values", some(WIDTHS, 4))
def test_widths_of_values(values: int) -> None:
    check(held(Formats((3.5, values), (3.5, values), by_channel=True), rope=rope_of(32)))


@pytest.mark.parametrize("keys", some(WIDTHS, 3))
def test_widths_of_keys_that_are_alike(keys: int) -> None:
    check(held(Formats((keys, 4), (keys, 4)), rope=rope_of(32)))


@pytest.mark.parametrize("keys", some([1, 1.5, 2.25, 4.25, 6], 6))
def test_widths_of_keys_by_channel(keys: float) -> None:
    check(held(Formats((keys, 8), (keys, 8), by_channel=True), rope=rope_of(32)))


@pytest.mark.parametrize("preset", some(PRESETS, "small"))
def test_presets(preset: str) -> None:
    formats = CrushConfig.preset(preset).formats
    store = held(formats, shape=(1, 1, 128, 128), rope=rope_of(128), dtype=torch.bfloat16, dense=0)
    assert len(store.blocks) == len(formats.blocks)
    check(store, group=4)


@pytest.mark.parametrize(
    "formats",
    some(
        [
            Formats((2.25, 2), (3, 4), (8, 8), by_channel=True),
            Formats((4, 3), (2, 2)),
            Formats((RAW, 3), (RAW, 2)),
        ],
        Formats((2.25, 2), (3, 4), (8, 8), by_channel=True),
    ),
    ids=str,
)
def test_heads_that_hold_different_numbers_of_tokens(formats: Formats) -> None:
    """They are attended to at once, in the model's order of heads."""
    rows, size, group = 2, 32, 2
    heads = [(1, 4), (0,), (2, 3)]
    parts = [(50, 4), (21, 0), (34, 4)]
    stores = [
        held(formats, tokens, (rows, len(of), size, size), rope_of(size), dense=dense)
        for of, (tokens, dense) in zip(heads, parts, strict=True)
    ]
    for store in stores:
        store.seen = 50  # all heads have seen the same
    for step in range(3):
        queries = random(rows, 5 * group, 1, size)
        expected = torch.empty_like(queries)
        keys, values = (random(rows, 1, 5, size).transpose(1, 2) for _ in range(2))
        at_once = gpu.append(keys, values, stores, heads)
        assert at_once == (step > 0), "the first token needs room"
        for of, store in zip(heads, stores, strict=True):
            own = list(of)
            if not at_once:
                store.append(keys[:, own], values[:, own])
            assert store.dense.keys is not None and store.dense.values is not None
            assert torch.equal(store.dense.keys[:, :, -1:], keys[:, own])
            assert torch.equal(store.dense.values[:, :, -1:], values[:, own])
            mine = [head * group + i for head in of for i in range(group)]
            expected[:, mine] = plain.attend(queries[:, mine], store, size**-0.5, None)
        found = gpu.attend_together(queries, stores, heads, size**-0.5)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    # Once one of them evicts, what was prepared is made anew.
    keep(stores[0])
    mine = [head * group + i for head in heads[0] for i in range(group)]
    expected[:, mine] = plain.attend(queries[:, mine], stores[0], size**-0.5, None)
    found = gpu.attend_together(queries, stores, heads, size**-0.5)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_groups_in_different_formats_are_asked_one_by_one() -> None:
    stores, heads = [held(Formats((keys, 4), (keys, 4)), rope=rope_of(32)) for keys in (4, 3)], [(0, 3), (1, 2)]
    for _ in range(2):
        keys, values = random(1, 4, 1, 32), random(1, 4, 1, 32)
        if not gpu.append(keys, values, stores, heads):
            for own, store in zip(heads, stores, strict=True):
                store.append(keys[:, list(own)], values[:, list(own)])
        assert gpu.attend_together(random(1, 8, 1, 32), stores, heads, 0.1) is None
        for store in stores:
            queries = random(1, 4, 1, 32)
            found, expected = gpu.attend(queries, store, 0.1, None), plain.attend(queries, store, 0.1, None)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_groups_of_tokens_that_are_not_packed() -> None:
    stores, heads = [TieredStorage(Formats()) for _ in range(2)], [(0, 3), (1, 2)]
    for store, tokens in zip(stores, (40, 13), strict=True):
        store.append(random(2, 2, tokens, 32), random(2, 2, tokens, 16), reserve=3)
    for _ in range(3):
        keys, values, queries = random(2, 4, 1, 32), random(2, 4, 1, 16), random(2, 12, 1, 32)
        assert gpu.append(keys, values, stores, heads)
        found = gpu.attend_together(queries, stores, heads, 0.1)
        assert found is not None
        for own, store in zip(heads, stores, strict=True):
            mine = [3 * head + i for head in own for i in range(3)]
            expected = plain.attend(queries[:, mine], store, 0.1, None)
            torch.testing.assert_close(found[:, mine], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", some([1, 3, 7, 16], 7))
def test_queries_of_a_group(group: int) -> None:
    check(held(Formats((3, 3), (2, 2), (8, 8), by_channel=True), shape=(1, 1, 128, 128)), group)


SIZES = [(64, 64), (80, 80), (96, 96), (256, 256), (16, 12), (20, 40)]


@pytest.mark.parametrize("sizes", some(SIZES, (20, 40)), ids=str)
def test_head_sizes(sizes: tuple[int, int]) -> None:
    for formats in (Formats((3, 3), (3, 3), (8, 8), by_channel=True), Formats((4, 4), (2, 2))):
        check(held(formats, shape=(1, 1, *sizes), rope=rope_of(sizes[0])))


@pytest.mark.parametrize("group_size", some([8, 16], 16))
def test_ranges_of_a_token(group_size: int) -> None:
    check(held(Formats((8, 3), (8, 3), group_size=group_size)))


@pytest.mark.parametrize("dtype", some([torch.float16, torch.bfloat16], torch.float16), ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    for formats in (Formats((3, 3), (3, 3), (8, 8), by_channel=True), Formats((RAW, 4), (RAW, 4))):
        check(held(formats, rope=rope_of(32), dtype=dtype))


@pytest.mark.parametrize("rope", some([None, rope_of(32, 16), rope_of(32, 30), rope_of(32, base=1e4)], None))
def test_ways_to_turn(rope: Rope | None) -> None:
    check(held(Formats((3, 3), (3, 3), by_channel=True), rope=rope))
    check(held(Formats((4, 4), (4, 4)), rope=rope))


@pytest.mark.slow
def test_interleaved_pairs() -> None:
    half = rope_of(32).frequencies[16:]
    partner = torch.arange(32).view(-1, 2).flip(-1).flatten()
    rope = Rope(partner, torch.stack([-half, half], dim=-1).flatten())
    check(held(Formats((3, 3), (3, 3), by_channel=True), rope=rope))


@pytest.mark.parametrize("tokens", some([9, 10, 17, 136, 137, 300], 9))
def test_numbers_of_tokens(tokens: int) -> None:
    """Stretches that are full and that are not, tiles of one token and of all. Of 9 tokens, the first tier has none."""
    alike, other = Formats((3, 2), (3, 2)), Formats((2.25, 2), (3, 4), by_channel=True)
    for formats in (Formats((2.25, 3), (2.25, 3), by_channel=True), alike, other):
        check(held(formats, tokens, shape=(1, 1, 32, 32), rope=rope_of(32)))


@pytest.mark.parametrize("bits", some([8, 4, 3, 2], 3))
def test_stretches_that_are_full(bits: int) -> None:
    """Their codes are taken from the words by another way than those of tokens that do not divide by 8."""
    store = held(Formats((bits, bits), (bits, bits)), 68, rope=rope_of(32), dense=8)
    assert all(walk.even for walk in prepared(store).walks)  # type: ignore[union-attr]
    check(store)


@pytest.mark.parametrize("by_head", some([False, True], True))
def test_slots_that_are_not_shown(by_head: bool) -> None:
    store = held(Formats((3, 3), (2, 2), (8, 8), by_channel=True), shape=(2, 2, 32, 32), rope=rope_of(32))
    rows, heads, *_ = shape_of(store)
    shown = torch.rand((rows, heads, store.length) if by_head else (rows, store.length), device=DEVICE) < 0.5
    shown[0, ..., :20] = False  # whole parts of a block
    check(store, shown=shown)


def test_what_is_prepared_follows_the_blocks() -> None:
    store = held(Formats((4, 4), (4, 4)), shape=(2, 1, 32, 32), rope=rope_of(32), dense=0)
    check(store, steps=2)
    for _ in range(2):
        keep(store)
        check(store)
    store.select_rows(torch.tensor([1, 1, 0], device=DEVICE))
    check(store)
    again = TieredStorage(store.formats)
    again.load_state(store.state(), store.seen)
    check(again)
    for kept in (store, again):
        kept.clear()
    store.append(random(2, 1, 5, 32), random(2, 1, 5, 32))
    check(store)


@pytest.mark.parametrize("tokens", some([1, 2, 100], 2))
def test_nothing_but_tokens_that_are_not_packed(tokens: int) -> None:
    store = TieredStorage(Formats((4, 4), (4, 4)))
    store.append(random(2, 3, tokens, 80), random(2, 3, tokens, 80), reserve=7)
    check(store)


@pytest.mark.slow
def test_many_tokens_that_are_not_packed() -> None:
    store = held(Formats((3, 3), (3, 3), by_channel=True), rope=rope_of(32))
    store.append(random(1, 2, 100, 32), random(1, 2, 100, 32))
    check(store)


@pytest.mark.slow
def test_far_positions() -> None:
    """Float32 has the angle, and the product with a large centre is as exact as in float32."""
    store = held(Formats((4, 4), (4, 4), by_channel=True), rope=rope_of(32, base=1e4))
    store.seen += 5000  # as if the tokens between had been evicted
    store.append(random(1, 2, 20, 32), random(1, 2, 20, 32))
    keep(store)
    check(store)


@pytest.mark.slow
def test_large_and_small_numbers() -> None:
    formats = Formats((4, 4), (4, 4), by_channel=True)
    for scale in (1e-3, 1e3):
        store = TieredStorage(formats)
        store.append(random(1, 2, 60, 32), random(1, 2, 60, 32) * scale)
        store.fit(None)
        keep(store)
        check(store)


def test_what_is_refused() -> None:
    store = held(Formats((4, 4), (4, 4), rank=8))
    queries = random(1, 4, 1, 32)
    assert "projected" in (gpu.refusal(queries, store) or "")
    # The door takes what can.
    assert torch.equal(kernels.attend(queries, store, 0.1), plain.attend(queries, store, 0.1, None))
    store = held(Formats((4, 4), (4, 4)))
    assert gpu.refusal(queries, store) is None
    cases: list[tuple[Any, str]] = [
        (queries.clone().requires_grad_(), "gradients"),
        (queries.half(), "float16"),
        (random(1, 4, 2, 32), "shape"),
        (random(1, 2 * 128, 1, 32), "too many queries"),
    ]
    for wrong, why in cases:
        assert why in (gpu.refusal(wrong, store) or "")
    odd = held(Formats((4, 4), (4, 4)), shape=(1, 2, 32, 30))
    assert gpu.refusal(queries, odd) == "the channels of a head do not divide by 4"


def test_older_releases_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some multiply matrices of 16 columns at least; those before are refused."""
    monkeypatch.setattr(gpu, "triton_version", lambda: (3, 4))
    check(held(Formats((4.25, 3), (2, 2), (8, 8), by_channel=True), rope=rope_of(32)))
    assert gpu.missing() is None and compiled.quantizer(DEVICE) is not None
    monkeypatch.setattr(compiled, "triton_version", lambda: (3, 2))
    assert gpu.missing() == "Triton 3.3 or later is needed"
    quantizer = compiled.quantizer(DEVICE)
    assert quantizer is None or "cpu" in quantizer.__name__


def test_it_is_chosen() -> None:
    assert kernels.available()["gpu"] is None and kernels.chosen(DEVICE) == "gpu"


def test_no_launch_waits_for_the_device() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("there is no CUDA device")
    store = held(Formats((4.25, 3), (2, 2), (8, 8), by_channel=True), rope=rope_of(32), dtype=torch.float16)
    queries = random(1, 4, 1, 32, dtype=torch.float16)
    gpu.attend(queries, store, 0.1, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.attend(queries, store, 0.1, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_every_format_of_a_tier_is_covered() -> None:
    """Each width of keys beside each of values."""
    for keys, values in itertools.product((8, RAW), (8, 2)):
        check(held(Formats((keys, values), (keys, values)), tokens=30, shape=(1, 1, 32, 32)))
