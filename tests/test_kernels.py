"""Attention over packed tokens: the compiled library gives what the reference gives, and is chosen where it can run."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import small_model
from crushkv import ConfigError, KVCrush, kernels
from crushkv.compiled import cpu_library
from crushkv.kernels import choice, cpu, plain
from crushkv.storage import Formats, TieredStorage
from stores import FORMATS, Shape, lengths_of, rope_of, store_of

needs_library = pytest.mark.skipif(cpu.missing() is not None, reason=f"the CPU kernels are not there: {cpu.missing()}")
BUILDS = [build for build in cpu_library.BUILDS if cpu_library.load(build) is not None]


def error(store: TieredStorage, queries: torch.Tensor, shown: torch.Tensor | None = None) -> float:
    """Of the library's output, as a part of the reference's."""
    assert cpu.refusal(queries, store) is None
    scaling = queries.shape[-1] ** -0.5
    found = cpu.attend(queries, store, scaling, shown)
    expected = plain.attend(queries, store, scaling, shown)
    assert found is not None and found.dtype == expected.dtype and found.shape == expected.shape
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# What the library computes in float32 and the reference rounds to the dtype on its way.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each set of instructions that this processor has."""
    monkeypatch.setattr(cpu_library, "build", lambda: request.param)
    return request.param


