"""Attention of one token over one layer's packed tokens on this machine's CPU, against PyTorch's over all of them.

    python benchmarks/kernels.py [--tokens 4096 8192] [--shape smollm2 qwen llama-8b] [--threads 2]

`of copy` is the speed at which the bytes that are held are read, as a share of what copying memory reaches. The error
is that against the plain implementation. All widths hold every token; presets hold what their budget has room for.
"""

from __future__ import annotations

import argparse

import torch

from crushkv import CrushConfig, kernels
from crushkv.presets import PRESETS
from gpu_kernels import SHAPES, Layer, copy_bandwidth, rows
from gpu_report import console, kernel_table, say

WIDTHS = (8, "6/4", "4/4", "3/3", "2.25/2", "1/2")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["smollm2", "qwen"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cpu")
    every = {
        f"every token, {bits}": CrushConfig.from_dict({"budget": 1.0, "min_tokens": 0, "bits": bits, "recent_bits": 8})
        for bits in WIDTHS
    }
    configs = {name: CrushConfig.preset(name) for name in PRESETS} | every
    bandwidth = copy_bandwidth(device)
    say(f"{kernels.described(device)}, {given.threads} threads, copies at {bandwidth / 1e9:.1f} GB/s")
    for name in given.shape:
        for tokens in given.tokens:
            say(f"\n{name}: {SHAPES[name]} query heads, KV heads, channels")
            found = [
                row
                for row in rows(Layer(*SHAPES[name], tokens, 1), configs, device, bandwidth)
                if row.get("implementation") != "plain"
            ]
            console.print(kernel_table(found))


if __name__ == "__main__":
    main()
