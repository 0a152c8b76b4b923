"""Attention of one decoded token over one layer's packed tokens: what `gpu.py` measures of `crushkv.kernels`."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crushkv import CrushConfig, kernels
from crushkv.core import Shares
from crushkv.rope import Rope
from crushkv.storage import TieredStorage

# Query heads, KV heads, channels.
SHAPES = {"smollm2": (9, 3, 64), "qwen": (14, 2, 64), "qwen-7b": (28, 4, 128), "llama-8b": (32, 8, 128)}
REPEATS, WARM_UP = 20, 3
DECODED = 16  # tokens behind the packed ones, as the model made them
FULL = "16 bits, PyTorch"
COLD = 256 * 2**20  # bytes that are written before each run, so that nothing is left in a GPU's second-level cache


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and what it holds: `batch` rows of `tokens`."""

    heads: int
    kv_heads: int
    size: int
    tokens: int
    batch: int

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Rope]:
        """Queries `[B, Hq, 1, D]`, keys and values `[B, Hkv, P, D]`, and how the keys are turned.

        The channels of keys have means and spreads that differ, as those of models do.
        """
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (self.batch, self.kv_heads, self.tokens + DECODED, self.size)
        half = self.size // 2
        channels = torch.arange(self.size, device=device)
        frequencies = 5e5 ** -(torch.arange(half, device=device) / half)
        rope = Rope((channels + half) % self.size, torch.cat([-frequencies, frequencies]))
        spread = torch.logspace(-0.7, 0.5, half, device=device).repeat(2)
        keys = torch.randn(shape, device=device, dtype=dtype) * spread
        keys = keys + 4 * torch.randn(self.kv_heads, 1, self.size, device=device) * spread
        keys = rope.turned(keys, torch.arange(shape[2], device=device)).to(dtype)
        queries = torch.randn(self.batch, self.heads, 1, self.size, device=device, dtype=dtype)
        return queries, keys, torch.randn(shape, device=device, dtype=dtype), rope


def packed(keys: Tensor, values: Tensor, rope: Rope, config: CrushConfig) -> TieredStorage:
    """A layer's storage as it is after a prompt, some tokens of the answer behind it."""
    tokens = keys.shape[2] - DECODED
    store = TieredStorage(config.formats)
    store.append(keys[:, :, :tokens], values[:, :, :tokens])
    store.fit(None, rope)
    split = Shares(config, layers=1).split(0, tokens, store.sizes())
    contested = split.important + split.representative
    middle = tokens - split.sink - split.recent
    place = torch.arange(tokens, device=keys.device)
    # Pages evenly over the text.
    page = place[:contested] // config.page_size * (config.page_size * middle // max(contested, 1))
    chosen = split.sink + (page + place[:contested] % config.page_size).clamp(max=middle - 1)
    indices = torch.cat([chosen, place[: split.sink], place[tokens - split.recent :]])
    two = len(config.formats.contested) == 2
    lengths = [split.important, split.representative] if two else [contested]
    lengths += [split.sink + split.recent] + [0] * config.formats.recent_block
    store.keep(indices.expand(*keys.shape[:2], -1), lengths)
    store.append(keys[:, :, tokens:], values[:, :, tokens:])
    return store


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying one tensor to another."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a run, after a few that are not counted."""
    for _ in range(WARM_UP):
        run()
    return statistics.median(_on_gpu(run, device) if device.type == "cuda" else _on_cpu(run))


def _on_gpu(run: Callable[[], object], device: torch.device) -> list[float]:
    cold = torch.empty(COLD, dtype=torch.uint8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for begin, end in pairs:
        cold.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def _on_cpu(run: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def rows(
    layer: Layer, configs: dict[str, CrushConfig], device: torch.device, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """PyTorch's attention over all keys and values in 16 bits, then each implementation over each format.

    A row has its time, that of PyTorch over it (`speedup`), the bytes that are held, those a second as a share of the
    copy bandwidth, and the relative error against the plain implementation. Where an implementation refuses, `error`
    says why.
    """
    queries, keys, values, rope = layer.tensors(device)
    scaling = layer.size**-0.5
    # PyTorch's faster way: the query heads of a group as rows, or as Transformers asks for them.
    of_groups = queries.reshape(layer.batch, layer.kv_heads, -1, layer.size)
    as_rows = partial(F.scaled_dot_product_attention, of_groups, keys, values, scale=scaling)
    as_heads = partial(F.scaled_dot_product_attention, queries, keys, values, scale=scaling, enable_gqa=True)
    full = min(seconds(way, device) for way in (as_rows, as_heads))
    common = {"tokens": layer.tokens, "batch": layer.batch}

    def row(method: str, implementation: str, taken: float, held: int, error: float | None) -> dict[str, Any]:
        speed = held / taken
        return {
            **common,
            "method": method,
            "implementation": implementation,
            "seconds": taken,
            "speedup": full / taken,
            "bytes": held,
            "bytes_ratio": held / (keys.nbytes + values.nbytes),
            "bandwidth": speed,
            "of_copy": speed / bandwidth,
            "relative_error": error,
            "error": None,
        }

    yield row(FULL, "sdpa", full, keys.nbytes + values.nbytes, None)
    plain = importlib.import_module("crushkv.kernels.plain")
    for method, config in configs.items():
        store = packed(keys, values, rope, config)
        held = store.nbytes - store.dense.room_nbytes
        expected = plain.attend(queries, store, scaling, None).float()
        for name in implementations(device):
            module = importlib.import_module(f"crushkv.kernels.{name}")
            if (reason := module.refusal(queries, store)) is not None:
                yield {**common, "method": method, "implementation": name, "error": f"refused: {reason}"}
                continue
            found = module.attend(queries, store, scaling, None).float()
            off = float((found - expected).norm() / expected.norm())
            taken = seconds(lambda: module.attend(queries, store, scaling, None), device)  # noqa: B023
            yield row(method, name, taken, held, off)


def implementations(device: torch.device) -> list[str]:
    """Those that can run here."""
    can = (name for name, missing in kernels.available().items() if missing is None)
    return [name for name in can if importlib.import_module(f"crushkv.kernels.{name}").runs_on(device)]
