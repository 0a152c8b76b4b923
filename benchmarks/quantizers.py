"""Libraries that pack quantized tensors, beside crushkv's: time to pack and unpack, bits held, error.

    pip install --no-deps optimum-quanto==0.2.7 hqq==0.2.8.post1 torchao==0.18.0
    pip install ninja accelerate
    python benchmarks/quantizers.py

One layer's keys of normally distributed numbers, 4,096 tokens x 3 heads x 64, groups of 64, one CPU thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from crushkv.storage.packing import pack, unpack
from crushkv.storage.quantization import dequantize, narrowed, quantize

GROUP = 64
Row = tuple[str, int, Callable[[], object], Callable[[], Tensor], int]


def crushkv(x: Tensor) -> Iterator[Row]:
    out = torch.empty_like(x)
    found = quantize(x, GROUP)
    for bits in (8, 4, 3, 2):
        planes = pack(narrowed(found.codes, bits), bits)

        def packing(bits: int = bits) -> object:
            return pack(narrowed(quantize(x, GROUP).codes, bits), bits)

        def unpacking(planes: tuple[Tensor, ...] = planes, bits: int = bits) -> Tensor:
            dequantize(unpack(planes, bits, x.shape[2]), found.zero, found.span, bits, out)
            return out

        held = sum(plane.nbytes for plane in planes) + found.zero.nbytes + found.span.nbytes
        yield "crushkv", bits, packing, unpacking, held


def quanto(x: Tensor) -> Iterator[Row]:
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    for bits, kind in ((4, qint4), (2, qint2)):

        def packing(kind: object = kind) -> object:
            scale, shift = MaxOptimizer()(x, kind, 0, GROUP)
            return quantize_weight(x, kind, 0, scale, shift, GROUP)

        packed = packing()
        tensors = (packed._data._data, packed._scale, packed._shift)  # type: ignore[attr-defined]
        yield "quanto", bits, packing, packed.dequantize, sum(t.nbytes for t in tensors)  # type: ignore[attr-defined]


def hqq(x: Tensor) -> Iterator[Row]:
    from hqq.core.quantize import Quantizer

    for bits in (8, 4, 3, 2):

        def packing(bits: int = bits) -> tuple[Tensor, dict[str, Tensor]]:
            options = {"device": "cpu", "compute_dtype": torch.float32, "nbits": bits, "group_size": GROUP, "axis": 0}
            found: tuple[Tensor, dict[str, Tensor]] = Quantizer.quantize(x, **options)
            return found

        packed, meta = packing()

        def unpacking(packed: Tensor = packed, meta: dict[str, Tensor] = meta) -> Tensor:
            return Quantizer.dequantize(packed, meta)

        yield "HQQ", bits, packing, unpacking, packed.nbytes + meta["scale"].nbytes + meta["zero"].nbytes


def torchao(x: Tensor) -> Iterator[Row]:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block = (1, 1, 1, GROUP)
    for bits in (8, 4, 2):
        limits = {"quant_min": 0, "quant_max": 2**bits - 1}

        def packing(limits: dict[str, int] = limits) -> tuple[Tensor, Tensor, Tensor]:
            scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, block, torch.uint8, **limits)
            return quantize_affine(x, block, scale, zero, torch.uint8, **limits), scale, zero

        packed = packing()

        def unpacking(packed: tuple[Tensor, Tensor, Tensor] = packed, limits: dict[str, int] = limits) -> Tensor:
            codes, scale, zero = packed
            return dequantize_affine(codes, block, scale, zero, torch.uint8, **limits)

        yield "torchao, affine functions", bits, packing, unpacking, sum(t.nbytes for t in packed)


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4096, 64)
    print("| | bits | bits held a number | pack, ms | unpack, ms | error (root mean square) |")
    print("|---|" + "---:|" * 5)
    for library in (crushkv, quanto, hqq, torchao):
        try:
            for label, bits, packing, unpacking, held in library(x):
                error = (unpacking().reshape(x.shape) - x).pow(2).mean().sqrt()
                print(
                    f"| {label} | {bits} | {held * 8 / x.numel():.1f} | {milliseconds(packing):.1f} | "
                    f"{milliseconds(unpacking):.1f} | {error:.3f} |"
                )
        except ImportError as missing:
            print(f"{library.__name__}: not installed ({missing})")


if __name__ == "__main__":
    main()