@needs_library
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("formats", FORMATS)
def test_attention_is_that_of_the_reference(formats: str, dtype: torch.dtype, build: str) -> None:
    torch.manual_seed(0)
    shapes = (
        Shape(),
        Shape(size=64, kept=129, seen=300),
        Shape(rows=2, group=1, size=128, kept=1000, seen=1200),
        Shape(group=16, size=80, kept=37, since=1),
        Shape(group=5, size=96, value_size=64, seen=256, kept=256, since=70),
        Shape(group=7, size=256, kept=44, since=2),
        Shape(group=2, size=20, value_size=12, kept=61),
    )
    for shape in shapes:
        for rope in (None, rope_of(shape.size), rope_of(shape.size, shape.size // 4 * 2, interleaved=True)):
            store = store_of(FORMATS[formats], shape, dtype, rope)
            assert error(store, shape.queries(dtype)) < LIMITS[dtype], (shape, rope)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_heads_that_hold_different_numbers_of_tokens(threads: int, build: str) -> None:
    """They are attended to at once, in the model's order of heads, whatever their formats."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    heads, group, size = [(1, 4), (0,), (2, 3)], 3, 32
    shapes = [
        Shape(rows=2, kv_heads=len(own), group=group, size=size, seen=900, kept=kept, since=5)
        for own, kept in zip(heads, (800, 61, 300), strict=True)
    ]
    for names in (["small"] * 3, ["balanced", "small", "tiny"]):
        stores = [store_of(FORMATS[n], s, rope=rope_of(size)) for n, s in zip(names, shapes, strict=True)]
        queries = torch.randn(2, 5 * group, 1, size)
        expected = torch.empty_like(queries)
        for own, store in zip(heads, stores, strict=True):
            mine = [head * group + i for head in own for i in range(group)]
            expected[:, mine] = plain.attend(queries[:, mine], store, size**-0.5, None)
        found = cpu.attend_together(queries, stores, heads, size**-0.5)
        assert found is not None and float((found - expected).norm() / expected.norm()) < 1e-5
    stores[1] = store_of(Formats(), shapes[1])
    assert cpu.attend_together(queries, stores, heads, 0.1) is None, "nothing is packed in one of them"


@needs_library
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_token_is_added_to_all_heads_at_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, size = [(1, 4), (0,), (2, 3)], 20
    shapes = [
        Shape(rows=2, kv_heads=len(own), size=size, value_size=12, seen=300, kept=kept, since=0)
        for own, kept in zip(heads, (200, 61, 100), strict=True)
    ]
    stores = [store_of(FORMATS["small"], shape, dtype, rope_of(size)) for shape in shapes]
    expected = copy.deepcopy(stores)
    at_once = 0
    for _ in range(70):
        keys, values = (torch.randn(2, 1, 5, n, dtype=dtype).transpose(1, 2) for n in (size, 12))
        done = cpu.append(keys, values, stores, heads)
        at_once += done
        for own, store, other in zip(heads, stores, expected, strict=True):
            other.append(keys[:, list(own)], values[:, list(own)])
            if not done:
                store.append(keys[:, list(own)], values[:, list(own)])
    assert at_once == 68, "the first token and the 65th need room"
    for store, other in zip(stores, expected, strict=True):
        assert store.length == other.length and store.seen == other.seen
        torch.testing.assert_close((store.dense.keys, store.dense.values), (other.dense.keys, other.dense.values))
    assert not cpu.append(keys.double(), values, stores, heads), "what is held is of another dtype"
    assert not cpu.append(torch.randn(2, 5, 1, 2 * size, dtype=dtype)[..., ::2], values, stores, heads), "it has gaps"


@needs_library
@pytest.mark.parametrize("formats", FORMATS)
def test_hidden_slots_are_not_attended_to(formats: str) -> None:
    torch.manual_seed(1)
    shape = Shape(rows=2, seen=500, kept=400)
    store = store_of(FORMATS[formats], shape, rope=rope_of(shape.size))
    for size in ((2, store.length), (2, 2, store.length)):
        shown = torch.rand(size) > 0.7
        shown[..., 100:250] = False  # whole tiles
        shown[..., -1] = True
        assert error(store, shape.queries(torch.float32), shown) < 1e-5


@needs_library
@pytest.mark.parametrize("ascending", [True, False])
def test_tokens_in_pages(ascending: bool, build: str) -> None:
    """What the mean of the keys gives is computed for stretches of positions, wherever pages begin and end."""
    torch.manual_seed(5)
    shape = Shape(rows=2, seen=900, kept=900, size=32, group=7)
    for page, first in ((16, 4), (5, 0), (40, 3)):
        pages = torch.randperm((shape.seen - first) // page)[:15]
        pages = pages.sort().values if ascending else pages
        kept = (first + pages[:, None] * page + torch.arange(page)).flatten()
        store = store_of(FORMATS["small"], shape, rope=rope_of(32))
        store.keep(kept.expand(2, 2, -1), lengths_of(store.formats, len(kept)))
        assert error(store, shape.queries(torch.float32)) < 1e-5, page


@needs_library
def test_far_positions() -> None:
    """Angles of far positions are put together from two tables."""
    torch.manual_seed(2)
    shape = Shape(seen=40_000, kept=300, size=32)
    store = store_of(FORMATS["balanced"], shape, rope=rope_of(32))
    assert error(store, shape.queries(torch.float32)) < 2e-5


@needs_library
def test_large_logits() -> None:
    """Weights of one token alone, and of tokens so far apart that the exponential of their difference is zero."""
    shape = Shape(seen=300, kept=280, size=32)
    for factor in (0.0, 30.0, 1000.0):
        store = store_of(FORMATS["balanced"], shape, rope=rope_of(32))
        assert error(store, shape.queries(torch.float32) * factor) < 1e-3


@needs_library
def test_what_is_prepared_follows_the_storage() -> None:
    """Evictions, rows that are selected, and copies: each changes what there is to attend to."""
    torch.manual_seed(3)
    shape = Shape(rows=2)
    store = store_of(FORMATS["small"], shape, rope=rope_of(shape.size))
    queries = shape.queries(torch.float32)
    assert error(store, queries) < 1e-5
    other = copy.deepcopy(store)
    store.append(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
    assert error(store, queries) < 1e-5
    store.keep(torch.arange(20, 60).expand(2, 2, -1), [20, 10, 10, 0])
    assert error(store, queries) < 1e-5
    store.select_rows(torch.tensor([1, 1, 0]))
    assert error(store, queries[[0, 1, 1]]) < 1e-5
    assert error(other, queries) < 1e-5


@needs_library
def test_an_eviction_frees_what_was_packed() -> None:
    """What is prepared for a storage does not keep its former blocks."""
    shape = Shape()
    store = store_of(FORMATS["balanced"], shape, rope=rope_of(shape.size))
    error(store, shape.queries(torch.float32))
    former = [weakref.ref(t) for block in store.blocks for part in block for t in part.tensors.values()]
    store.keep(torch.arange(60).expand(1, 2, -1), lengths_of(store.formats, 60))
    gc.collect()
    assert former and not any(tensor() is not None for tensor in former)


@needs_library
def test_threads_share_the_work() -> None:
    torch.manual_seed(4)
    shape = Shape(rows=3, seen=3000, kept=2500, size=64)
    store = store_of(FORMATS["balanced"], shape, rope=rope_of(64))
    queries = shape.queries(torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert error(store, queries) < 1e-5
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_read_is_refused_and_attended_to_all_the_same() -> None:
    shape = Shape()
    for formats, reason in ((Formats((8, 8), (8, 8), rank=5), "lower rank"), (Formats(), "nothing is packed")):
        store = store_of(formats, shape)
        queries = shape.queries(torch.float32)
        assert reason in str(cpu.refusal(queries, store))
        expected = plain.attend(queries, store, 0.25, None)
        assert torch.equal(kernels.attend(queries, store, 0.25), expected)
    wide = store_of(FORMATS["balanced"], Shape(group=17))
    assert "17 query heads" in str(cpu.refusal(Shape(group=17).queries(torch.float32), wide))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Choices are remembered: forgotten before and after."""
    choice._chosen.cache_clear()
    yield
    choice._chosen.cache_clear()


def test_an_implementation_can_be_named(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    device = torch.device("cpu")
    monkeypatch.setenv(kernels.VARIABLE, "plain")
    assert kernels.chosen(device) == "plain"
    monkeypatch.setenv(kernels.VARIABLE, "plian")
    with pytest.raises(ConfigError, match="Did you mean 'plain'"):
        kernels.chosen(device)
    monkeypatch.delenv(kernels.VARIABLE)
    assert kernels.chosen(device) == ("plain" if cpu.missing() else "cpu")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(cpu_library, "build", lambda: None)
    choice.available.cache_clear()
    try:
        assert kernels.chosen(torch.device("cpu")) == "plain"
        monkeypatch.setenv(kernels.VARIABLE, "cpu")
        with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
            kernels.chosen(torch.device("cpu"))
    finally:
        choice.available.cache_clear()


@needs_library
@pytest.mark.parametrize("preset", ["balanced", "small", "tiny"])
def test_decoding_reads_what_is_packed(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a preset every decoded token is attended to by the library, and nothing is unpacked for it."""
    model = small_model()
    calls = 0
    original = cpu.attend

    def counting(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args)

    monkeypatch.setattr(cpu, "attend", counting)
    cache = KVCrush(preset, min_tokens=0, window=8, interval=0).cache(model)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 300)[None] % 90, past_key_values=cache)
        monkeypatch.setattr(TieredStorage, "attended", None)
        for token in range(5):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    assert calls == 5 * len(cache.crushed_layers)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, crushkv.kernels; sys.exit('triton' in sys.modules or 'crushkv.kernels.cpu' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
